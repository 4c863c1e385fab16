"""Rotations of what goes into a layer: as maps of its weight, and made of trained numbers by Cayley's transform."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..config import PeftConfig
from .layer import Layer
from .method import WeightMethod


class Rotation(WeightMethod):
    """W' = W R^T: what goes in is rotated, x R; at an embedding what comes out. No product of the weight's size."""

    widens = False

    @abstractmethod
    def made(self) -> Any:
        """What the rotation consists of, made of the parameters."""

    @abstractmethod
    def rotated(self, x: Tensor, made: Any, back: bool = False) -> Tensor:
        """(..., I) -> (..., I): x R, or x R^T, in the dtype of x."""

    def in_call(self, made: Any) -> Any:
        """`made`, as it is used in a call now (with dropout, say)."""
        return made

    def merge(self, weight: Tensor) -> Tensor:
        made = self.made()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.kind == "embedding":
            return self.rotated(wide.mT, made).mT
        return self.rotated(wide.flatten(1), made, back=True).view(weight.shape)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        made = self.in_call(self.made())
        match self.kind:
            case "linear":
                return base(self.rotated(x, made))
            case "embedding":
                return self.rotated(base(x), made)
            case _:
                return super().forward(x, base)


def check_blocks(config: PeftConfig, number: str, size: str) -> None:
    """Refuses both or none of the two fields that put features into blocks: how many, or how large."""
    asked, large = getattr(config, number), getattr(config, size)
    config.positive(*(name for name in (number, size) if getattr(config, name) != 0))
    if bool(asked) == bool(large):
        raise ValueError(
            f"{type(config).__name__}: {number}={asked} blocks of {size}={large}: give one of them, and 0 for the "
            "other; their product is the number of input features."
        )


def features(layer: Layer) -> int:
    """How many features are rotated at a layer: all that go into one output, I K; D of an embedding."""
    return layer.shape[0] if layer.kind.name == "embedding" else math.prod(layer.shape[1:])


def skew(values: Tensor, size: int) -> Tensor:
    """(..., n (n - 1) / 2), what stands above the diagonal row by row -> (..., n, n) with Q^T = -Q."""
    rows, columns = torch.triu_indices(size, size, 1, device=values.device)
    above = values.new_zeros(*values.shape[:-1], size * size).index_copy(-1, rows * size + columns, values)
    above = above.unflatten(-1, (size, size))
    return above - above.mT


def cayley(q: Tensor) -> Tensor:
    """(..., n, n) skew-symmetric -> R - I for the rotation R = (I - Q) (I + Q)^-1, in fp32 at least.

    Without the identity, half precision keeps what a small Q says.
    """
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(one + q, -2 * q, left=False)


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """R - I for the rotation R = (I + Q) (I - Q)^-1, by a series: 2 Q + 2 Q^2 + ... + Q^(terms - 1).

    No matrix is inverted, and R is a rotation as far as the powers that are left out are small. As the field counts,
    the series of 3 terms is that of 4, and that of 2 is 2 Q.
    """
    if terms == 2:
        return 2 * q
    power, total = q, 2 * q
    for _ in range(2, max(terms, 4) - 1):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def in_blocks(x: Tensor, turns: Tensor) -> Tensor:
    """(..., b k) and R_i - I, (b, k, k) or (1, k, k) for all -> (..., b k): each block of x times its R_i."""
    blocks = x.unflatten(-1, (-1, turns.shape[-1]))  # (..., b, k)
    turns = turns.to(x.dtype).expand(blocks.shape[-2], -1, -1)
    return x + torch.einsum("...bk,bkc->...bc", blocks, turns).flatten(-2)
