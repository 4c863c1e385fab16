import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod, is_plain
from ..core.method import WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class MissConfig(WeightConfig):
    """One small matrix, added to a layer's weight over and over."""

    kind = "MISS"
    foreign: ClassVar[Mapping[str, Any]] = {"bias": "none"}

    r: int = 64
    """Columns that are trained: the weight's columns have them in turns."""
    miss_dropout: float = 0.0
    """Share of the inputs to the change that are dropped while training."""
    mini_r: int = 1
    """With "mini": rows that are trained, which the weight's rows have in turns. A divisor of the outputs."""
    init_weights: bool | str = True
    """The form: True; "mini", with fewer rows; "bat", which multiplies the weight too (Bone's own). All of these start
    with no change; False: the first, random."""

    @property
    def method(self) -> str:
        return "BAT" if self.init_weights == "bat" else "MISS"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "mini_r")
        self.probability("miss_dropout")
        self.choice("init_weights", (True, False, "bat", "mini"))
        if self.mini_r != 1 and self.init_weights != "mini":
            raise ValueError("MissConfig: mini_r has no effect without init_weights='mini'.")
        if self.miss_dropout and self.init_weights == "bat":
            raise ValueError("MissConfig: miss_dropout has no effect with init_weights='bat', which has no input.")


@register(MissConfig)
class MiSS(LowRankMethod):
    """W' = W + D^T [I I ... I], D of r rows: w'_j = w_j + d_(j mod r)

    MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, Kang et al. 2024,
    arXiv:2409.15371. Features in excess of a multiple of r have the first rows of D. Use it where a LoRA's rate or
    start is hard to find: it has one matrix, and begins at zero. Parameters per site: r O; r mini_r with "mini".
    """

    def __init__(self, config: MissConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.outputs, self.inner = layer.shape[0], layer.shape[1:]
        self.dropout, self.widens = config.miss_dropout, not is_plain(layer.module)
        rows = config.mini_r if config.init_weights == "mini" else self.outputs
        if self.outputs % rows or config.r > math.prod(self.inner):
            raise ValueError(
                f"MiSS: {layer.path!r} has {math.prod(self.inner)} features and {self.outputs} outputs: r={config.r} "
                f"must be no more than the first, and mini_r={config.mini_r} a divisor of the second."
            )
        self.D = nn.Parameter(torch.zeros(config.r, rows))  # (R, O)
        if config.init_weights is False:
            nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        r, features = len(self.D), math.prod(self.inner)
        turns = torch.eye(r, dtype=self.D.dtype, device=self.D.device).repeat(1, -(-features // r))[:, :features]
        return turns.view(r, *self.inner), self.D.repeat(1, self.outputs // self.D.shape[1]).mT, 1.0


@register(MissConfig, variant="BAT")
class Bat(WeightMethod):
    """W'_ij = W_ij + W_ij D_i + D_i for each block of r by r entries

    The form "bat" of the same paper, which was called Bone before, arXiv:2409.15371. It multiplies the weight, so that
    a call makes one anew. Use it where MiSS falls short. Parameters per site: r O.
    """

    widens = False

    def __init__(self, config: MissConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        outputs, features, r = layer.shape[0], math.prod(layer.shape[1:]), config.r
        if outputs % r or features % r:
            raise ValueError(
                f"MiSS: with init_weights='bat', r={r} must divide the {features} features and the {outputs} outputs "
                f"of {layer.path!r}."
            )
        self.D = nn.Parameter(torch.zeros(outputs // r, r, r))  # (O / R, R, R)

    def change(self, weight: Tensor) -> Tensor:
        r = self.D.shape[-1]
        blocks = weight.reshape(len(self.D), r, -1, r).transpose(1, 2)  # (O / R, I / R, R, R)
        blocks = blocks.to(self.D.dtype) @ self.D[:, None] + self.D[:, None]
        return blocks.transpose(1, 2).reshape(weight.shape)

    def merge(self, weight: Tensor) -> Tensor:
        return weight + self.change(weight)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        return y + base.apply(x, self.change(base.weight())).to(y.dtype)  # apart: W' in half precision loses it
