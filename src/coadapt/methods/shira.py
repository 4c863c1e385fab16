import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TransposedConfig, WeightConfig
from ..core import target
from ..core.layer import Layer
from ..core.method import AdditiveMethod, Place, register
from ..core.scattered import check_count, drawn, scattered


@dataclass(frozen=True, kw_only=True)
class ShiraConfig(WeightConfig, TransposedConfig):
    """A few entries of the weight, as many as a LoRA has parameters, trained where they stand."""

    kind = "SHIRA"

    r: int = 32
    """As many entries as a LoRA of this rank has parameters: r (O + I)."""
    mask_type: str = "random"
    """How they are chosen; at random is the one way there is."""
    random_seed: int | None = None
    """Seed of the choice; without one it is the same each time, too. Files hold the choice itself."""
    init_weights: bool = True
    """True: the changes start at zero; False: normal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.choice("mask_type", ("random",))


@register(ShiraConfig)
class SHiRA(AdditiveMethod):
    """W' = W + S, S zero but at r (O + I) chosen entries

    Sparse High Rank Adapters, Bhardwaj et al. 2024, arXiv:2406.13175. Entries are chosen at random (SHiRA-Rand); the
    paper's choices by magnitude and gradient are not here, that by magnitude is Super-Tuning's. Convolution kernels are
    laid out as (O, I K). Use it where many adapters are merged and taken off again, or added up: few entries collide.
    Parameters per site: r (O + I).
    """

    def __init__(self, config: ShiraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.shape = layer.shape
        out, ins = self.shape[0], math.prod(self.shape[1:])
        n = config.r * (out + ins)
        places = drawn(n, out * ins, config.random_seed).sort().values
        self.at: Tensor
        self.register_buffer("at", torch.stack([places // ins, places % ins]).to(torch.int32))  # (2, N) rows, columns
        self.s = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))  # (N,)

    @classmethod
    def places(cls, config: ShiraConfig, base: nn.Module) -> list[Place]:
        found = super().places(config, base)
        for path, out, ins in target.matrices(found, cls.kinds):
            check_count("ShiraConfig", f"r={config.r}", config.r * (out + ins), out * ins, path)
        return found

    def change(self) -> Tensor:
        rows, columns = self.at.long()
        ins = math.prod(self.shape[1:])
        return scattered(self.s, rows * ins + columns, self.shape[0] * ins).view(self.shape)
