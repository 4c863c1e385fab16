"""Examples of unequal length as one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coadapt.data.tokens import IGNORED


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads on the right: `input_ids` with the pad token, `labels` with -100, everything else with 0.

    What is padding is told by lengths alone, so that an end-of-sequence token that also pads is still trained on.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        return {key: _stack([e[key] for e in examples], fill.get(key, 0)) for key in examples[0]}


def _stack(values: Sequence[Any], fill: int) -> Tensor:
    if not isinstance(values[0], Sequence | Tensor):
        return torch.tensor(values)  # [B]
    longest = max(len(v) for v in values)
    return torch.tensor([[*v, *[fill] * (longest - len(v))] for v in values])  # [B, T]
