from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import TargetedConfig
from ..core import roles, target
from ..core.layer import Layer
from ..core.method import Place, WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(TargetedConfig):
    """The scales, and biases, of the normalisations; all of them unless targets are named."""

    kind = "LN_TUNING"


@register(LNTuningConfig)
class LNTuning(WeightMethod):
    """w' and b' in place of the norm's w and b

    Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, Zhao et al. 2023, arXiv:2312.11420. Use
    it to move a model to another modality or domain with next to no parameters. Parameters per site: D, or 2 D with a
    bias.
    """

    kinds = ("norm",)

    def __init__(self, config: Any, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.weight = nn.Parameter(layer.weight().clone())  # (D,)
        self.bias = None if layer.bias is None else nn.Parameter(layer.value("bias").clone())  # (D,)

    @classmethod
    def places(cls, config: LNTuningConfig, base: nn.Module) -> list[Place]:
        return [Place(path, module) for path, module in target.layers(config, base, roles.norms(base))]

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        return base.apply(x, self.weight, self.bias)  # whatever the weight below is: rows may have different ones

    def merge(self, weight: Tensor) -> Tensor:
        return self.weight

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        return self.bias
