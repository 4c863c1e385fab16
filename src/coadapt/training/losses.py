"""The loss of rows that train different adapters: for each adapter, the mean over its own trained tokens.

Data sets that train an adapter in common are a group. With S_d the sum of the losses of a data set's trained tokens,
and N_d their number, both over all batches that a step is made of,

    L = sum_g  (sum_(d in g) S_d) / (sum_(d in g) N_d)

Rows reach the adapters of their own composition and no others, so an adapter that all data sets of its group use gets
from L the gradient of the mean over its own tokens, as in a run without the other groups. The gradient of one that only
some of them use is multiplied by sum_(d in g) N_d / sum_(d uses it) N_d, which makes it that, too.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def groups(uses: Sequence[Collection[str]]) -> list[int]:
    """Of each data set, the first one of its group. `uses`: the adapters that each trains."""
    group = list(range(len(uses)))
    for one in range(len(uses)):
        for other in range(one):
            if group[one] != group[other] and set(uses[one]) & set(uses[other]):
                low, high = sorted((group[one], group[other]))
                group = [low if g == high else g for g in group]
    return group


@dataclass(frozen=True)
class Window:
    """The batches that one step is made of."""

    tokens: tuple[float, ...]
    """Of each data set."""
    of_group: tuple[float, ...]
    """Of each data set's group."""
    factors: Mapping[str, float]
    """Adapter -> what its gradient is multiplied by, where that is not 1."""

    def loss(self, losses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The part of L that some of its rows make up, and that of each data set's own mean, (D,), without a graph.

        Args:
            losses: (B,) what `row_losses` gives.
            rows: (B,) the data set of each row.
        """
        weights = losses.new_tensor([1 / n if n else 0.0 for n in self.of_group])
        means = torch.zeros(len(self.tokens), dtype=losses.dtype, device=losses.device)
        means.index_add_(0, rows, losses.detach())
        return (losses * weights[rows]).sum(), means / losses.new_tensor([n or 1.0 for n in self.tokens])


def window(tokens: Sequence[float], uses: Sequence[Collection[str]]) -> Window:
    """The norms of a step with so many trained tokens of each data set, whose rows train these adapters."""
    group = groups(uses)
    of_group = [sum(n for n, g in zip(tokens, group, strict=True) if g == mine) for mine in group]
    factors: dict[str, float] = {}
    for adapter in dict.fromkeys(name for names in uses for name in names):
        mine = [d for d, names in enumerate(uses) if adapter in names]
        if (own := sum(tokens[d] for d in mine)) and own != of_group[mine[0]]:
            factors[adapter] = of_group[mine[0]] / own
    return Window(tuple(tokens), tuple(of_group), factors)
