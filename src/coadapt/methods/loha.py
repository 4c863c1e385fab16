import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LycorisConfig
from ..core import target
from ..core.layer import Known, Layer
from ..core.lowrank import LowRankMethod
from ..core.method import register


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """W' = W + (alpha / r) (B1 A1) * (B2 A2) at the layers that are targeted, * entry by entry."""

    kind = "LOHA"

    init_weights: bool = True
    """True: A2 starts at zero, so that nothing changes; False: all random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice("init_weights", (True, False))


@register(LoHaConfig)
class LoHa(LowRankMethod):
    """W' = W + (alpha / r) (B1 A1) * (B2 A2)

    FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, Hyeon-Woo et al. 2021,
    arXiv:2108.06098; for adapters in LyCORIS, Yeh et al. 2023, arXiv:2309.14859. An entrywise product of two matrices
    of rank r has rank r^2, and its factors are the products of all pairs of columns and of rows. So the change is
    applied without being made, up to the r at which that costs more; peft makes it in every call. `rank_dropout`
    scales up what it keeps, as in peft, which divides by zero where it keeps nothing. Use it where few parameters are
    to make a change of high rank. Parameters per site: 2 r (O + I K); with a core tensor 2 r (O + I + r K).
    """

    def __init__(self, config: LoHaConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        out_features, self.shape = layer.shape[0], layer.shape[1:]  # (I, *K)
        r = target.matching(config.rank_pattern, layer.path, config.r)
        self.scale = target.matching(config.alpha_pattern, layer.path, config.alpha) / r
        self.drop = config.rank_dropout, config.module_dropout
        self.by_factors = self.drop == (0, 0)
        in_features, *kernel = self.shape
        core = config.use_effective_conv2d and math.prod(kernel) > 1
        up, down = (out_features, r), (r, in_features if core else math.prod(self.shape))
        self.B1, self.B2 = (nn.Parameter(torch.empty(up[::-1] if core else up)) for _ in "12")  # (O, R); with T (R, O)
        self.A1, self.A2 = (nn.Parameter(torch.empty(down)) for _ in "12")  # (R, I K); with T (R, I)
        self.T1, self.T2 = (nn.Parameter(torch.empty(r, r, *kernel)) if core else None for _ in "12")  # (R, R, *K)
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.A2)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        (b1, a1), (b2, a2) = _two(self.B1, self.T1, self.A1), _two(self.B2, self.T2, self.A2)
        if len(a1) ** 2 < min(len(b1), a1.shape[1]):
            b = (b1[:, :, None] * b2[:, None]).flatten(1)  # (O, R R)
            a = (a1[:, None] * a2).flatten(0, 1)  # (R R, I K)
        else:
            b, a = torch.eye(len(b1), dtype=b1.dtype, device=b1.device), (b1 @ a1) * (b2 @ a2)
        return a.view(-1, *self.shape), b, self.scale

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        changed = super().forward(x, Known(base, x, y))
        return thinned(y, changed, base, *self.drop, True) if self.training else changed


def _two(b: Tensor, core: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor]:
    """(O, R) and (R, I K), whose product a pair is, with or without a core tensor."""
    return (b, a) if core is None else (b.mT, torch.einsum("pq...,qi->pi...", core, a).flatten(1))


def thinned(y: Tensor, changed: Tensor, base: Layer, features: float, whole: float, scale: bool) -> Tensor:
    """What a layer gives while training: `changed`, and y where the change is dropped.

    Args:
        features: share of the output features that are dropped.
        whole: how often all are.
        scale: whether the features that are kept are scaled up.
    """
    if not features and not whole:
        return changed
    options: dict[str, Any] = {"device": y.device, "dtype": y.dtype}
    kept = torch.rand(base.shape[0], **options).ge(features).to(y.dtype)  # (O,)
    kept = kept / kept.mean().clamp(min=1 / len(kept)) if scale else kept
    return y + (changed - y) * base.along_channels(kept * torch.rand((), **options).ge(whole), y)
