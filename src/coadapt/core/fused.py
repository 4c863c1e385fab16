"""The fused path of products at a linear layer: y = x W^T + b + (g z) B^T with z = d(x) A^T, as one autograd function.

lowrank.py has the same thing written out, which is the definition. This one keeps x once for all layers that read it,
adds in place, multiplies in the dtype of x with the factors as they are kept, and keeps no mask for its dropout d.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Dropped:
    """The mask of a dropout over (N, I), in few numbers: each row is a window into one line of random zeros and ones.

    Every entry is 0 with probability p, those of a row independently of each other. Two rows start at different places
    of the line, but for one in `STARTS`. Drawing N * I numbers, twice with the backward, would take longer than the
    frozen layer itself.
    """

    STARTS = 4096

    def __init__(self, x: Tensor, p: float) -> None:
        self.width = x.shape[-1]
        line = torch.empty(self.width + self.STARTS - 1, device=x.device, dtype=torch.float32)
        self.line = line.bernoulli_(1 - p).to(x.dtype)
        self.starts = torch.randint(self.STARTS, (x.numel() // self.width,), device=x.device)

    def __call__(self) -> Tensor:
        """(N, I)"""
        return self.line.unfold(0, self.width, 1).index_select(0, self.starts)


class Product(torch.autograd.Function):
    """(y, z, *z of others): the layer with its product, and what other layers that read the same x need of theirs.

    x (..., I), weight (O, I), B = up (O, R), A = down (R, I), z (N, R), gate a number or broadcast to z. With factors
    for each row of the batch x is (B, T, I), up (B, O, R), down (B, R, I) and z (B, T, R). What is not given is None: y
    where the layer itself is run here, weight where it has run and gave y; z where it is made here, from `downs`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        up: Tensor,
        gate: Tensor | float,
        z: Tensor | None,
        dropped: Dropped | None,
        *downs: Tensor,
    ) -> tuple[Tensor, ...]:
        others: tuple[Tensor, ...] = ()
        if z is None:
            z, *rest = _down(x, dropped, downs)
            others = tuple(rest)
        out = F.linear(x, weight, bias) if y is None else y.clone()  # type: ignore[arg-type]
        out = out.contiguous()  # it is written to as rows
        scale, zg = (1.0, z * gate) if isinstance(gate, Tensor) else (gate, z)
        _add(as_rows(out, up), zg, _as(up, x.dtype).mT, scale)
        ctx.gate, ctx.dropped, ctx.ran = None if isinstance(gate, Tensor) else gate, dropped, y is None
        ctx.save_for_backward(x if downs else None, weight, up, gate if ctx.gate is None else None, z, *downs)
        ctx.set_materialize_grads(False)
        return out, z, *others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dy, dz, *dothers = gradients
        x, weight, up, gate, z, *downs = ctx.saved_tensors
        wants = ctx.needs_input_grad
        dx = dup = dgate = None
        if dy is not None:
            gate = ctx.gate if gate is None else gate
            rows = as_rows(dy, up)
            dgated = rows @ _as(up, dy.dtype)
            more = _times(dgated, gate)
            dz = more if dz is None else dz + more
            if wants[4]:
                dup = _as(_times(z, gate).mT @ rows, up.dtype).mT
            if wants[5]:
                dgate = (dgated * z).sum_to_size(gate.shape).to(gate.dtype)
            if ctx.ran and wants[0]:
                dx = (rows @ weight).view(*dy.shape[:-1], -1)
        ddowns: list[Tensor | None] = []
        if downs:
            dx, ddowns = _down_backward(x, downs, (dz, *dothers), dx, ctx.dropped, wants[0])
        return dx, None if ctx.ran else dy, None, None, dup, dgate, None if downs else dz, None, *ddowns


def fused(
    x: Tensor,
    y: Tensor | None,
    linear: Any,
    up: Tensor,
    gate: Tensor | float,
    share: float,
    z: Tensor | None,
    downs: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """`Product`, with a new mask where a `share` of x is to be dropped; `linear` is the layer where y is None."""
    dropped = None
    if share > 0:
        gate = gate / (1 - share)
        dropped = Dropped(x, share) if z is None else None
    weight, bias = (None, None) if linear is None else (linear.weight, linear.bias)
    return Product.apply(x, y, weight, bias, up, gate, z, dropped, *(downs if z is None else ()))  # type: ignore[no-any-return]


def _down(x: Tensor, dropped: Dropped | None, downs: tuple[Tensor, ...]) -> list[Tensor]:
    """d(x) A^T for each A, in one product: (N, R) each."""
    rows = as_rows(x, downs[0])
    if dropped is not None:
        rows = rows * dropped().view(rows.shape)
    z = narrow(rows, _as(_joined(downs), x.dtype))
    return [z] if len(downs) == 1 else [p.contiguous() for p in z.split([d.shape[-2] for d in downs], -1)]


def _down_backward(
    x: Tensor,
    downs: list[Tensor],
    dzs: tuple[Tensor | None, ...],
    dx: Tensor | None,
    dropped: Dropped | None,
    wants_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x, added to dx, and of each A whose z was used."""
    used = [(i, dz) for i, dz in enumerate(dzs) if dz is not None]
    ddowns: list[Tensor | None] = [None] * len(downs)
    if not used:
        return dx, ddowns
    few = [downs[i] for i, _ in used]
    rows, dz = as_rows(x, few[0]), used[0][1] if len(used) == 1 else torch.cat([dz for _, dz in used], -1)
    mask = None if dropped is None else dropped().view(rows.shape)
    ddown = dz.mT @ (rows if mask is None else rows * mask)
    parts = (ddown,) if len(used) == 1 else ddown.split([d.shape[-2] for d in few], -2)
    for (i, _), part in zip(used, parts, strict=True):
        ddowns[i] = _as(part, downs[i].dtype)
    if wants_dx:
        down = _as(_joined(few), x.dtype)
        if dx is None:
            dx = (dz @ down if mask is None else (dz @ down) * mask).view(x.shape)
        elif mask is None:
            _add(as_rows(dx, few[0]), dz, down)
        else:
            as_rows(dx, few[0]).addcmul_(dz @ down, mask)
    return dx, ddowns


def as_rows(x: Tensor, factor: Tensor) -> Tensor:
    """x as (N, D); as it is, (B, T, D), where each row has a factor of its own."""
    return x if factor.dim() == 3 or x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _as(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor if factor.dtype == dtype else factor.to(dtype)


def _joined(downs: Sequence[Tensor]) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(tuple(downs), -2)


def narrow(x: Tensor, down: Tensor) -> Tensor:
    """x A^T, written so that the few rows of A come first: batched products are twice as fast in that order."""
    return torch.bmm(down, x.mT).mT if down.dim() == 3 else F.linear(x, down)


def _times(z: Tensor, gate: Tensor | float) -> Tensor:
    return z if isinstance(gate, float) and gate == 1.0 else z * gate


def _add(y: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """y += scale a b"""
    if y.dim() == 3:
        y.baddbmm_(a, b, alpha=scale)
    else:
        y.addmm_(a, b, alpha=scale)
