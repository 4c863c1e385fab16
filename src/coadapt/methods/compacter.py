from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import register
from ..core.roles import Place
from .bottleneck import Bottleneck, BottleneckConfig


@dataclass(frozen=True, kw_only=True)
class CompacterConfig(BottleneckConfig):
    """Bottlenecks whose matrices are sums of Kronecker products, with the small factors shared by all layers."""

    kind = "COMPACTER"

    placement: str = "houlsby"
    """As in a bottleneck; "pfeiffer" is Compacter++."""
    reduction_factor: float | None = None
    """Hidden size / width; 32 if this and bottleneck_size are left out."""
    non_linearity: str = "gelu"
    """Between the two layers."""
    phm_dim: int = 4
    """n, how many products a matrix is the sum of; it divides the widths."""
    phm_rank: int = 1
    """Rank of each large factor."""
    factorized_phm_W: bool = True
    """False: the large factors are whole matrices (PHM adapters)."""
    shared_phm_rule: bool = True
    """False: each bottleneck has small factors of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("phm_dim", "phm_rank")
        self.choice("init_weights", ("zero",))
        self.no_effect("phm_rank", not self.factorized_phm_W, "with factorized_phm_W=False")


class Rule(nn.Module):
    """The small factors, normal, so that W has the spread of the large ones."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(n, n, n) / n**0.5)  # A_1 ... A_n, (n, n, n)


class Hypercomplex(nn.Module):
    """W = sum_i A_i (x) B_i, B_i = s_i t_i or whole; a linear layer's weight (O, I), made when it is asked for."""

    def __init__(self, config: CompacterConfig, inputs: int, outputs: int, rule: nn.Module | None, zero: bool) -> None:
        super().__init__()
        n, r = config.phm_dim, config.phm_rank
        if inputs % n or outputs % n:
            raise ValueError(
                f"CompacterConfig: phm_dim={n} does not divide a layer of {inputs} inputs and {outputs} outputs. "
                "Pick another phm_dim, or a bottleneck_size that it divides."
            )
        self.in_features, self.out_features = inputs, outputs
        self.rule = Rule(n) if rule is None else None
        self.given: list[nn.Module] = [] if rule is None else [rule]  # not as a module: it is every bottleneck's
        spread = (2 / (inputs + outputs)) ** 0.5
        self.whole: nn.Parameter | None = None
        if config.factorized_phm_W:
            self.s = nn.Parameter(torch.randn(n, outputs // n, r) / r**0.5)  # (n, O / n, R)
            self.t = nn.Parameter(torch.randn(n, r, inputs // n) * spread)  # (n, R, I / n)
        else:
            self.whole = nn.Parameter(torch.randn(n, outputs // n, inputs // n) * spread)  # (n, O / n, I / n)
        if zero:
            nn.init.zeros_(self.s if self.whole is None else self.whole)
        self.bias = nn.Parameter(torch.zeros(outputs))  # (O,)

    @property
    def weight(self) -> Tensor:
        rule: Any = self.rule or self.given[0]
        large = self.s @ self.t if self.whole is None else self.whole
        return torch.einsum("nab,noi->aobi", rule.A, large).reshape(self.out_features, self.in_features)


@register(CompacterConfig)
class Compacter(Bottleneck):
    """y + s U act(D y) with D = sum_i A_i (x) (s_i t_i), and U alike; y = base(x)

    Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, Karimi Mahabadi et al. 2021, arXiv:2106.04647. All layers
    share A. The s of U start at zero, so that nothing changes. Use it where a bottleneck is to cost little more than
    its biases. Parameters per site: 2 R (D + m) + D + m, and n n n for all.
    """

    reduction = 32

    @classmethod
    def shared(cls, config: CompacterConfig, base: nn.Module, places: list[Place]) -> nn.Module | None:
        return Rule(config.phm_dim) if config.shared_phm_rule else None

    def dense(self, config: Any, shared: nn.Module | None, sizes: tuple[int, int, int]) -> tuple[Any, Any]:
        inner, size, out = sizes
        return Hypercomplex(config, inner, size, shared, False), Hypercomplex(config, size, out, shared, True)
