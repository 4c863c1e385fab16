from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.layer import Layer
from ..core.method import WeightMethod, register
from .lora import LoRA, LoraConfig, OfLoraConfig


@register(LoraConfig, variant="VELORA")
class VeLoRA(OfLoraConfig, WeightMethod):
    """W' = W + (alpha / r) B A; for the gradient of A, x is kept as one number for each group of its features

    VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections, Miles et al. 2024, arXiv:2405.17991. Each
    group of x is projected on one unit vector v, the mean of all groups (of each batch, or the first), or random; in
    the backward c v stands for it, so that A learns from an approximation. All else is LoRA. Use it where activations
    are what fills the memory. Parameters per site: r (O + I).
    """

    widens = False
    kinds = ("linear",)
    needs_call = "it changes what a call keeps for its backward"

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.change = LoRA(config, layer)
        options: Any = config.velora_config
        self.groups, self.strength, self.follows = options.num_groups, options.scale, options.init_type
        size = -(-layer.shape[1] // self.groups)
        start = torch.randn(size) if self.follows == "random" else torch.zeros(size)
        self.register_buffer("v", start / start.norm().clamp(min=1e-12))  # (I / g,), zero until a batch was seen
        self.v: Tensor

    def merge(self, weight: Tensor) -> Tensor:
        return self.change.merge(weight)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if not self.training or not torch.is_grad_enabled():
            return self.change(x, base)
        y = base(x)
        x = F.dropout(x, self.change.drops).to(y.dtype)  # which autocast has chosen
        if self.follows == "batch_average" or (self.follows == "batch_average_once" and not bool(self.v.any())):
            self._average(x)
        a, b, scale = self.change.factors()
        z: Any = Compressed.apply(x, a.to(x.dtype), self.v.to(x.dtype), self.groups, self.strength)
        return torch.add(y, F.linear(z, b.to(x.dtype)).to(y.dtype), alpha=scale)

    @torch.no_grad()
    def _average(self, x: Tensor) -> None:
        mean = grouped(x, self.groups).flatten(0, 1).float().mean(0)
        mean = mean if bool(mean.any()) else torch.ones_like(mean)
        self.v = (mean / mean.norm()).to(self.v)


class Compressed(torch.autograd.Function):
    """A x, which keeps (N, G) of x for the backward and not (N, I)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(grouped(x, groups) @ v, a, v)
        return F.linear(x, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, a, v = ctx.saved_tensors
        near = (ctx.scale * kept[..., None] * v).flatten(1)[:, : a.shape[1]]  # (N, I)
        flat = gradient.reshape(-1, gradient.shape[-1])
        return gradient @ a, flat.mT @ near, None, None, None


def grouped(x: Tensor, groups: int) -> Tensor:
    """(..., I) -> (N, G, I / G), filled up with zeros."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).reshape(-1, groups, size)
