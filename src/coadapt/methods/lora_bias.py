from typing import Any

import torch
from torch import Tensor, nn

from ..core.layer import Layer
from ..inits import rank_and_scale
from .bitfit import BitFit


class LoraBias(BitFit):
    """b' = b + (alpha / r) delta

    The bias of B, where a LoRA has `lora_bias`: B (A x) + delta is what an extracted adapter with biases holds. A
    companion of the LoRA, at the same layers; it can be merged where the layer has no bias yet, which peft cannot.
    Parameters per site: O.
    """

    kinds = ("linear", "conv")
    needs_call = "it is a bias of what a layer gives"

    def __init__(self, config: Any, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.scale = rank_and_scale(config, layer.path)[1]
        if config.init_lora_weights is False:
            nn.init.normal_(self.delta, std=0.02)

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        change = self.scale * self.delta
        return change if bias is None else bias + change

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        return torch.add(y, base.along_channels(self.delta.to(y.dtype), y), alpha=self.scale)
