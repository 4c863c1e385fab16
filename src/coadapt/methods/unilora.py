import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import BiasConfig, TransposedConfig
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod
from ..core.method import Place, register
from ..core.seeded import Seeded
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class UniLoraConfig(BiasConfig, TransposedConfig):
    """W' = W + B A at the targets; all entries of all A and B are numbers out of one trained vector."""

    kind = "UNILORA"

    r: int = 4
    """Rank of the change."""
    theta_d_length: int = 256
    """Length of that vector: all that is trained."""
    proj_seed: int = 42
    """Seed of which entry takes which number."""
    unilora_dropout: float = 0.0
    """Share of the inputs to A that are dropped while training."""
    init_theta_d_bound: float = 0.02
    """The vector starts uniform between minus and plus this."""
    init_weights: bool = True
    """False: it starts normal, with spread 1."""
    save_indices: bool = False
    """Whether files hold which entry takes which number. False: that is made again from the seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "theta_d_length")
        self.probability("unilora_dropout")
        self.above_zero("init_theta_d_bound")


class Theta(Seeded):
    """The vector; which entries take its numbers; and where in these those of each site begin."""

    def __init__(self, config: UniLoraConfig, places: list[Place]) -> None:
        sizes = [config.r * (shape[0] + math.prod(shape[1:])) for p in places for shape in [p.layer.shape]]
        super().__init__(functools.partial(_taken, sum(sizes), config.theta_d_length, config.proj_seed), saved=False)
        self.starts = {p.path: sum(sizes[:i]) for i, p in enumerate(places)}
        theta, bound = torch.empty(config.theta_d_length), config.init_theta_d_bound
        self.theta = nn.Parameter(theta.uniform_(-bound, bound) if config.init_weights else theta.normal_())  # (d,)


@register(UniLoraConfig)
class UniLoRA(WithBiases, LowRankMethod):
    """W' = W + B A, where all A and B of the model are P theta, and each row of P has one entry that is not 0

    Uni-LoRA: One Vector is All You Need, Li et al. 2025, arXiv:2506.00799. Each number is divided by the root of how
    often it is taken, so that P keeps lengths. It does not start at the base: the vector is random, and small. Use it
    where the file must be smaller than anything. Parameters: d in all, whatever the number of sites.
    """

    def __init__(self, config: UniLoraConfig, layer: Layer, shared: Any = None) -> None:
        super().__init__(config, layer, shared)
        self.shape, self.dropout = layer.shape[1:], config.unilora_dropout
        self.sizes = (config.r, math.prod(self.shape)), (layer.shape[0], config.r)
        self.start = shared.starts[layer.path]
        self.saved = config.save_indices
        if self.saved:
            for side, which in zip("AB", self.taken(shared.at("taken", shared.theta)), strict=True):
                self.register_buffer(f"i{side}", which.long())  # (R, I), (O, R): which numbers
                self.register_buffer(f"s{side}", shared.at("scales", shared.theta)[which])  # and times what

    @classmethod
    def shared(cls, config: UniLoraConfig, base: nn.Module, places: list[Place]) -> Theta:
        return Theta(config, places)

    def taken(self, everywhere: Tensor) -> list[Tensor]:
        """Which numbers A and B of this site take."""
        (r, in_features), (out_features, _) = self.sizes
        parts = everywhere[self.start :][: r * (in_features + out_features)].split([r * in_features, out_features * r])
        return [part.view(size) for part, size in zip(parts, self.sizes, strict=True)]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        bank = self.bank
        if self.saved:
            a, b = (bank.theta.to(s)[i] * s for i, s in ((self.iA, self.sA), (self.iB, self.sB)))
        else:
            numbers = bank.theta * bank.at("scales", bank.theta)
            a, b = (numbers[which] for which in self.taken(bank.at("taken", bank.theta)))
        return a.view(-1, *self.shape), b, 1.0


def _taken(entries: int, length: int, seed: int) -> dict[str, Tensor]:
    """Each number is taken equally often, or once more. The order of draws is the field's."""
    draws = np.random.default_rng(seed)
    taken = np.repeat(np.arange(length), entries // length)
    if rest := entries % length:
        taken = np.concatenate([taken, draws.choice(length, size=rest, replace=False)])
    draws.shuffle(taken)
    counts = torch.bincount(torch.from_numpy(taken), minlength=length)
    return {"taken": torch.from_numpy(taken).int(), "scales": counts.clamp(min=1).float().rsqrt()}
