"""What a router is: a small module that chooses the gates of a Sum from the call itself.

`Sum("a", "b", weights=TokenRouter(top_k=1))`: f + sum_i g_i (e_i(f) - f) with g = normalise(scores / temperature). Each
site that two children have something at gets scores of its own.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import did_you_mean
from .frame import in_backward
from .gates import Chooser, Reading, Spot
from .pooling import counted


class Router(Chooser):
    """What all routers have.

    Args:
        activation: "softmax" (the gates add up to 1) or "sigmoid" (each by itself).
        top_k: only so many gates are not 0, for each token or row.
        temperature: scores are divided by it.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ("activation", "top_k", "temperature")
    """What its constructor takes; written to files."""
    pools: ClassVar[bool] = False
    """Whether it needs to know the real tokens of a row."""
    first_pass: ClassVar[bool] = False
    """Whether it reads what the bare model makes of the call's tokens: the base runs twice."""
    by_token: ClassVar[bool] = False
    """Whether each token has gates of its own."""

    def __init__(self, activation: str = "softmax", top_k: int | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        if activation not in ("softmax", "sigmoid"):
            raise ValueError(
                f"{type(self).__name__}: activation={activation!r} is not one of 'softmax', 'sigmoid'."
                + did_you_mean(str(activation), ("softmax", "sigmoid"))
            )
        whole(self, "top_k", top_k)
        above_zero(self, temperature)
        self.activation, self.top_k, self.temperature = activation, top_k, float(temperature)
        self.spots: dict[str, Spot] = {}
        self.sites = nn.ModuleDict()

    # ---- before a call -----------------------------------------------------------------------------------------------

    def check_children(self, count: int) -> None:
        """Raises ValueError where it cannot choose among so many."""
        if count < 2 and self.activation == "softmax":
            raise ValueError(f"{self!r} chooses among adapters, and its Sum has {count}: its gate would always be 1.")
        if self.top_k is not None and self.top_k >= count:
            raise ValueError(f"{self!r}: top_k={self.top_k} of {count} children leaves none out. Give less, or None.")

    def prepare(self, spots: Sequence[Spot]) -> None:
        found = {spot.site: spot for spot in spots}
        if self.spots:
            wrong = [s for s in found.keys() | self.spots.keys() if not _same(found.get(s), self.spots.get(s))]
            if wrong:
                raise ValueError(
                    f"{self!r} was made for other sites or adapters ({sorted(wrong)[0]!r} among {len(wrong)} that "
                    "differ). Make a new one for this composition."
                )
        useful = [s for s in spots if len(s.children) > 1 or self.activation == "sigmoid"]
        if not useful:
            other = ', or activation="sigmoid", which weighs each by itself' if "activation" in self.options else ""
            raise ValueError(
                f"{self!r} would have nothing to choose: no two of its adapters have a common site. Give it adapters "
                f"at the same modules{other}."
            )
        for spot in useful:
            self.refuse(spot)
        new = not self.spots
        self.spots = {site: spot.described() for site, spot in found.items()}
        for spot in useful if new else ():
            beside = (p for own in spot.methods.values() for method in own for p in method.parameters())
            like = next((p for p in beside if p.is_floating_point()), torch.empty(0))
            wide = like.dtype if like.dtype == torch.float64 else torch.float32
            site = RoutedSite(self.network(spot), spot.children)
            self.sites[key_of(spot.site)] = site.to(device=like.device, dtype=wide)

    def refuse(self, spot: Spot) -> None:
        """Raises ValueError where it cannot stand at a site."""
        if self.by_token and not spot.tokens:
            raise ValueError(f"{self!r} weighs tokens, and {spot.path!r} has none (a convolution). Use a PooledRouter.")
        if spot.kind == "input" and (self.by_token or (self.pools and spot.causal)):
            why = "it stands before all of them" if self.by_token else "it stands before the tokens that would decide"
            raise ValueError(
                f"{self!r} cannot weigh the prompt at {spot.path!r}: {why}. Use a TaskRouter or Learned()."
            )
        if spot.kind == "input" and (self.activation == "sigmoid" or self.top_k is not None):
            raise ValueError(
                f"{self!r} cannot weigh prompts: one at gate 0 would leave virtual tokens of zeros. Use softmax "
                "without top_k, which mixes them."
            )

    @abstractmethod
    def network(self, spot: Spot) -> nn.Module:
        """What makes the scores at a site: features -> (..., len(spot.children))."""

    # ---- in a call ---------------------------------------------------------------------------------------------------

    def scores(self, at: Reading, spot: Spot, network: nn.Module) -> Tensor:
        """(B, C) or features.shape[:-1] + (C,). Default: the network on each token's features."""
        return network(as_parameters(at.features, network))

    def choose(self, at: Reading) -> Mapping[int, Tensor | float]:
        return at.once(self, lambda: self._chosen(at))

    def _chosen(self, at: Reading) -> dict[int, Tensor | float]:
        spot = self.spots[at.site]
        key = key_of(at.site)
        if key not in self.sites:  # one alone
            return dict.fromkeys(spot.children, 1.0)
        site: Any = self.sites[key]
        gates = self.normalise(self.scores(at, spot, site.network))
        if self.training:
            site.record(gates, counted(gates, spot))
        return {child: gates[..., i] for i, child in enumerate(spot.children)}

    def normalise(self, scores: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        scores = scores / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            kept = scores.topk(self.top_k, dim=-1)
            scores = torch.full_like(scores, -torch.inf).scatter(-1, kept.indices, kept.values)
        return scores.softmax(-1) if self.activation == "softmax" else scores.sigmoid()

    # ---- what it did -------------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, dict[int, float]]:
        """Site -> child -> its mean gate over the real tokens (or rows) of training so far."""
        return {
            spot.site: dict(zip(spot.children, (site.used / site.count).tolist(), strict=True))
            for spot, site in self._routed()
            if float(site.count)
        }

    def shares(self) -> dict[int, float]:
        found: dict[int, tuple[float, float]] = {}
        for spot, site in self._routed():
            *gates, count = site.since().tolist()
            for child, sum_of_gates in zip(spot.children, gates, strict=True):
                before = found.get(child, (0.0, 0.0))
                found[child] = (before[0] + sum_of_gates, before[1] + count)
        return {child: used / count for child, (used, count) in found.items() if count}

    def _routed(self) -> Iterator[tuple[Spot, "RoutedSite"]]:
        """The sites where there is something to choose."""
        for spot in self.spots.values():
            if key_of(spot.site) in self.sites:
                site: Any = self.sites[key_of(spot.site)]
                yield spot, site

    def said(self) -> dict[str, Any]:
        """Its options that are not at their default."""
        blank = type(self)(**self._needed())
        return {n: v for n in self.options if (v := getattr(self, n)) != getattr(blank, n) or n in self._needed()}

    def _needed(self) -> dict[str, Any]:
        return {}

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.said().items())})"


