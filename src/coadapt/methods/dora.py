import torch
from torch import Tensor, nn

from ..core.layer import Layer
from ..core.method import Companion, Place, WeightMethod, register
from .lora import LoRA, LoraConfig


@register(LoraConfig, variant="DORA")
class DoRA(WeightMethod):
    """W' = m (W + s B A) / norm(W + s B A), row by row

    DoRA: Weight-Decomposed Low-Rank Adaptation, Liu et al. 2024, arXiv:2402.09353. W is the weight with what stands
    below in a Seq; no gradient goes through the norm (section 4.3). Parameters per site: r (O + I K) + O.
    """

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        weight = layer.weight()
        self.change = LoRA(config, layer).to(weight.device)
        self.m = nn.Parameter(_norms(self.change.merge(weight)))  # (O,)

    @classmethod
    def places(cls, config: LoraConfig, base: nn.Module) -> list[Place]:
        return LoRA.places(config, base)

    @classmethod
    def companions(cls, config: LoraConfig, base: nn.Module, places: list[Place]) -> list[Companion]:
        return LoRA.companions(config, base, places)

    def merge(self, weight: Tensor) -> Tensor:
        changed = self.change.merge(weight)
        return (self.m / _norms(changed)).view(-1, *[1] * (changed.dim() - 1)) * changed

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = self.change(x, base)
        length = base.along_channels(self.m / _norms(self.change.merge(base.weight())), y).to(y.dtype)
        if base.bias is None:
            return length * y
        bias = base.along_channels(base.bias.to(y.dtype), y)
        return bias + length * (y - bias)


@torch.no_grad()
def _norms(weight: Tensor) -> Tensor:
    """(O, I, *K) -> (O,)"""
    return weight.flatten(1).norm(dim=1)
