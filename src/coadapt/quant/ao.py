"""torchao: a linear layer of PyTorch's whose weight is a tensor of a class of its own (int8, int4, float8, intx)."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.store import Packed, recompute


class TorchAO(Packed):
    """What `torchao.quantization.quantize_` puts in the place of a weight."""

    called = "torchao"

    def read(self, module: Any) -> Tensor:
        return module.weight.detach().dequantize()

    def write(self, module: Any, weight: Tensor) -> None:
        old = module.weight
        again = _AGAIN.get(type(old).__name__)
        if again is None:
            raise TypeError(
                f"A {type(old).__name__} of torchao cannot be quantised again by coadapt; known are "
                f"{', '.join(_AGAIN)}. Merge into the dequantised base: into='dequantised'."
            )
        made = again(old, weight.to(device=old.device, dtype=old.dtype).contiguous())
        module.__dict__["_parameters"]["weight"] = nn.Parameter(made, requires_grad=False)

    def dtype(self, module: Any) -> torch.dtype:
        return module.weight.dtype

    def parts(self, module: Any) -> tuple[Tensor, ...]:
        return tuple(_inner(module.weight))

    def steady(self, module: Any) -> Callable[[], None] | None:
        """Its product keeps the weight as floats for the backward; or has none, where it rounds its input as well."""
        return recompute(module)


def _inner(tensor: Any) -> list[Tensor]:
    """The plain tensors that one of torchao's consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _inner(getattr(tensor, name))]


def _granularity(old: Any) -> Any:
    library: Any = sys.modules["torchao.quantization"]
    rows, *_, columns = old.block_size
    if (rows, columns) == tuple(old.shape):
        return library.PerTensor()
    return library.PerRow() if columns == old.shape[-1] else library.PerGroup(columns)


def _mapping(old: Any) -> Any:
    """Whether there are zero points, by torchao's names for it."""
    kinds: Any = sys.modules["torchao.quantization"].MappingType
    return kinds.SYMMETRIC if old.zero_point is None or not old.zero_point.any() else kinds.ASYMMETRIC


def _int8(old: Any, weight: Tensor) -> Tensor:
    return type(old).from_hp(
        weight, _granularity(old), _mapping(old), act_quant_kwargs=old.act_quant_kwargs, reduce_range=old.reduce_range
    )


def _float8(old: Any, weight: Tensor) -> Tensor:
    return type(old).from_hp(
        weight,
        old.qdata.dtype,
        _granularity(old),
        old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


def _intx(old: Any, weight: Tensor) -> Tensor:
    return type(old).from_hp(
        weight,
        tuple(old.block_size),
        old.target_dtype,
        mapping_type=_mapping(old),
        activation_quantization=old.activation_quantization,
    )


_AGAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
}
"""How weights of a class are made, as a given one was."""

_STORE = TorchAO()


def store_for(module: nn.Module) -> Packed | None:
    """Of linear layers whose weight is of one of torchao's classes."""
    weight = module.__dict__["_parameters"].get("weight")
    return _STORE if isinstance(weight, sys.modules["torchao.utils"].TorchAOBaseTensor) else None
