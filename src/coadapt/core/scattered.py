"""Changes of few entries of a matrix: where these stand, and the matrix that holds them."""

import functools
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


def scattered(values: Tensor, at: Tensor, size: int) -> Tensor:
    """(size,) zeros, but for `values` (N,) at the places `at` (N,), which differ."""
    return values.new_zeros(size).scatter(0, at, values)


@functools.lru_cache(maxsize=32)
def drawn(count: int, size: int, seed: int | None) -> Tensor:
    """(count,) places out of `size`, as the field's library draws them: layers of one shape have the same.

    Without a seed they are those of a generator that nobody has seeded, which are always the same, too.
    """
    generator = torch.Generator("cpu")
    if seed is not None:
        generator.manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:count].clone()


class Places(nn.Module):
    """Places that a seed gives again, so that neither files nor states hold them."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        super().__init__()
        self.at, self.size = drawn(count, size, seed), size  # no buffer: it would be lost on a base on the meta device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved = fn(self.at)
        self.at = self.at if moved.is_meta else moved
        return super()._apply(fn, recurse)

    def forward(self, values: Tensor) -> Tensor:
        """(N,) -> (size,)"""
        return scattered(values, self.at.to(values.device), self.size)


def check_count(who: str, name: str, count: int, size: int, path: str) -> None:
    """Refuses more entries than there are."""
    if count > size:
        raise ValueError(
            f"{who}: {name} asks for {count} entries of {path!r}, which has {size}. Ask for at most those."
        )
