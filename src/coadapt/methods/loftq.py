from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..core.layer import Known, Layer
from ..core.method import WeightMethod, register
from ..inits import Site
from ..inits.loftq import dequantised, loftq, quantised
from .lora import LoRA, LoraConfig, OfLoraConfig


@register(LoraConfig, variant="LOFTQ")
class LoftQ(OfLoraConfig, WeightMethod):
    """W' = Q + (alpha / r) B A, Q the weight quantised so that the sum starts near to W

    LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, Li et al. 2023, arXiv:2310.08659. Different
    from peft: the base stays as it is, and Q's codes lie in the adapter, two in a byte (4 bits: NF4 in blocks of 64) or
    as int8 by rows; B A is divided by alpha / r at the start, which peft leaves out, so its start is off unless that is
    1. What stands below is replaced. Files hold A and B; Q is worked out again. Use it to train for a base that will be
    quantised. Parameters per site: r (O + I K).
    """

    widens = False
    kinds = LoRA.kinds[:3]
    left_out = ("codes", "most")

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        options: Any = config.loftq_config
        self.change = LoRA(config, layer).to(layer.weight().device)
        self.whole = layer.shape
        self.flat = (self.whole[0], prod(self.whole[1:]))
        rank = self.change.B.shape[-1]
        site = Site(layer, rank, self.change.scale)
        site.within_rank("loftq")
        if layer.blank:
            codes, most = quantised(torch.zeros(self.flat), options.loftq_bits)
        else:
            (a, b), codes, most = loftq(site.weight(), options.loftq_bits, rank, site.scale, options.loftq_iter)
            with torch.no_grad():
                self.change.A = nn.Parameter(a.view(self.change.A.shape).contiguous())
                self.change.B = nn.Parameter(b.contiguous())
        self.register_buffer("codes", codes)
        self.register_buffer("most", most)

    def quantised(self) -> Tensor:
        """(O, I, *K)"""
        codes, most = self.get_buffer("codes"), self.get_buffer("most")
        return dequantised(codes, most, self.flat).view(self.whole)

    def merge(self, weight: Tensor) -> Tensor:
        return self.change.merge(self.quantised())

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        weight = self.quantised()
        if getattr(base.module, "groups", 1) > 1:
            return base.apply(x, self.change.merge(weight), base.bias)
        return self.change(x, Known(base, x, base.apply(x, weight, base.bias)))