class RoutedSite(nn.Module):
    """A router's network at one site, and how much each child was used there."""

    used: Tensor
    count: Tensor
    told: Tensor

    def __init__(self, network: nn.Module, children: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("of", torch.tensor(children))  # (C,) which children these are, for whoever reads the file
        self.register_buffer("used", torch.zeros(len(children)))  # (C,) sum of gates
        self.register_buffer("count", torch.zeros(()))  # of the tokens or rows
        self.register_buffer("told", torch.zeros(len(children) + 1))  # both as they were when `since` was last asked

    @torch.no_grad()
    def record(self, gates: Tensor, real: Tensor | None) -> None:
        """gates: (..., C). real: gates.shape[:-1], which count."""
        if in_backward():
            return
        if real is not None:
            self.used += (gates * real[..., None]).flatten(0, -2).sum(0)
            self.count += real.sum()
        else:
            self.used += gates.flatten(0, -2).sum(0)
            self.count += gates[..., 0].numel()

    @torch.no_grad()
    def since(self) -> Tensor:
        """(C + 1,) sums of gates and the count since this was last asked; a checkpoint knows when that was."""
        now = torch.cat([self.used, self.count[None]])
        new = now - self.told
        self.told.copy_(now)
        return new


def as_parameters(x: Tensor, network: nn.Module) -> Tensor:
    """x in the dtype of the router's parameters."""
    own = next((p.dtype for p in network.parameters()), x.dtype)
    return x.to(own)


def key_of(site: str) -> str:
    """A site's name in a ModuleDict, where no dot can be and no name that it has itself."""
    return "/" + site.replace(".", "/")


def _same(one: Spot | None, other: Spot | None) -> bool:
    if one is None or other is None:
        return False
    return (one.width, one.outputs, one.children, one.kind) == (other.width, other.outputs, other.children, other.kind)


def whole(router: Router, name: str, value: Any) -> None:
    """Raises ValueError for what is neither None nor a whole number of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{type(router).__name__}: {name}={value!r} must be a whole number of at least 1.")


def yes_or_no(router: Router, name: str, value: Any) -> None:
    """Raises ValueError for what is neither true nor false."""
    if not isinstance(value, bool):
        raise ValueError(f"{type(router).__name__}: {name}={value!r} must be true or false.")


def above_zero(router: Router, temperature: Any) -> None:
    """Raises ValueError for what is no number above 0."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        raise ValueError(f"{type(router).__name__}: temperature={temperature!r} must be a number above 0.")
