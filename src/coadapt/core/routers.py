"""Routers, one class per way to choose."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import did_you_mean
from .frame import current
from .gates import Reading, Spot, per_row, tasks_of_call
from .pooling import counted, pooled
from .router import Router, as_parameters, key_of, whole, yes_or_no


class TokenRouter(Router):
    """g = softmax(W x + b): every token weighs the adapters at every site, by the site's own input.

    LoRA-Flow (arXiv 2402.11455) routes so, with one gate for each Transformer layer; MoLE's (2404.13628) read what
    the adapters give. With `hidden` the scores come from an MLP, as in X-LoRA (2402.07148); different from there,
    each layer reads its own input and not the last hidden state of a first pass without adapters, so there is no
    second pass, and a cache changes nothing.

    Args:
        hidden: width of a hidden layer (SiLU) between features and scores.
    """

    name = "token_router"
    options = (*Router.options, "hidden")
    by_token = True

    def __init__(
        self,
        activation: str = "softmax",
        top_k: int | None = None,
        temperature: float = 1.0,
        hidden: int | None = None,
    ) -> None:
        super().__init__(activation, top_k, temperature)
        whole(self, "hidden", hidden)
        self.hidden = hidden

    def network(self, spot: Spot) -> nn.Module:
        last = nn.Linear(self.hidden or spot.width, len(spot.children))
        nn.init.normal_(last.weight, std=0.02)  # nearly even at the start, without a tie for top_k
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(spot.width, self.hidden), nn.SiLU(), last) if self.hidden else last


class PooledRouter(TokenRouter):
    """g = softmax(W mean(x) + b): the row as a whole weighs the adapters at every site.

    The mean is over real tokens, in a causal stack over those up to each token. With activation="sigmoid" it is
    UniPELT's gate (arXiv 2110.07577), different from there in that the mean is taken before the sigmoid.
    """

    name = "pooled_router"
    pools = True
    by_token = False

    def scores(self, at: Reading, spot: Spot, network: nn.Module) -> Tensor:
        # First in the parameters' dtype: in half precision a running count of tokens stands still at 256.
        return network(pooled(as_parameters(at.features, network), spot, (id(self), at.site)))


class TaskRouter(Router):
    """g = softmax(Z[task]): each task has its own mix, at every site. The call says `task_ids`, one a row.

    Poly (arXiv 2202.13914): adapters are skills, Z says which of them a task needs. Different from there, the adapters'
    changes are mixed and not A and B apart, and Z is not sampled.

    Args:
        num_tasks: how many tasks there are, numbered from 0.
    """

    name = "task_router"
    options = (*Router.options, "num_tasks")

    def __init__(
        self, num_tasks: int, activation: str = "softmax", top_k: int | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__(activation, top_k, temperature)
        whole(self, "num_tasks", num_tasks)
        self.num_tasks = num_tasks

    def _needed(self) -> dict[str, Any]:
        return {"num_tasks": self.num_tasks}

    def network(self, spot: Spot) -> nn.Module:
        table = nn.Embedding(self.num_tasks, len(spot.children))  # Z, (tasks, C)
        nn.init.normal_(table.weight, std=0.02)
        return table

    def scores(self, at: Reading, spot: Spot, network: nn.Module) -> Tensor:
        return network(per_row(tasks_of_call(), len(at.y)).to(at.y.device))


class Arrow(Router):
    """g = softmax(abs(v_i x)) over the top_k: v_i is what B A amplifies most, its first right singular vector.

    Arrow routing (arXiv 2405.11157): nothing is trained; low-rank adapters only, and they are read as they are now.
    """

    name = "arrow"
    options = ("top_k", "temperature")
    by_token = True

    def __init__(self, top_k: int | None = None, temperature: float = 1.0) -> None:
        super().__init__("softmax", top_k, temperature)

    def refuse(self, spot: Spot) -> None:
        super().refuse(spot)
        for found in spot.methods.values():
            if len(found) != 1 or not hasattr(found[0], "factors"):
                raise ValueError(
                    f"{self!r} reads the factors of low-rank adapters; at {spot.path!r} there is "
                    f"{' and '.join(type(m).__name__ for m in found)}. Use a TokenRouter."
                )
            if spot.embeds:
                raise ValueError(
                    f"{self!r} compares what goes in with what an adapter reads, and at {spot.path!r} that is one word "
                    "or another. Use a TokenRouter, or leave that site out."
                )

    def prepare(self, spots: Sequence[Spot]) -> None:
        super().prepare(spots)
        for spot in spots:
            site: Any = self.sites[key_of(spot.site)] if key_of(spot.site) in self.sites else None
            if site is not None and site.network.methods != tuple(spot.methods[c][0] for c in spot.children):
                raise ValueError(
                    f"{self!r} was made for other adapters than those which have these names now. Make a new one; it "
                    "has nothing to lose."
                )

    def network(self, spot: Spot) -> nn.Module:
        return Prototypes([spot.methods[child][0] for child in spot.children])

    def scores(self, at: Reading, spot: Spot, network: nn.Module) -> Tensor:
        return network(at.features).abs()


class Prototypes(nn.Module):
    """v_i of each adapter, worked out again when its factors have changed."""

    def __init__(self, methods: Sequence[Any]) -> None:
        super().__init__()
        self.methods = tuple(methods)  # not as modules: their parameters are the adapters'
        self.read: list[tuple[Tensor, int, int]] = []
        """The factors that `made` is of, with what tells whether they were written or moved since."""
        self.made = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., C)"""
        return x @ self._vectors().to(x).mT

    @torch.no_grad()
    def _vectors(self) -> Tensor:
        """(C, I)"""
        factors = [m.factors()[:2] for m in self.methods]
        if torch.compiler.is_compiling():
            return torch.stack([leading_direction(a.flatten(1), b) for a, b in factors])
        now = [(t, t._version, t.data_ptr()) for pair in factors for t in pair]
        same = len(now) == len(self.read) and all(
            t is u and seen == then for (t, *seen), (u, *then) in zip(now, self.read, strict=True)
        )
        if not same:
            self.read = now
            self.made = torch.stack([leading_direction(a.flatten(1), b) for a, b in factors])
        return self.made


