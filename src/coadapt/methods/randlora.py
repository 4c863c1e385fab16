import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import BiasConfig, TransposedConfig
from ..core import target
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod
from ..core.method import Place, register
from ..core.seeded import Seeded
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class RandLoraConfig(BiasConfig, TransposedConfig):
    """W' = W + (alpha / r) sum_n B_n diag(l_n) A diag(g_n) at the targets; A and all B_n are random and frozen."""

    kind = "RANDLORA"

    r: int = 32
    """Rank of each basis: the lower, the more of them are there, and the more trains."""
    randlora_alpha: int | float = 640
    """Scale of the change: it is multiplied by alpha / r. Usually 20 r; lower where training is not stable."""
    randlora_dropout: float = 0.0
    """Share of the inputs to the bases that are dropped while training."""
    projection_prng_key: int = 0
    """Seed of the bases."""
    save_projection: bool = True
    """Whether files hold the bases. False: they are made again from the seed."""
    sparse: bool = False
    """Bases of -1, 0 and 1, of which two thirds are 0."""
    very_sparse: bool = False
    """The same, with 1 - 1 / sqrt(D) of them 0, D the smaller side of the largest target."""
    init_weights: bool = True
    """True: all l start at zero, so that nothing changes; False: random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("randlora_dropout")
        if self.sparse and self.very_sparse:
            raise ValueError("RandLoraConfig: sparse has no effect beside very_sparse; choose one.")


@register(RandLoraConfig)
class RandLoRA(WithBiases, LowRankMethod):
    """W' = W + (alpha / r) sum_n B_n diag(l_n) A diag(g_n), n = 1 ... min(O, I) / r, rounded up

    RandLoRA: Full-rank parameter-efficient fine-tuning of large models, Albert et al. 2025, arXiv:2502.00987. Where
    O < I the sum is transposed, so that what trains lies on the smaller side. The bases are made in bfloat16, as in
    peft, and then used in full precision. Use it for changes of full rank with fewer numbers than a full matrix; it
    computes as much as one. Parameters per site: (r + min(O, I)) min(O, I) / r.
    """

    def __init__(self, config: RandLoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.sizes, self.shape = (layer.shape[0], math.prod(layer.shape[1:])), layer.shape[1:]
        self.dropout, self.scale = config.randlora_dropout, config.randlora_alpha / config.r
        least = min(self.sizes)
        n = math.ceil(least / config.r)
        self.L = nn.Parameter(torch.zeros(config.r, n) if config.init_weights else torch.randn(config.r, n))  # (R, N)
        start = max(n, least) if config.init_weights else max(self.sizes)
        self.G = nn.Parameter(torch.full((n, least), 1 / start))  # (N, min(O, I))

    @classmethod
    def shared(cls, config: RandLoraConfig, base: nn.Module, places: list[Place]) -> Seeded:
        least, most = sorted(target.largest(places))
        sparsity = math.sqrt(least) if config.very_sparse else 3.0 if config.sparse else 0.0
        make = functools.partial(_bases, config.projection_prng_key, config.r, least, most, sparsity)
        return Seeded(make, config.save_projection)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        n = len(self.G)
        one = self.bank.at("A", self.L)[:, :n, : min(self.sizes)]  # (R, 1, min(O, I)): the same for all n
        other = self.bank.at("B", self.L)[: max(self.sizes), :n].flatten(1)  # (max(O, I), R N): the columns of all B_n
        small = (self.L[:, :, None] * one * self.G).flatten(0, 1)  # (R N, min(O, I))
        a, b = (small, other) if self.sizes[1] == min(self.sizes) else (other.mT, small.mT)
        return a.reshape(-1, *self.shape), b, self.scale


def _bases(seed: int, r: int, least: int, most: int, sparsity: float) -> dict[str, Tensor]:
    """A (R, 1, min(O, I)) and all B (max(O, I), N, R), of spread 1. `sparsity`: 1 of that many is not 0; 0 for all."""
    generator, n = torch.Generator().manual_seed(seed), math.ceil(least / r)

    def uniform(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16)
        return nn.init.kaiming_uniform_(made, a=math.sqrt(5), generator=generator)

    def ternary(*shape: int) -> Tensor:
        drawn, share = torch.rand(shape, generator=generator), 1 / (2 * sparsity)
        return (drawn > 1 - share).float() - (drawn < share).float()

    if sparsity:
        a, b = ternary(r, 1, least), ternary(most, n, r)
    else:
        a, b = uniform(r, 1, least), torch.cat([uniform(most, 1, r) for _ in range(n)], dim=1)
    return {"A": a / a.std(), "B": b / b.std()}
