import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BiasConfig, TransposedConfig
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod
from ..core.method import Place, register
from ..core.seeded import Seeded
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class TinyLoraConfig(BiasConfig, TransposedConfig):
    """W' = W + U S^1/2 (sum_i v_i P_i) S^1/2 V at the targets: a few numbers v, shared by as many layers as wanted."""

    kind = "TINYLORA"

    r: int = 2
    """How many of the weight's largest singular values it works in."""
    u: int = 64
    """Length of v."""
    weight_tying: float = 0.0
    """How much of v is shared: 0, a v for each target; 1, one for all."""
    projection_seed: int = 42
    """Seed of the P; each target has its own."""
    save_projection: bool = True
    """Whether files hold the P. False: they are made again from the seed."""
    tinylora_dropout: float = 0.0
    """Share of the inputs that are dropped while training."""
    init_weights: bool | str = True
    """True: v starts at zero, so that nothing changes; "uniform" or False: between minus and plus `init_v_bound`."""
    init_v_bound: float = 0.02
    """See `init_weights`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "u")
        self.probability("tinylora_dropout")
        self.choice("init_weights", (True, False, "uniform"))
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"TinyLoraConfig: weight_tying={self.weight_tying} must lie in [0, 1].")


class Vectors(nn.Module):
    """All v, and for each target its number among them."""

    def __init__(self, config: TinyLoraConfig, places: list[Place]) -> None:
        super().__init__()
        groups = max(1, round(len(places) * (1 - config.weight_tying)))
        size = max(1, len(places) // groups)
        self.numbers = {place.path: i for i, place in enumerate(places)}
        self.group = {place.path: str(min(i // size, groups - 1)) for i, place in enumerate(places)}
        bound = 0.0 if config.init_weights is True else config.init_v_bound
        used = dict.fromkeys(self.group.values())
        self.v = nn.ParameterDict({g: nn.Parameter(torch.empty(config.u).uniform_(-bound, bound)) for g in used})


@register(TinyLoraConfig)
class TinyLoRA(WithBiases, LowRankMethod):
    """W' = W + U S^1/2 (sum_i v_i P_i) S^1/2 V, with W = U S V cut to the r largest singular values

    Learning to Reason in 13 Parameters, Morris et al. 2026, arXiv:2602.04118. P are normal numbers of spread
    1 / sqrt(r). `init_weights=False` leaves v as memory was in peft; here it is "uniform". Use it for reinforcement
    learning, where a few bits are to be learned. Parameters: u for each group of sites; u in all with weight_tying=1.
    """

    def __init__(self, config: TinyLoraConfig, layer: Layer, shared: Any = None) -> None:
        super().__init__(config, layer, shared)
        self.shape, self.dropout = layer.shape[1:], config.tinylora_dropout
        self.group = shared.group[layer.path]
        self.turned = layer.kind.name == "embedding"  # the field takes its weight as it is stored, (I, O)
        weight = layer.weight().flatten(1).float()
        r = min(config.r, *weight.shape)
        left, values, right = torch.linalg.svd(weight.mT if self.turned else weight, full_matrices=False)
        roots = values[:r].sqrt()
        self.register_buffer("A", (roots[:, None] * right[:r]).contiguous())  # (R, I)
        self.register_buffer("B", left[:, :r] * roots)  # (O, R)
        make = functools.partial(_projections, config.projection_seed + shared.numbers[layer.path], config.u, r)
        self.projections = Seeded(make, config.save_projection)

    @classmethod
    def shared(cls, config: TinyLoraConfig, base: nn.Module, places: list[Place]) -> Vectors:
        return Vectors(config, places)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        a, b = self.get_buffer("A"), self.get_buffer("B")
        inner = torch.einsum("i,ijk->jk", self.bank.v[self.group].to(a), self.projections.at("P", a))  # (R, R)
        a, b = (b.mT, a.mT @ inner.mT) if self.turned else (a, b @ inner)
        return a.reshape(-1, *self.shape), b, 1.0


def _projections(seed: int, u: int, r: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"P": torch.normal(0.0, 1 / math.sqrt(r), (u, r, r), generator=generator)}
