import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import BiasConfig
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod
from ..core.method import Place, register
from ..core.seeded import Seeded
from .bitfit import WithBiases
from .vera import largest, projections


@dataclass(frozen=True, kw_only=True)
class PveraConfig(BiasConfig):
    """VeRA whose inner values are drawn from a normal distribution that depends on the input."""

    kind = "PVERA"

    r: int = 256
    """Rank of the change; costs 2 r numbers a site."""
    projection_prng_key: int = 0
    """Seed of A and B."""
    save_projection: bool = True
    """Whether files hold A and B. False: they are made again from the seed."""
    pvera_dropout: float = 0.0
    """Share of the inputs to A that are dropped while training."""
    d_initial: float = 0.1
    """What d starts with."""
    init_weights: bool = True
    """True: b starts at zero, so that nothing changes; False: b is 1, d random."""
    sample_at_inference: bool = False
    """Draw also when not training, as for intervals; otherwise the mean is taken."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("pvera_dropout")


@register(PveraConfig)
class PVeRA(WithBiases, LowRankMethod):
    """y = base(x) + b * B z, z ~ N(m, exp(v)), [m; v] = d * A x; merged W' = W + diag(b) B diag(d_m) A_m

    PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, 2025, arXiv:2512.07703. Draws while training, and takes
    the mean otherwise. The draws come from torch's generator, which checkpointing rewinds: peft's `generator_seed`
    makes one that nobody rewinds, so that recomputed layers would see other numbers, and is not read. Use it for VeRA
    with little data, or where the spread of answers is wanted. Parameters per site: O + 2 r.
    """

    kinds = ("linear", "embedding")
    by_factors = False
    needs_call = "it draws what it adds in each call"

    def __init__(self, config: PveraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        out_features, self.in_features = layer.shape
        self.bank = (shared,)  # in a tuple: it is the adapter's
        self.dropout, self.draws = config.pvera_dropout, config.sample_at_inference
        self.widens = False
        start, r = config.init_weights, 2 * config.r
        self.b = nn.Parameter(torch.zeros(out_features) if start else torch.ones(out_features))  # (O,)
        self.d = nn.Parameter(torch.full((r,), config.d_initial) if start else torch.randn(r))  # (2 R,): d_m, then d_v

    @classmethod
    def shared(cls, config: PveraConfig, base: nn.Module, places: list[Place]) -> Seeded:
        out_features, in_features = largest(places)
        shapes = (2 * config.r, in_features), (out_features, config.r)
        make = functools.partial(projections, config.projection_prng_key, *shapes)
        return Seeded(make, config.save_projection)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """diag(d) A, (2 R, I), and diag(b) B, (O, R)."""
        bank: Any = self.bank[0]
        a, b = bank.at("A", self.d)[:, : self.in_features], bank.at("B", self.b)[: len(self.b)]
        return self.d[:, None] * a, self.b[:, None] * b

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
