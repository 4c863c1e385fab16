from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.layer import Layer
from ..core.method import register
from .vera import Vectors, VectorsConfig


@dataclass(frozen=True, kw_only=True)
class PveraConfig(VectorsConfig):
    """VeRA whose inner values are drawn from a normal distribution that depends on the input."""

    kind = "PVERA"
    unread: ClassVar[Mapping[str, str]] = {"generator_seed": "numbers are drawn as torch draws; torch.manual_seed(...)"}

    pvera_dropout: float = 0.0
    """Share of the inputs to A that are dropped while training."""
    sample_at_inference: bool = False
    """Draw also when not training, as for intervals; otherwise the mean is taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.probability("pvera_dropout")


@register(PveraConfig)
class PVeRA(Vectors):
    """y = base(x) + b * B z, z ~ N(m, exp(v)), [m; v] = d * A x; merged W' = W + diag(b) B diag(d_m) A_m

    PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, 2025, arXiv:2512.07703. Draws while training, and takes
    the mean otherwise. The draws come from torch's generator, which checkpointing rewinds: peft's `generator_seed`
    makes one that nobody rewinds, so that recomputed layers would see other numbers, and is not read. Use it for VeRA
    with little data, or where the spread of answers is wanted. Parameters per site: O + 2 r.
    """

    kinds = ("linear", "embedding")
    by_factors = False
    needs_call = "it draws what it adds in each call"
    rows = 2  # those of the mean, then those of the variance

    def __init__(self, config: PveraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.dropout, self.draws, self.widens = config.pvera_dropout, config.sample_at_inference, False

    def factors(self) -> tuple[Tensor, Tensor, float]:
        a, b = self.scaled()
        return a[: len(a) // 2], b, 1.0

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if not self.training and not self.draws:
            return super().forward(x, base)
        y = base(x)
        x = F.dropout(x, self.drops) if x.is_floating_point() else x
        a, b = (t.to(x.dtype if x.is_floating_point() else y.dtype) for t in self.scaled())
        mean, log_variance = base.kind.apply(base.module, x, a).chunk(2, dim=-1)  # (..., R)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return y + F.linear(z, b).to(y.dtype)
