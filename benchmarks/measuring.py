"""Seconds of candidates that take turns, and bytes that are alive."""

import gc
import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .setting import Setting


@dataclass(frozen=True)
class Candidate:
    """Something to time, and what puts everything back after each call, which is not timed."""

    call: Callable[[], Any]
    after: Callable[[], Any] | None = None


def interleaved(
    candidates: Mapping[str, Callable[[], Any] | Candidate], setting: Setting, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of a call, for each candidate and round: A B C, A B C, ..., so that what else the machine does meets all.

    Args:
        at_least: calls without an `after` are repeated to take so many seconds together, and their mean is kept.
    """
    every = {name: c if isinstance(c, Candidate) else Candidate(c) for name, c in candidates.items()}
    calls: dict[str, int] = {}
    for name, one in every.items():
        _seconds(one, 1, setting.device)  # the first call makes plans and buffers
        once = _seconds(one, 1, setting.device)
        calls[name] = 1 if one.after is not None else max(1, math.ceil(at_least / max(once, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in every}
    gc.freeze()  # what is there by now is looked at no more
    for _ in range(setting.rounds):
        gc.collect()
        for name, one in every.items():
            found[name].append(_seconds(one, calls[name], setting.device))
    gc.unfreeze()
    return found


def _seconds(one: Candidate, calls: int, device: str) -> float:
    synchronize(device)
    gc.disable()  # a collection that one candidate fills up would be charged to another
    begun = time.perf_counter()
    for _ in range(calls):
        one.call()
    synchronize(device)
    took = time.perf_counter() - begun
    gc.enable()
    if one.after is not None:
        one.after()
    return took / calls


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class Live(TorchDispatchMode):
    """Context: bytes of the tensors that were made inside of it and are alive, now and at most.

    Each storage counts once. What a backward will read is what is alive after the forward, wherever it is kept: in the
    graph, or in an object beside it. Works on tensors without data, too. What a kernel takes for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._seen(_storage(tensor), given)
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


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def alive_after(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward leaves for its backward, less the loss that it returns."""
    with Live() as live:
        loss = forward()
        return live.now - loss.nbytes


def peak(step: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes at most while `step` runs, beyond those that are there before it."""
    if device == "cpu":
        with Live() as live:
            step()
        return live.peak
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before
