import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TransposedConfig, WeightConfig
from ..core import target
from ..core.layer import Layer
from ..core.method import WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class HiraConfig(WeightConfig, TransposedConfig):
    """Weights, each multiplied by 1 + a product of two factors."""

    kind = "HIRA"

    patterns = ("rank_pattern",)

    r: int = 32
    """Rank of the product."""
    hira_dropout: float = 0.0
    """Share of the inputs to the change that are dropped while training."""
    init_weights: bool | str = True
    """True: A random, B zero, so that nothing changes at the start; "gaussian": A normal; False: both random."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some layers: end of a module's name, or a regular expression for it -> rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("hira_dropout")
        self.choice("init_weights", (True, False, "gaussian"))


@register(HiraConfig)
class HiRA(WeightMethod):
    """W' = W + W * (B A), entry by entry

    HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, Huang et al. 2025, ICLR,
    openreview TwJrTz9cRS. The change has a rank up to that of W times r, and W is read in each call: it costs a second
    product of the layer's size. Use it where a LoRA of any rank falls short. In a Seq, W is what stands below; peft
    merges several into each other's results and computes them side by side. Parameters per site: r (O + I K).
    """

    widens = False

    def __init__(self, config: HiraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        r = target.matching(config.rank_pattern, layer.path, config.r)
        self.dropout = config.hira_dropout
        self.A = nn.Parameter(torch.empty(r, *layer.shape[1:]))  # (R, I, *K)
        self.B = nn.Parameter(torch.zeros(layer.shape[0], r))  # (O, R)
        if config.init_weights == "gaussian":
            nn.init.normal_(self.A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if self.kind == "embedding":
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B)
        if config.init_weights is False:
            nn.init.normal_(self.A)
            nn.init.normal_(self.B)

    def change(self, weight: Tensor) -> Tensor:
        return weight * (self.B @ self.A.flatten(1)).view(weight.shape)

    def merge(self, weight: Tensor) -> Tensor:
        return weight + self.change(weight)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        dropped = F.dropout(x, self.dropout, self.training) if x.is_floating_point() else x
        return y + base.apply(dropped, self.change(base.weight())).to(y.dtype)  # apart: W' in half precision loses it
