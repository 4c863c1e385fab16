import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import BiasConfig, TransposedConfig
from ..core import target
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod
from ..core.method import Place, register
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class GraloraConfig(BiasConfig, TransposedConfig):
    """The weight in k x k blocks, each with a LoRA of rank r / k of its own."""

    kind = "GRALORA"

    r: int = 32
    """Rank of all blocks of a row together: as many parameters as a LoRA of this rank has."""
    gralora_k: int = 2
    """Blocks along each side; must divide r, and the sizes of the targets. 2 up to r = 32, 4 from r = 64 on."""
    hybrid_r: int = 0
    """Rank of a plain LoRA beside the blocks."""
    alpha: int | float = 64
    """Scale of the change: it is multiplied by alpha / (r + hybrid_r)."""
    gralora_dropout: float = 0.0
    """Share of the inputs that are dropped while training."""
    init_weights: bool = True
    """True: all B start at zero, so that nothing changes; False: all random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "gralora_k")
        if self.hybrid_r:
            self.positive("hybrid_r")
        self.probability("gralora_dropout")
        if self.r % self.gralora_k:
            raise ValueError(f"GraloraConfig: gralora_k={self.gralora_k} does not divide r={self.r}.")


@register(GraloraConfig)
class GraLoRA(WithBiases, LowRankMethod):
    """W'_ij = W_ij + (alpha / r) B_ij A_ij for each of k x k blocks; with a LoRA beside them W' + (alpha / r) B A

    GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, Jung et al. 2025, arXiv:2505.20355. All
    blocks together are two factors of rank k r that hold zeros, so it costs what a LoRA of rank k r does. The plain
    LoRA drops the same inputs as the blocks; in peft each drops its own. Use it where a LoRA stops gaining from a
    higher rank. Parameters per site: (r + hybrid_r) (O + I K).
    """

    def __init__(self, config: GraloraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        out_features, self.shape, k, r = layer.shape[0], layer.shape[1:], config.gralora_k, config.r
        in_features = math.prod(self.shape)
        self.scale = config.alpha / (r + config.hybrid_r)
        self.dropout = config.gralora_dropout
        self.A = _random(k, r, in_features // k, blocks=True)  # (blocks of I, I / k, R)
        self.B = _random(k, out_features // k, r, blocks=True)  # (blocks of O, R, O / k)
        self.A_all = _random(config.hybrid_r, in_features) if config.hybrid_r else None  # (R', I)
        self.B_all = _random(out_features, config.hybrid_r) if config.hybrid_r else None  # (O, R')
        if config.init_weights:
            for b in (self.B, self.B_all):
                nn.init.zeros_(b) if b is not None else None

    @classmethod
    def places(cls, config: GraloraConfig, base: nn.Module) -> list[Place]:
        places = super().places(config, base)
        target.check_divides(config, "gralora_k", places)
        return places

    def factors(self) -> tuple[Tensor, Tensor, float]:
        k, rank = len(self.A), self.A.shape[2] // len(self.A)
        a = torch.block_diag(*self.A.mT)  # (k k R/k, I): by block of I, then by block of O
        b = self.B.view(k, k, rank, -1)  # (block of O, block of I, R/k, O/k)
        apart = torch.eye(k, dtype=b.dtype, device=b.device)
        b = torch.einsum("jnso,jm->jonms", b, apart).reshape(-1, len(a))  # (O, k k R/k)
        if self.A_all is not None and self.B_all is not None:
            a, b = torch.cat([a, self.A_all]), torch.cat([b, self.B_all], dim=1)
        return a.view(-1, *self.shape), b, self.scale


def _random(*sizes: int, blocks: bool = False) -> nn.Parameter:
    """Uniform as LoRA's A is; of blocks each by itself, and turned."""
    made = torch.empty(sizes)
    for one in made if blocks else (made,):
        nn.init.kaiming_uniform_(one, a=math.sqrt(5))
    return nn.Parameter(made.mT.contiguous() if blocks else made)
