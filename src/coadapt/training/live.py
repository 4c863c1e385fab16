"""Bytes that are alive: of every tensor on a CPU, data or none; what the allocator gave out on a GPU."""

import gc
import weakref
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Meter(Protocol):
    """Context: bytes beyond those that were there before it."""

    @property
    def now(self) -> int: ...
    @property
    def peak(self) -> int:
        """At most, since it began or was last told to `restart`."""
        ...

    def restart(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Live(TorchDispatchMode):
    """Context: bytes of the tensors that were made inside of it and are alive, now and at most.

    Each storage counts once. What a backward will read is what is alive after the forward, wherever it is kept: in the
    graph, or in an object beside it. Works on tensors without data, too. What a kernel takes for itself is not seen.

    Args:
        read: counts also tensors from elsewhere, once they are first read.
    """

    def __init__(self, read: bool = False) -> None:
        super().__init__()
        self.now, self.peak, self.read = 0, 0, read
        self.operations = 0
        """Floating point operations of products and attention, since it began."""
        self._known: set[int] = set()

    def restart(self) -> None:
        """The peak is what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [s for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) for s in _storages(t)]
        if self.read:
            for storage in inputs:
                self._seen(storage, set())
        given = {storage._cdata for storage in inputs}
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            for storage in _storages(tensor) if isinstance(tensor, Tensor) else ():
                self._seen(storage, given)
        return out

    def _seen(self, storage: Any, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tensor: Tensor) -> list[Any]:
    """Where its numbers lie: in one place, unless it is sparse."""
    parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
    return [part.untyped_storage() for part in parts]


class Allocated:
    """As `Live`, of what the GPU's allocator gave out."""

    def __enter__(self) -> Self:
        gc.collect()
        self.restart()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None: ...

    def restart(self) -> None:
        """The peak is what is alive now."""
        torch.cuda.reset_peak_memory_stats()

    @property
    def now(self) -> int:
        """Bytes beyond those that were there before."""
        return torch.cuda.memory_allocated() - self.before

    @property
    def peak(self) -> int:
        """The most of them."""
        return torch.cuda.max_memory_allocated() - self.before


def meter(device: torch.device) -> Live | Allocated:
    """What counts the bytes of this device, where tensors have data."""
    return Allocated() if device.type == "cuda" else Live()
