import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.activation import activations
from ..core.layer import Layer
from ..core.lowrank import is_plain
from ..core.method import WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class PeanutConfig(WeightConfig):
    """A change of each weight that a small network makes of the weight itself."""

    kind = "PEANUT"

    r: int = 32
    """Width of the network."""
    depth: int = 0
    """How many layers it has on the way in, and as many on the way out, besides the first and the last."""
    act_fn: str = "relu"
    """Between its layers; any activation that transformers knows by name."""
    scaling: float = 1.0
    """What the change is multiplied by."""
    init_weights: bool = True
    """True: the last layer starts at zero, so that nothing changes; False: random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.choice("act_fn", tuple(activations()))
        if isinstance(self.depth, bool) or self.depth < 0:
            raise ValueError(f"PeanutConfig: depth={self.depth!r} must be a whole number of at least 0.")


@register(PeanutConfig)
class PEANuT(WeightMethod):
    """W' = W + s (f(W^T) B^T)^T, f(W^T) = act(W^T A^T), then encoders and decoders with residuals between them

    PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, Zhong et al. 2024, arXiv:2410.01870. Each
    row that f reads is what one input feature weighs for all outputs. f(W^T) is made in each call, a product of the
    weight with r columns; the change itself is not. Use it where a LoRA of small rank falls short. Parameters per site:
    2 r O + 2 depth r^2.
    """

    widens = False

    def __init__(self, config: PeanutConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        outputs, r = layer.shape[0], config.r
        self.act, self.scale = activations()[config.act_fn], config.scaling
        self.A = nn.Parameter(torch.empty(r, outputs))  # (R, O)
        self.encoders = nn.ModuleList([nn.Linear(r, r, bias=False) for _ in range(config.depth)])
        self.decoders = nn.ModuleList([nn.Linear(r, r, bias=False) for _ in range(config.depth)])
        self.B = nn.Parameter(torch.zeros(outputs, r))  # (O, R)
        for weight in (self.A,) if config.init_weights else (self.A, self.B):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def features(self, weight: Tensor) -> Tensor:
        """(O, I, *K) -> (I K, R): f(W^T)"""
        h = self.act(F.linear(weight.flatten(1).mT.to(self.A.dtype), self.A))
        passed: list[Tensor] = []
        for encoder in self.encoders:
            passed.append(h)
            h = self.act(encoder(h))
        for decoder in self.decoders:
            h = self.act(decoder(h)) + passed.pop()
        return h

    def merge(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.features(weight).mT).view(weight.shape)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if not is_plain(base.module):  # its outputs do not see the same inputs
            return super().forward(x, base)
        y, weight = base(x), base.weight()
        down = self.features(weight).mT.view(-1, *weight.shape[1:])  # (R, I, *K)
        return y + self.scale * base.mix(base.apply(x, down.to(y.dtype)), self.B.to(y.dtype))
