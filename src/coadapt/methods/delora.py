import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import BiasConfig
from ..core import target
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod
from ..core.method import register
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class DeloraConfig(BiasConfig):
    """W' = W + (lambda / r) B A with ranks of unit length, at the layers that are targeted."""

    kind = "DELORA"

    patterns = ("rank_pattern", "lambda_pattern")

    r: int = 8
    """Rank of the change."""
    delora_lambda: int | float = 15
    """Where lambda starts: how large the change may be, whatever its direction. It trains."""
    module_dropout: float = 0.0
    """Share of the inputs to the change that are dropped while training."""
    init_weights: bool = True
    """True: B starts at zero, so that nothing changes; False: random."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some layers: end of a module's name, or a regular expression for it -> rank."""
    lambda_pattern: Mapping[str, int | float] = field(default_factory=dict)
    """Other starts of lambda for some layers, in the same way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("module_dropout")


@register(DeloraConfig)
class DeLoRA(WithBiases, LowRankMethod):
    """W' = W + (lambda / r) B diag(1 / (norm(b_i) norm(a_i))) A diag(n), n_j = norm(W_j)

    Decoupling Angles and Strength in Low-rank Adaptation, Bini et al. 2025, arXiv:2503.18225. b_i are the columns of B,
    a_i the rows of A, W_j the columns of the base's weight. Lengths below 1e-4 count as 1e-4, as in peft, so that B can
    start at zero. Use it where a LoRA drifts off in long trainings or at high rates. Parameters per site: r (O + I K) +
    1.
    """

    n: Tensor

    def __init__(self, config: DeloraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        out_features, *in_dims = layer.shape
        self.r = target.matching(config.rank_pattern, layer.path, config.r)
        start = target.matching(config.lambda_pattern, layer.path, config.delora_lambda)
        self.dropout = config.module_dropout
        self.A = nn.Parameter(torch.empty(self.r, *in_dims))  # (R, I, *K)
        self.B = nn.Parameter(torch.zeros(out_features, self.r))  # (O, R)
        self.strength = nn.Parameter(torch.full((1,), float(start)))  # (1,) lambda
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        weight = layer.weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("n", torch.linalg.vector_norm(weight, dim=0, dtype=wide))  # (I, *K)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        lengths = torch.linalg.vector_norm(self.A.flatten(1), dim=1).clamp(min=1e-4)
        lengths = lengths * torch.linalg.vector_norm(self.B, dim=0).clamp(min=1e-4)  # (R,)
        return self.A * self.n, self.B * (self.strength / lengths), 1 / self.r
