"""One tensor of a file."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its key, and how it comes from and goes into the adapter."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


def whole(key: str, value: Tensor, shape: tuple[int, ...] | None = None) -> Entry:
    """A parameter as it is, in another shape where one is given."""
    shape = tuple(value.shape) if shape is None else shape
    return Entry(key, shape, lambda: value.detach().reshape(shape), lambda t: copy(t, value))


def zeros(key: str, shape: tuple[int, ...]) -> Entry:
    """The field writes zeros for what is not there."""
    return Entry(key, shape, lambda: torch.zeros(shape), lambda _: None)


@torch.no_grad()
def copy(source: Tensor, target: Tensor) -> None:
    refuse_meta(target)
    target.copy_(source.reshape(target.shape))


def refuse_meta(target: Tensor) -> None:
    if target.is_meta:
        raise ValueError("The base has no weights yet (its device is meta), so adapters cannot be loaded onto it.")
