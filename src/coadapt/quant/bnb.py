"""bitsandbytes: NF4 and FP4 in blocks, their scales quantised again if asked for; and LLM.int8()."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.store import Packed


def _library() -> Any:
    return sys.modules["bitsandbytes"]


class FourBit(Packed):
    """Weights as indices into 16 values, each block times its largest: QLoRA, arXiv:2305.14314."""

    called = "bnb 4bit"
    own = ("quant_state", "quant_storage", "compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu")

    def read(self, module: Any) -> Tensor:
        data, state = self._portable(module.weight)
        return _library().functional.dequantize_4bit(data, state).view(self.shape(module))

    def write(self, module: Any, weight: Tensor) -> None:
        old = module.weight
        new = type(old)(
            weight.to(old.quant_state.dtype).cpu(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        ).to(old.device)
        module.weight, module.quant_state = new, new.quant_state

    def dtype(self, module: Any) -> torch.dtype:
        return _state(module.weight).dtype

    def parts(self, module: Any) -> tuple[Tensor, ...]:
        state = _state(module.weight)
        second = () if state.state2 is None else (state.state2.absmax,)
        return module.weight, state.absmax, *second

    def steady(self, module: Any) -> Callable[[], None] | None:
        """On CPUs with bfloat16 instructions a call without gradients packs the weight anew, with rounded scales.

        The next call with gradients would be cut off from its input (bitsandbytes 0.50.2).
        """
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            return None
        weight = module.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = self._portable(weight)
            module.quant_state = weight.quant_state
        module.support_avx512bf16_for_cpu = False
        return lambda: setattr(module, "support_avx512bf16_for_cpu", True)

    def _portable(self, weight: Any) -> tuple[Tensor, Any]:
        state = _state(weight)
        if not getattr(state, "packing_format_for_cpu", False):
            return weight.data, state
        back: Any = _library().functional._convert_weight_packed_for_cpu_inverse
        return back(weight.data, copy.copy(state))


class EightBit(Packed):
    """Rows of 8-bit numbers, each row times its largest value / 127: LLM.int8(), arXiv:2208.07339.

    Its own call rounds its input to 8 bits as well, and the gradient of that to 16.
    """

    called = "bnb 8bit"
    own = ("state", "index")

    def read(self, module: Any) -> Tensor:
        numbers, rows = self.parts(module)
        return numbers.float() * (rows / 127).unsqueeze(1)

    def write(self, module: Any, weight: Tensor) -> None:
        old, before = module.weight, getattr(module, "state", None)
        made = type(old)(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device)
        module.weight = made
        if before is not None:
            module.state = copy.copy(before)
            module.state.CB = module.state.SCB = None

    def dtype(self, module: Any) -> torch.dtype:
        return torch.float32

    def parts(self, module: Any) -> tuple[Tensor, ...]:
        """The numbers (O, I) and the largest of each row (O,), which move from the parameter with the first call."""
        weight, state = module.weight, getattr(module, "state", None)
        if weight.SCB is not None:
            return weight.data if weight.CB is None else weight.CB, weight.SCB
        if state is None or state.SCB is None:
            raise ValueError(f"A {type(module).__name__} is not quantised yet: put the model on its device first.")
        return weight.data if state.CB is None else state.CB, state.SCB


def _state(weight: Any) -> Any:
    if weight.quant_state is None:
        raise ValueError("A 4-bit layer of bitsandbytes is not quantised yet: put the model on its device first.")
    return weight.quant_state


_FOUR, _EIGHT = FourBit(), EightBit()


def store_for(module: nn.Module) -> Packed | None:
    """Of layers that bitsandbytes has quantised; not of those that it keeps in 16 bits until they are called."""
    library, weight = _library().nn, module.__dict__["_parameters"].get("weight")
    if isinstance(weight, library.Params4bit):
        return _FOUR
    if isinstance(weight, library.Int8Params) and not weight.has_fp16_weights:
        return _EIGHT
    return None
