import functools
import math
from dataclasses import dataclass
from typing import ClassVar

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
class VectorsConfig(BiasConfig, TransposedConfig):
    """Options of the methods that train vectors beside random, frozen matrices A and B, the same for all targets."""

    r: int = 256
    """Rank of the change."""
    projection_prng_key: int = 0
    """Seed of A and B."""
    save_projection: bool = True
    """Whether files hold A and B. False: they are made again from the seed."""
    d_initial: float = 0.1
    """What d starts with."""
    init_weights: bool = True
    """True: b starts at zero, so that nothing changes; False: b is 1, d random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")


class Vectors(WithBiases, LowRankMethod):
    """diag(b) B and diag(d) A, each with the first rows and columns of the B and A that are the adapter's."""

    rows: ClassVar[int] = 1
    """Of A, for each column of B."""

    def __init__(self, config: VectorsConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        out_features, self.shape = layer.shape[0], layer.shape[1:]  # (I, *K)
        start, r = config.init_weights, self.rows * config.r
        self.b = nn.Parameter(torch.zeros(out_features) if start else torch.ones(out_features))  # (O,)
        self.d = nn.Parameter(torch.full((r,), config.d_initial) if start else torch.randn(r))  # (rows R,)

    @classmethod
    def shared(cls, config: VectorsConfig, base: nn.Module, places: list[Place]) -> Seeded:
        out_features, in_features = target.largest(places)
        shapes = (cls.rows * config.r, in_features), (out_features, config.r)
        return Seeded(functools.partial(_projections, config.projection_prng_key, *shapes), config.save_projection)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """diag(d) A, (rows R, I, *K), and diag(b) B, (O, R)."""
        a = self.bank.at("A", self.d)[:, : math.prod(self.shape)]
        b = self.bank.at("B", self.b)[: len(self.b)]
        return (self.d[:, None] * a).view(-1, *self.shape), self.b[:, None] * b


@dataclass(frozen=True, kw_only=True)
class VeraConfig(VectorsConfig):
    """W' = W + diag(b) B diag(d) A at the targeted layers; A and B are random, frozen, and the same for all."""

    kind = "VERA"

    vera_dropout: float = 0.0
    """Share of the inputs to A that are dropped while training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.probability("vera_dropout")


@register(VeraConfig)
class VeRA(Vectors):
    """W' = W + diag(b) B diag(d) A

    VeRA: Vector-based Random Matrix Adaptation, Kopiczko et al. 2023, arXiv:2310.11454. A and B are as large as the
    largest target needs; each takes the first columns and rows. Use it where many adapters are kept: a file without A
    and B is a tenth of a LoRA's. Parameters per site: O + r.
    """

    def __init__(self, config: VeraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.dropout = config.vera_dropout

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return *self.scaled(), 1.0


def _projections(seed: int, down: tuple[int, int], up: tuple[int, int]) -> dict[str, Tensor]:
    """A and B of these shapes, uniform as He et al. have it."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))  # rounded as in the field's library
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return {"A": uniform(*down), "B": uniform(*up)}
