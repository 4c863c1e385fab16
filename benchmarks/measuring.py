"""Seconds of candidates that take turns, and bytes that are alive."""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coadapt.training.live import Live

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
