"""GPTQ and AWQ as gptqmodel holds them: numbers of few bits in words of 32, a scale and a zero point for each group.

GPTQ, Frantar et al. 2022, arXiv:2210.17323; AWQ, Lin et al. 2023, arXiv:2306.00978. Read from the layout of their
files, which the portable kernels keep; others put the words into an order of their own: they can only be called.
"""

import sys
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.site import plain_class
from ..core.store import Packed, recompute

LANES = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ in 4 bits: which of eight neighbouring columns lies in each place of a word, from its lowest bits."""


def unpacked(words: Tensor, bits: int) -> Tensor:
    """(..., N) words of 32 bits -> (..., 32 N / bits) numbers, from the lowest bits on; some lie across two words."""
    if 32 % bits == 0:
        return (words.unsqueeze(-1) >> torch.arange(0, 32, bits, device=words.device) & 2**bits - 1).flatten(-2)
    stream = words.unsqueeze(-1) >> torch.arange(32, device=words.device) & 1
    digits = stream.flatten(-2).unflatten(-1, (-1, bits))
    return (digits << torch.arange(bits, device=words.device)).sum(-1).int()


def packed(numbers: Tensor, bits: int) -> Tensor:
    """The words of `unpacked`."""
    digits = numbers.long().unsqueeze(-1) >> torch.arange(bits, device=numbers.device) & 1
    stream = digits.flatten(-2).unflatten(-1, (-1, 32))
    return (stream << torch.arange(32, device=numbers.device)).sum(-1).int()  # the highest bit is the sign's


class Grid(Packed):
    """W[o, i] = s (q - z), with the scale s and the zero point z of o and of the group of i."""

    called = "gptqmodel"
    own = ("adapter", "_weight_metadata", "g_idx", "qweight", "qzeros", "scales")

    def read(self, module: Any) -> Tensor:
        scales, zeros = self._grid(module)
        weight = scales * (self.numbers(module) - zeros)  # in 16 bits, as the layer's own call makes it
        return weight.T.float().contiguous()

    def write(self, module: Any, weight: Tensor) -> None:
        """Each number to the nearest on the grid that there is: it was fitted to data, so it stays."""
        scales, zeros = self._grid(module)
        numbers = (weight.T.float() / scales.float() + zeros).round().clamp(0, 2**module.bits - 1)
        module.__dict__["_buffers"]["qweight"] = self.words(module, numbers)
        for clear in ("clear_weight_cache", "_stream_reset_cache"):
            if hasattr(module, clear):
                getattr(module, clear)()

    def dtype(self, module: Any) -> torch.dtype:
        return torch.float32

    def parts(self, module: Any) -> tuple[Tensor, ...]:
        return module.qweight, module.scales, module.qzeros

    def steady(self, module: Any) -> Callable[[], None]:
        """Its product keeps the weight as floats for the backward."""
        return recompute(module)

    def _grid(self, module: Any) -> tuple[Tensor, Tensor]:
        """Scales and zero points, (I, O) each."""
        groups = self.groups(module)
        return module.scales[groups], self.zeros(module)[groups]

    @abstractmethod
    def groups(self, module: Any) -> Tensor:
        """(I,)"""

    @abstractmethod
    def zeros(self, module: Any) -> Tensor:
        """(groups, O)"""

    @abstractmethod
    def numbers(self, module: Any) -> Tensor:
        """(I, O)"""

    @abstractmethod
    def words(self, module: Any, numbers: Tensor) -> Tensor:
        """What holds `numbers`."""


class GPTQ(Grid):
    """Words run along the inputs, those of zero points along the outputs; `g_idx` says which group an input is in."""

    def groups(self, module: Any) -> Tensor:
        return module.g_idx.long()

    def zeros(self, module: Any) -> Tensor:
        """In the first version of the format they are stored less 1."""
        stored = unpacked(module.qzeros, module.bits)[:, : module.out_features]
        return stored if module.qzero_format() == 2 else stored + 1 & 2**module.bits - 1

    def numbers(self, module: Any) -> Tensor:
        return unpacked(module.qweight.T, module.bits).T[: module.in_features]

    def words(self, module: Any, numbers: Tensor) -> Tensor:
        return packed(numbers.T, module.bits).T.contiguous()


class AWQ(Grid):
    """Words run along the outputs, eight of which stand in an order of their own; groups are neighbours."""

    def groups(self, module: Any) -> Tensor:
        return torch.arange(module.in_features, device=module.scales.device) // module.group_size

    def zeros(self, module: Any) -> Tensor:
        return self._columns(unpacked(module.qzeros, module.bits), module)

    def numbers(self, module: Any) -> Tensor:
        return self._columns(unpacked(module.qweight, module.bits), module)

    def words(self, module: Any, numbers: Tensor) -> Tensor:
        if module.bits == 4:
            numbers = numbers.unflatten(-1, (-1, 8))[..., LANES].flatten(-2)
        return packed(numbers, module.bits)

    def _columns(self, numbers: Tensor, module: Any) -> Tensor:
        if module.bits == 4:
            numbers = numbers.unflatten(-1, (-1, 8))[..., [LANES.index(i) for i in range(8)]].flatten(-2)
        return numbers[:, : module.out_features]


class Opaque(Packed):
    """A layout that only its own kernel reads: what calls the layer works, what reads its weight does not."""

    called = "gptqmodel"

    def read(self, module: Any) -> Tensor:
        raise TypeError(
            f"A {type(module).__name__} holds its weight in a layout of its own, so it can be called but not read: a "
            "method that starts from the weight, or merging, cannot work. Load the model with gptqmodel's "
            "backend='torch' (GPTQ or AWQ)."
        )

    def write(self, module: Any, weight: Tensor) -> None:
        self.read(module)

    def dtype(self, module: Any) -> torch.dtype:
        return next((b.dtype for b in module.buffers() if b.is_floating_point()), torch.float16)

    def parts(self, module: Any) -> tuple[Tensor, ...]:
        return tuple(module.buffers())


_OPAQUE = Opaque()
_PORTABLE: dict[str, Packed] = {
    **dict.fromkeys(("TorchLinear", "TritonV2Linear"), GPTQ()),
    **dict.fromkeys(("AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear"), AWQ()),
}
"""gptqmodel's kernels that keep the layout of the files."""


def store_for(module: nn.Module) -> Packed | None:
    """Of gptqmodel's layers."""
    if not isinstance(module, sys.modules["gptqmodel.nn_modules.qlinear"].BaseQuantLinear):
        return None
    if getattr(module, "planar", False) or module.bits not in (2, 3, 4, 8):
        return _OPAQUE
    return _PORTABLE.get(plain_class(type(module)).__name__, _OPAQUE)
