import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BiasConfig
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod, is_plain
from ..core.method import Place, register
from ..core.seeded import Seeded
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class VeraConfig(BiasConfig):
    """W' = W + diag(b) B diag(d) A at the targeted layers; A and B are random, frozen, and the same for all."""

    kind = "VERA"

    r: int = 256
    """Rank of the change; costs r numbers a site."""
    projection_prng_key: int = 0
    """Seed of A and B."""
    save_projection: bool = True
    """Whether files hold A and B. False: they are made again from the seed."""
    vera_dropout: float = 0.0
    """Share of the inputs to A that are dropped while training."""
    d_initial: float = 0.1
    """What d starts with."""
    init_weights: bool = True
    """True: b starts at zero, so that nothing changes; False: b is 1, d random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("vera_dropout")


@register(VeraConfig)
class VeRA(WithBiases, LowRankMethod):
    """W' = W + diag(b) B diag(d) A

    VeRA: Vector-based Random Matrix Adaptation, Kopiczko et al. 2023, arXiv:2310.11454. A and B are as large as the
    largest target needs; each takes the first columns and rows. Use it where many adapters are kept: a file without A
    and B is a tenth of a LoRA's. Parameters per site: O + r.
    """

    def __init__(self, config: VeraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        out_features, self.shape = layer.shape[0], layer.shape[1:]  # (I, *K)
        self.bank = (shared,)  # in a tuple: it is the adapter's
        self.dropout = config.vera_dropout
        self.widens = not is_plain(layer.module)
        start = config.init_weights
        self.b = nn.Parameter(torch.zeros(out_features) if start else torch.ones(out_features))  # (O,)
        self.d = nn.Parameter(torch.full((config.r,), config.d_initial) if start else torch.randn(config.r))  # (R,)

    @classmethod
    def shared(cls, config: VeraConfig, base: nn.Module, places: list[Place]) -> Seeded:
        out_features, in_features = largest(places)
        shapes = (config.r, in_features), (out_features, config.r)
        make = functools.partial(projections, config.projection_prng_key, *shapes)
        return Seeded(make, config.save_projection)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        bank: Any = self.bank[0]
        a = bank.at("A", self.d)[:, : math.prod(self.shape)]  # (R, I K)
        b = bank.at("B", self.b)[: len(self.b)]  # (O, R)
        return (self.d[:, None] * a).view(-1, *self.shape), self.b[:, None] * b, 1.0


def largest(places: Sequence[Place]) -> tuple[int, int]:
    """The most output features of the places, and the most input features, each entry of a kernel counted."""
    shapes = [place.layer.shape for place in places]
    return max(shape[0] for shape in shapes), max(math.prod(shape[1:]) for shape in shapes)


def projections(seed: int, down: tuple[int, int], up: tuple[int, int]) -> dict[str, Tensor]:
    """A and B of these shapes, uniform as He et al. have it."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))  # rounded as in the field's library
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return {"A": uniform(*down), "B": uniform(*up)}
