"""Mixed batches at a linear layer: the factors of each row's adapters, stacked, multiplied in one batched product."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .store import stamp

WORTH = 4
"""Up to so many times the rank of one row, it costs less to multiply all rows by all adapters side by side and to mask
what is not theirs (benchmarks/, one thread of a Xeon: 16 rows, rank 8)."""


def worth(uses: Sequence[Sequence[Any]], ups: Sequence[Tensor]) -> bool:
    """Whether stacking pays, for the B (O, R) of all that is used. False where the factors are not of one matrix."""
    if any(up.dim() != 2 for up in ups):
        return False
    ranks = [up.shape[1] for up in ups]
    return sum(ranks) > WORTH * max(map(len, uses)) * max(ranks)


class RowFactors:
    """What each of a plan's compositions has at one layer, where all gates are numbers.

    Args:
        uses: for each composition the methods and, for each of them, its gate times its scale.
    """

    def __init__(self, uses: Sequence[Sequence[tuple[Any, float]]]) -> None:
        self.uses = uses
        self.most = max(map(len, uses))
        self._kept: tuple[Any, Any] | None = None

    def _used(self, rows: Sequence[int]) -> list[Any]:
        """The methods of these rows, each once; a plan can have more."""
        return list({id(m): m for c in dict.fromkeys(rows) for m, _ in self.uses[c]}.values())

    def stacked(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | float]:
        """A (B, R, I), B (B, O, R) and the gate, for rows that use these compositions."""
        blank = next((m, 0.0) for found in self.uses for m, _ in found)  # a row without any: gated by 0
        each = [[*self.uses[c], *[blank] * (self.most - len(self.uses[c]))] for c in rows]
        used = {id(m): m for row in each for m, _ in row}
        factors = {k: m.factors()[:2] for k, m in used.items()}
        rank = max(b.shape[1] for _, b in factors.values())
        downs = {k: F.pad(a, (0, 0, 0, rank - a.shape[0])) if len(a) < rank else a for k, (a, _) in factors.items()}
        ups = {k: F.pad(b, (0, rank - b.shape[1])) if b.shape[1] < rank else b for k, (_, b) in factors.items()}
        down = torch.cat([downs[id(m)] for row in each for m, _ in row]).view(len(each), self.most * rank, -1)
        up = torch.stack(
            [torch.cat([ups[id(m)] for m, _ in row], 1) if len(row) > 1 else ups[id(row[0][0])] for row in each]
        )
        numbers = [[g for _, g in row] for row in each]
        first = numbers[0][0]
        if all(g == first for row in numbers for g in row):
            return down, up, first
        gate = torch.tensor(numbers, dtype=down.dtype, device=down.device).repeat_interleave(rank, 1)
        return down, up, gate[:, None]  # (B, 1, R)

    def kept(self, rows: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (B, R, I) and g B^T (B, R, O) for calls without a backward; of frozen adapters from the last call.

        They are made again where PyTorch has counted a change in place, or one has another place in memory.
        """
        used = self._used(rows)
        state = [stamp(t) for m in used for t in m._parameters.values()]
        key = rows, dtype, state
        kept = self._kept  # another thread may release it
        if kept is not None and kept[0] == key:
            return kept[1]  # type: ignore[no-any-return]
        down, up, gate = self.stacked(rows)
        up_t = up.mT * gate.mT if isinstance(gate, Tensor) else up.mT * gate
        made = down.to(dtype), up_t.to(dtype).contiguous()
        if None not in state and all(map(_is_settled, used)):
            self._kept = key, made
        return made

    def release(self) -> None:
        """Gives up what `kept` keeps."""
        self._kept = None


def _is_settled(method: Any) -> bool:
    """Whether its factors are frozen parameters, and not made anew in each call."""
    own = {id(p) for p in method._parameters.values()}
    return all(id(t) in own and not t.requires_grad for t in method.factors()[:2])
