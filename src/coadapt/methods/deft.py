from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.layer import Layer
from ..core.lowrank import is_plain
from ..core.method import WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class DeftConfig(WeightConfig):
    """Some directions of a layer's output, taken out of the weight and made anew."""

    kind = "DEFT"
    foreign: ClassVar[Mapping[str, Any]] = {"bias": "none"}

    r: int = 8
    """How many directions; no more than the layer has outputs."""
    decomposition_method: str = "relu"
    """How P takes them out: "relu", P relu(P)^T; "qr", the orthogonal projection on what P spans."""
    alpha: int | None = None
    """Scale of what comes in: it is multiplied by alpha / r; 1 if left out."""
    para: bool = False
    """Only take out, put nothing in: PaRa."""
    fan_in_fan_out: bool = False
    """A check: True is refused where no target stores its weight transposed, as GPT-2's Conv1D does."""
    deft_dropout: float = 0.0
    """Share of the inputs to R that are dropped while training."""
    init_weights: bool = True
    """True: what comes in is what is taken out, so that nothing changes at the start; False: random."""
    init_scale: float = 1.0
    """With `init_weights=False`: R starts with a spread of 0.02 times this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "alpha")
        self.choice("decomposition_method", ("relu", "qr"))
        self.probability("deft_dropout")
        for name, default in (("alpha", None), ("deft_dropout", 0.0)):
            if self.para and getattr(self, name) != default:
                raise ValueError(f"DeftConfig: {name} has no effect with para=True, which puts nothing in.")
        if self.init_scale != 1.0 and (self.init_weights or self.para):
            raise ValueError("DeftConfig: init_scale has no effect but with init_weights=False and para=False.")


@register(DeftConfig)
class DEFT(WeightMethod):
    """W' = W - Q V^T W + s Q R, with Q = P, V = relu(P), or Q = V = the orthonormal factor of P

    DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, Kumar et al. 2025, arXiv:2509.22793; without
    R: PaRa: Personalizing Text-to-Image Diffusion via Parameter Rank Reduction, Chen et al. 2024, arXiv:2406.05641.
    What is taken out is taken out of what the layer gives, so a call costs what a LoRA does. Use it where a few outputs
    should be learnt anew and the rest forgotten as little as possible. Parameters per site: r (O + I K); r O with
    `para`.
    """

    widens = False

    def __init__(self, config: DeftConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        outputs, *inner = layer.shape
        r = min(config.r, outputs)
        self.scale = 1.0 if config.alpha is None else config.alpha / r
        self.orthogonal, self.dropout = config.decomposition_method == "qr", config.deft_dropout
        self.P = nn.Parameter(0.02 * torch.randn(outputs, r))  # (O, R)
        self.R: nn.Parameter | None = None  # (R, I, *K)
        if config.para:
            return
        weight = layer.weight()
        if config.init_weights and not weight.is_meta:
            taken = self.sides()[1].detach().to(weight.device).mT @ weight.flatten(1).to(torch.float32)
            self.R = nn.Parameter(taken.view(r, *inner) / self.scale)
        else:
            self.R = nn.Parameter(0.02 * config.init_scale * torch.randn(r, *inner))

    def sides(self) -> tuple[Tensor, Tensor]:
        """Q and V, (O, R) each."""
        p = self.P.to(torch.promote_types(self.P.dtype, torch.float32))
        if self.orthogonal:
            q = torch.linalg.qr(p)[0]
            return q, q
        return p, torch.relu(p)

    def merge(self, weight: Tensor) -> Tensor:
        q, v = self.sides()
        flat = weight.flatten(1).to(q.dtype)
        put = 0 if self.R is None else self.scale * self.R.flatten(1)
        return weight + (q @ (put - v.mT @ flat)).view(weight.shape)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if not is_plain(base.module):  # its outputs do not see the same inputs
            return super().forward(x, base)
        y, bias, (q, v) = base(x), base.bias, self.sides()
        product = y if bias is None else y - base.along_channels(bias.to(y.dtype), y)
        moved = -base.mix(product, v.mT.to(y.dtype))
        if self.R is not None:
            dropped = F.dropout(x, self.dropout, self.training) if x.is_floating_point() else x
            moved = moved + self.scale * base.apply(dropped, self.R.to(y.dtype))
        return y + base.mix(moved, q.to(y.dtype))