def leading_direction(a: Tensor, b: Tensor) -> Tensor:
    """(I,) the first right singular vector of B A; A (R, I), B (O, R). Never makes B A."""
    q, r = torch.linalg.qr(a.float().mT)  # A = R' Q'
    small = torch.linalg.svd(b.float() @ r.mT, full_matrices=False)
    return q @ small.Vh[0]


class Fusion(Router):
    """f + V sum_i g_i d_i with d_i = e_i(f) - f and g = softmax_i(Q f(x) . K d_i): attention over what adapters add.

    AdapterFusion (arXiv 2005.00247), for every method that has an output of its own. V is the identity at the start.

    Args:
        dim: width of Q and K; that of the outputs, as published, if left out.
        values: have a V.
    """

    name = "fusion"
    options = ("temperature", "dim", "values")

    def __init__(self, temperature: float = 1.0, dim: int | None = None, values: bool = True) -> None:
        super().__init__("softmax", None, temperature)
        whole(self, "dim", dim)
        yes_or_no(self, "values", values)
        self.dim, self.values = dim, values

    def refuse(self, spot: Spot) -> None:
        if spot.kind != "layer" or not spot.tokens:
            raise ValueError(
                f"{self!r} attends to what each adapter adds to tokens, and at {spot.path!r} that cannot be told apart "
                f"({_OTHERWISE[spot.kind]}). Use a PooledRouter."
            )

    def network(self, spot: Spot) -> nn.Module:
        return Attending(spot.outputs, self.dim or spot.outputs, self.values)

    def choose(self, at: Reading) -> Mapping[int, Tensor | float]:
        """Of a child that has a site to itself; where there are several, `fused` needs their outputs."""
        assert key_of(at.site) not in self.sites
        return dict.fromkeys(self.spots[at.site].children, 1.0)

    def fused(self, at: Reading, changes: Mapping[int, Tensor]) -> Tensor:
        """What is added to y, like y. changes: child -> e_i(f) - f."""
        if key_of(at.site) not in self.sites:
            return sum(changes.values(), torch.zeros_like(at.y))
        site: Any = self.sites[key_of(at.site)]
        network: Attending = site.network
        stacked = torch.stack([changes[c] for c in self.spots[at.site].children], dim=-2)  # (B, ..., C, O)
        own = as_parameters(stacked, network)
        gates = self.normalise(network(as_parameters(at.y, network), own))  # (B, ..., C)
        if self.training:
            site.record(gates, counted(gates, self.spots[at.site]))
        mixed = (gates[..., None] * own).sum(-2)
        return (mixed if network.value is None else network.value(mixed)).to(at.y.dtype)


