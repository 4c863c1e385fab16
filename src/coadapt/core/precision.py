"""Adapters in full precision on a base in half precision: they multiply in its dtype and lose nothing of themselves."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(module: Any, x: Tensor) -> Tensor:
    """A linear layer of an adapter, multiplied in the dtype of x as the base's own are."""
    bias: Tensor | None = module.bias
    return F.linear(x, module.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def wide(module: nn.Module, x: Tensor) -> Tensor:
    """A module of an adapter, worked out in the dtype of its own parameters; the result has that of x."""
    own = next((p.dtype for p in module.parameters()), x.dtype)
    return module(x.to(own)).to(x.dtype)


def scaled(y: Tensor, factors: Tensor) -> Tensor:
    """y * factors, for factors that broadcast against y."""
    return y * factors if factors.dtype == y.dtype else _Scaled.apply(y, factors)


class _Scaled(torch.autograd.Function):
    """As if it were multiplied in the dtype of the factors, without a copy of y in that dtype, made or saved.

    Factors stay near 1, where bf16 has steps of 1/128: rounded, they would not be seen to train. So they are split into
    what half precision has of them and the rest.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(y, factors)
        rounded = factors.to(y.dtype)
        return torch.addcmul(y * (factors - rounded).to(y.dtype), y, rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (y, factors), (g,) = ctx.saved_tensors, gradients
        return (
            g * factors.to(g.dtype) if ctx.needs_input_grad[0] else None,
            (g * y).sum_to_size(factors.shape).to(factors.dtype) if ctx.needs_input_grad[1] else None,
        )


def plus_product(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """W + B A of (O, I), (O, R) and (R, I) in the dtype of W, rounded once, with no other matrix of that size made.

    Factors of a higher precision are split into what half precision has of them and the rest.
    """
    if not weight.is_contiguous():  # a weight that is stored as (I, O)
        return plus_product(weight.mT, down.mT, up.mT).mT
    dtype = weight.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.addmm(weight, up.to(dtype), down.to(dtype))
    b, a = up.to(dtype), down.to(dtype)
    b_rest, a_rest = (up - b).to(dtype), (down - a).to(dtype)
    return torch.addmm(weight, torch.cat([b, b, b_rest], dim=1), torch.cat([a, a_rest, a]))


def squares(weight: Tensor) -> Tensor:
    """(O, I, *K) -> (O,) the squared length of each row, summed in fp32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=dtype).square()
