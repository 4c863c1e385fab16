"""The ways to combine: what each is called, the options that it takes, and what it does to changes of weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import did_you_mean
from ..core.adapter import Adapter
from ..core.composition import Node

Rank = int | float | Literal["full"]


@dataclass(frozen=True)
class Way:
    """A way to combine. `vote` makes one change out of weighted ones, where that is not their sum."""

    takes: frozenset[str]
    needs: frozenset[str] = frozenset()
    vote: "Callable[[Sequence[Tensor], Voting], Tensor] | None" = None


@dataclass(frozen=True)
class Voting:
    """What the votes need besides the changes."""

    density: float
    majority_sign: str
    generator: torch.Generator


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked for."""

    base: nn.Module
    adapters: Mapping[str, Adapter]
    """Those that `node` names."""
    node: Node
    """With numbers for gates, none of them 0."""
    how: str | None
    name: str
    """Of the new adapter."""
    options: "Options"
    common: Mapping[str, Any]
    """The fields that the new configuration has, whatever its method."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of all ways; each way refuses those that it does not take."""

    r: Rank | None = None
    """Rank of the result, at most; "full" for as much as it takes to be exact; a share in (0, 1), as 0.99, for the
    least rank at each site that keeps so much of the change (of the sum of the squares of its numbers)."""
    density: float | None = None
    """Share of each adapter's numbers at a site that is kept, in (0, 1]."""
    majority_sign: str | None = None
    """"total": the sign of the sum decides; "frequency": the sign that most adapters have."""
    seed: int | None = None
    """Of what DARE drops; 0 if left out."""

    def check(self, how: str | None) -> None:
        """Raises ValueError for an unknown way, and for options that are missing, out of range, or without effect."""
        if how is not None and how not in WAYS:
            raise ValueError(f"There is no way to combine called {how!r}.{did_you_mean(how, WAYS)} {ways_text()}")
        given = {name for name, value in vars(self).items() if value is not None}
        takes = WAYS[how].takes if how is not None else frozenset[str]()
        if idle := sorted(given - takes):
            raise ValueError(f"{', '.join(idle)} has no effect with how={how!r}. {ways_text()}")
        if how is not None and (missing := sorted(WAYS[how].needs - given)):
            raise ValueError(f"how={how!r} needs {' and '.join(f'{name}=' for name in missing)}. {ways_text()}")
        whole = type(self.r) is int and self.r >= 1
        if self.r is not None and self.r != "full" and not whole and not (type(self.r) is float and 0 < self.r < 1):
            raise ValueError(f"r={self.r!r} must be a whole number of at least 1, a share in (0, 1), or 'full'.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r} is the share of numbers that is kept; it must lie in (0, 1].")
        if self.majority_sign not in (None, "total", "frequency"):
            raise ValueError(f"majority_sign={self.majority_sign!r} must be 'total' or 'frequency'.")

    @property
    def voting(self) -> Voting:
        generator = torch.Generator().manual_seed(self.seed or 0)
        return Voting(self.density or 1.0, self.majority_sign or "total", generator)


def trimmed(change: Tensor, density: float) -> Tensor:
    """The `density` of all numbers that are largest in magnitude; 0 elsewhere."""
    kept = change.abs().flatten().topk(max(1, int(density * change.numel()))).indices
    return torch.zeros_like(change).flatten().index_copy(0, kept, change.flatten()[kept]).view(change.shape)


def dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each number kept with the probability `density` and divided by it; 0 elsewhere."""
    kept = torch.rand(change.shape, generator=generator) < density  # on the CPU: the same on every device
    return change * kept.to(change.device) / density


def elected(changes: Sequence[Tensor], majority_sign: str) -> Tensor:
    """The mean, number by number, of those changes that have the majority's sign there."""
    stack = torch.stack(list(changes))
    votes = stack if majority_sign == "total" else stack.sign()
    sign = torch.where(votes.sum(0) >= 0, 1, -1)
    agree = stack.sign() == sign
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def _ties(changes: Sequence[Tensor], how: Voting) -> Tensor:
    return elected([trimmed(c, how.density) for c in changes], how.majority_sign)


def _dare_linear(changes: Sequence[Tensor], how: Voting) -> Tensor:
    return torch.stack([dropped(c, how.density, how.generator) for c in changes]).sum(0)


def _dare_ties(changes: Sequence[Tensor], how: Voting) -> Tensor:
    return elected([dropped(c, how.density, how.generator) for c in changes], how.majority_sign)


def _magnitude_prune(changes: Sequence[Tensor], how: Voting) -> Tensor:
    return torch.stack([trimmed(c, how.density) for c in changes]).sum(0)


def _way(takes: str = "", needs: str = "", vote: "Callable[[Sequence[Tensor], Voting], Tensor] | None" = None) -> Way:
    return Way(frozenset(takes.split() + needs.split()), frozenset(needs.split()), vote)


WAYS: dict[str, Way] = {
    "cat": _way(),
    "svd": _way(needs="r"),
    "linear": _way("r"),
    "mean": _way("r"),
    "ties": _way("r majority_sign", "density", _ties),
    "dare_linear": _way("r seed", "density", _dare_linear),
    "dare_ties": _way("r majority_sign seed", "density", _dare_ties),
    "magnitude_prune": _way("r", "density", _magnitude_prune),
    "ab_linear": _way(),
}
"""Every way by its name. TIES: arXiv:2306.01708. DARE: arXiv:2311.03099."""


def ways_text() -> str:
    """The ways and their options in one sentence, for error messages."""
    told: list[str] = []
    for name, way in WAYS.items():
        options = [f"{n}=" if n in way.needs else f"[{n}=]" for n in sorted(way.takes)]
        told.append(f"{name}({', '.join(options)})" if options else name)
    return f"There are: {', '.join(told)}."
