"""HQQ: groups of 1 to 8 bits with a scale and a zero point that are fitted without data."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.store import Packed


class HQQ(Packed):
    """Half-Quadratic Quantization, Badri and Shaji 2023 (mobiusml.github.io/hqq_blog)."""

    called = "hqq"
    own = ("W_q", "meta", "quant_config", "ready", "axis", "channel_wise", "offload_meta", "compute_dtype")

    def read(self, module: Any) -> Tensor:
        return module.dequantize().detach()

    def write(self, module: Any, weight: Tensor) -> None:
        module.__dict__["_parameters"].pop("W_q")
        module.quantize(weight.to(module.compute_dtype), **module.quant_config)

    def dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype

    def parts(self, module: Any) -> tuple[Tensor, ...]:
        return module.W_q, *(v for v in module.meta.values() if isinstance(v, Tensor))

    def steady(self, module: Any) -> Callable[[], None] | None:
        """Its bias is no parameter, and still hangs on what it was made of."""
        bias = module.bias
        if bias is None or not bias.requires_grad:
            return None
        module.bias = bias.detach()
        return functools.partial(setattr, module, "bias", bias)


_HQQ = HQQ()


def store_for(module: nn.Module) -> Packed | None:
    """Of HQQ's own linear layers."""
    return _HQQ if isinstance(module, sys.modules["hqq.core.quantize"].HQQLinear) else None
