from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PeftConfig
from ..core import roles
from ..core.activation import activations
from ..core.layer import Layer
from ..core.method import ModuleMethod, Place, register
from ..core.orthonormal import orthonormal
from ..core.pooling import order_in_row
from ..core.precision import linear
from ..core.routing import stream_of


@dataclass(frozen=True, kw_only=True)
class ReftConfig(PeftConfig):
    """Edits of what layers give, at a few of the first and last tokens of each row, in a small subspace."""

    kind = "REFT"

    layers: Sequence[int] | str = "all"
    """"all", or the numbers of the layers behind which it stands; an encoder's come before its decoder's."""
    prefix_positions: int = 3
    """How many of a row's first tokens are edited, padding not counted."""
    suffix_positions: int = 0
    """How many of its last; while a causal model generates, with a cache, the last of what it was given."""
    r: int = 1
    """R, the size of the subspace."""
    orthogonality: bool = True
    """Keep the rows of R orthonormal."""
    subtract_projection: bool = True
    """Replace what is in the subspace; otherwise it is added to."""
    tied_weights: bool = False
    """First and last tokens share one edit."""
    dropout: float = 0.05
    """Share of the edits that are dropped while training."""
    non_linearity: str | None = None
    """Of W h + b; any activation that transformers knows by name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("dropout")
        if self.layers != "all" and (isinstance(self.layers, str) or not self.layers):
            raise ValueError(f"{type(self).__name__}: layers={self.layers!r} is neither 'all' nor a list of numbers.")
        if self.non_linearity is not None:
            self.choice("non_linearity", tuple(activations()))
        if min(self.prefix_positions, self.suffix_positions) < 0 or not self.prefix_positions + self.suffix_positions:
            raise ValueError(
                f"{type(self).__name__}: prefix_positions={self.prefix_positions} and suffix_positions="
                f"{self.suffix_positions} name no token; at least one of them is above 0, and none below."
            )
        both = self.prefix_positions and self.suffix_positions
        self.no_effect("tied_weights", not both, "without positions of both kinds")


@dataclass(frozen=True, kw_only=True)
class LoReftConfig(ReftConfig):
    """LoReFT: ReFT as published, with orthonormal rows."""


@dataclass(frozen=True, kw_only=True)
class NoReftConfig(ReftConfig):
    """NoReFT: the same with any rows."""

    orthogonality: bool = False


@dataclass(frozen=True, kw_only=True)
class DiReftConfig(ReftConfig):
    """DiReFT: any rows, and the edit is added."""

    orthogonality: bool = False
    subtract_projection: bool = False


class Edit(nn.Module):
    """h -> R^T (act(W h + b) - R h), (..., D)."""

    def __init__(self, config: ReftConfig, width: int) -> None:
        super().__init__()
        self.source = nn.Linear(width, config.r)  # W (R, D) and b
        self.R = nn.Parameter(torch.randn(config.r, width) / width**0.5)  # (R, D)
        self.orthogonal, self.subtracts = config.orthogonality, config.subtract_projection
        self.act = activations()[config.non_linearity] if config.non_linearity else nn.Identity()

    def rows(self) -> Tensor:
        """(R, D), orthonormal if asked."""
        return orthonormal(self.R) if self.orthogonal else self.R

    def forward(self, h: Tensor) -> Tensor:
        rows = self.rows().to(h.dtype)
        made = self.act(linear(self.source, h))
        return (made - F.linear(h, rows) if self.subtracts else made) @ rows


@register(ReftConfig)
class Reft(ModuleMethod):
    """h + R^T (W h + b - R h) at the first and the last tokens, h = base(x)

    ReFT: Representation Finetuning for Language Models, Wu et al. 2024, arXiv:2404.03592; without the second term, and
    with any R: DiReFT. Padding and virtual tokens are not counted. Dropout is of the edit. Use it where very few
    parameters are to be stored. Parameters per site: 2 r D + r for first and for last tokens.
    """

    widens = False
    reads_tokens = True

    def __init__(self, config: ReftConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        width = layer.width
        assert width is not None
        self.stream, self.dropout = layer.role, config.dropout
        self.counts = config.prefix_positions, config.suffix_positions
        self.reads_last = config.suffix_positions > 0
        self.first = Edit(config, width) if self.counts[0] else None
        self.last = Edit(config, width) if self.counts[1] and not config.tied_weights else None

    @classmethod
    def places(cls, config: ReftConfig, base: Any) -> list[Place]:
        blocks = roles.blocks(base)
        wanted = range(len(blocks)) if isinstance(config.layers, str) else config.layers
        if not blocks or any(not 0 <= n < len(blocks) for n in wanted):
            found = f"{len(blocks)} layers, numbered from 0" if blocks else "no layers with attention"
            raise ValueError(f"{type(config).__name__}: layers={config.layers!r}; {type(base).__name__} has {found}.")
        return [
            Place(b.path, base.get_submodule(b.path), role=stream_of(base, b.path)) for b in (blocks[n] for n in wanted)
        ]

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        h = base(x)
        after, before = order_in_row(self.stream, h)  # (B, T): how many real tokens stand before each, and behind
        out = h
        for edit, at in ((self.first, after < self.counts[0]), (self.last or self.first, before < self.counts[1])):
            if edit is not None:
                out = torch.where(at[..., None], h + F.dropout(edit(h), self.dropout, self.training), out)
        return out