_OTHERWISE = {"layer": "a convolution", "attention": "a prefix", "input": "a prompt"}


class Attending(nn.Module):
    """Q, K and V of a Fusion at one site."""

    def __init__(self, width: int, dim: int, values: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, dim), nn.Linear(width, dim)
        self.value = nn.Linear(width, width, bias=False) if values else None
        if self.value is not None:
            nn.init.eye_(self.value.weight)

    def forward(self, y: Tensor, changes: Tensor) -> Tensor:
        """(..., O), (..., C, O) -> (..., C)"""
        return (self.key(changes) @ self.query(y)[..., None])[..., 0]


class XLoraRouter(Router):
    """g = softmax(MLP(h)) with h the last hidden states of the bare model: one network for the whole model.

    X-LoRA (arXiv 2402.07148): each call runs the base twice, first without adapters and without gradients. The gates of
    a token depend on it and on those before it, so that a cache changes nothing; it holds the bare model's keys and
    values besides. Different from the field, which refuses one; and dropout draws at each site anew.

    Args:
        hidden_size: D of the hidden states.
        depth: layers of the MLP (ReLU). size: its width inside. dropout: of its inner states.
        layerwise: each site has gates of its own. softmax: the gates add up to 1.
        softmax_top_k: those that top_k keeps do. scale: all gates are multiplied by it.
    """

    name = "xlora_router"
    options = (
        "hidden_size", "depth", "size", "dropout", "layerwise", "softmax", "softmax_top_k", "top_k", "temperature",
        "scale",
    )  # fmt: skip
    by_token = True
    first_pass = True

    def __init__(
        self,
        hidden_size: int,
        depth: int = 1,
        size: int = 2048,
        dropout: float = 0.2,
        layerwise: bool = False,
        softmax: bool = True,
        softmax_top_k: bool = False,
        top_k: int | None = None,
        temperature: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__("softmax", top_k, temperature)
        for option, value in {"hidden_size": hidden_size, "depth": depth, "size": size}.items():
            whole(self, option, value)
        for option, value in {"layerwise": layerwise, "softmax": softmax, "softmax_top_k": softmax_top_k}.items():
            yes_or_no(self, option, value)
        if not 0 <= dropout < 1:
            raise ValueError(f"XLoraRouter: dropout={dropout!r} must lie in [0, 1).")
        if softmax_top_k and top_k is None:
            raise ValueError("XLoraRouter: softmax_top_k has no effect without top_k.")
        self.hidden_size, self.depth, self.size, self.dropout = hidden_size, depth, size, float(dropout)
        self.layerwise, self.softmax, self.softmax_top_k, self.scale = layerwise, softmax, softmax_top_k, float(scale)
        self.mlp: nn.Sequential | None = None

    def _needed(self) -> dict[str, Any]:
        return {"hidden_size": self.hidden_size}

    def refuse(self, spot: Spot) -> None:
        super().refuse(spot)
        if spot.kind != "layer" or not spot.causal:
            raise ValueError(
                f"{self!r} weighs what adapters do at layers of a causal model, and {spot.path!r} is none."
            )

    def prepare(self, spots: Sequence[Spot]) -> None:
        for spot in spots:
            self.refuse(spot)
        count = 1 + max(child for spot in spots for child in spot.children)
        if self.layerwise and any(len(spot.children) < count for spot in spots):
            raise ValueError(f"{self!r} has gates for each layer, so that all of its adapters must have the same ones.")
        outputs = count * len(spots) if self.layerwise else count
        found = {spot.site: spot.described() for spot in spots}
        if self.mlp is not None and self.spots.keys() != found.keys():
            raise ValueError(f"{self!r} was made for other sites. Make a new one for this composition.")
        self.spots = found
        if self.mlp is None:
            inner: list[nn.Module] = []
            width = self.hidden_size
            for _ in range(self.depth - 1):
                inner += [nn.Linear(width, self.size), nn.ReLU(), nn.Dropout(self.dropout)]
                width = self.size
            like = next((p for s in spots for m in s.methods.values() for p in m[0].parameters()), torch.empty(0))
            wide = like.dtype if like.dtype == torch.float64 else torch.float32
            self.mlp = nn.Sequential(*inner, nn.Linear(width, outputs)).to(device=like.device, dtype=wide)

    def network(self, spot: Spot) -> nn.Module:
        assert self.mlp is not None
        return self.mlp

    def _chosen(self, at: Reading) -> dict[int, Tensor | float]:
        frame = current()
        states = None if frame is None else frame.first
        assert states is not None
        scores = self.network(self.spots[at.site])(as_parameters(states, self.network(self.spots[at.site])))
        shape = at.features.shape[:-1]
        if scores.shape[:2] != shape and not (len(shape) == 1 and shape[0] == scores.shape[:2].numel()):
            raise ValueError(
                f"{self!r} has gates for {tuple(scores.shape[:2])} tokens, and {at.site!r} has {tuple(shape)}: leave "
                "prompts out, and what has tokens of its own."
            )
        if self.layerwise:
            scores = scores.unflatten(-1, (len(self.spots), -1))[..., list(self.spots).index(at.site), :]
        gates = self.normalise(scores.reshape(*shape, -1))
        return {child: gates[..., child] for child in self.spots[at.site].children}

    def normalise(self, scores: Tensor) -> Tensor:
        gates = (scores / self.temperature).softmax(-1) if self.softmax else scores
        if self.top_k is not None:
            kept = torch.zeros_like(gates, dtype=torch.bool).scatter(-1, gates.topk(self.top_k, dim=-1).indices, True)
            lowest = gates.masked_fill(~kept, -torch.inf).softmax(-1) if self.softmax_top_k else gates
            gates = lowest.masked_fill(~kept, 0)
        return self.scale * gates


_ALL = (TokenRouter, PooledRouter, TaskRouter, Arrow, Fusion, XLoraRouter)
ROUTERS: dict[str, type[Router]] = {r.name: r for r in _ALL}
"""Every router by the name that it has in texts and files."""


def router_named(name: str, options: Mapping[str, Any]) -> Router:
    """A new router. Raises ValueError for a name or an option that is not known."""
    if name not in ROUTERS:
        raise ValueError(f"There is no router {name!r}.{did_you_mean(name, ROUTERS)} Known: {', '.join(ROUTERS)}.")
    known = ROUTERS[name].options
    for option in options:
        if option not in known:
            raise ValueError(
                f"{name} has no option {option!r}.{did_you_mean(option, known)} It reads: {', '.join(known)}."
            )
    try:
        return ROUTERS[name](**options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
