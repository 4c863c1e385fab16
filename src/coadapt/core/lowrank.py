"""Everything that has factors: W' = W + s B A. Any number of them at a layer are two products, not a loop."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import Frame
from .gates import Gate, Gates, Reading, leading
from .layer import Layer
from .method import WeightMethod
from .site import first_input


class LowRankMethod(WeightMethod):
    """A weight method whose change is a product of two factors; it needs to give no more than those."""

    dropout: float = 0.0
    """Of the input to A, while training."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (R, I, *K), B (O, R) and the scale s; for experts A (E, R, I) and B (E, O, R)."""

    def merge(self, weight: Tensor) -> Tensor:
        a, b, scale = self.factors()
        change = b @ a if b.dim() == 3 else (b @ a.flatten(1)).view(weight.shape)  # (E, O, I) of experts
        return weight + scale * change

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if getattr(base.module, "groups", 1) > 1:  # B mixes all channels, A sees those of its group only
            return super().forward(x, base)
        return added(base, x, base(x), [Term(self, Gates((Gate(),)))], None)


@dataclass(frozen=True)
class Term:
    """One method at a layer, with its gates."""

    method: LowRankMethod
    gates: Gates


def added(layer: Layer, x: Tensor, y: Tensor, terms: Sequence[Term], rows: Tensor | None) -> Tensor:
    """y + sum_i g_i s_i B_i (A_i x), multiplied in the dtype that the layer computes in.

    Args:
        x: the layer's input, (B, ..., I); indices for an embedding.
        y: what the layer made of it.
        rows: (B,) which composition each row uses, or None.
    """
    at = Reading(layer.path, x, y)
    dry: list[Term] = []
    for term in terms:
        if term.method.training and term.method.dropout > 0 and x.is_floating_point():  # drops inputs of its own
            y = _added(layer, F.dropout(x, term.method.dropout), y, [term], rows, at)
        else:
            dry.append(term)
    return _added(layer, x, y, dry, rows, at) if dry else y


def _added(layer: Layer, x: Tensor, y: Tensor, terms: Sequence[Term], rows: Tensor | None, at: Reading) -> Tensor:
    dtype = x.dtype if x.is_floating_point() else y.dtype
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    scales: list[float | Tensor] = []
    for term in terms:
        a, b, scale = term.method.factors()
        downs.append(a.to(dtype))
        ups.append(b.to(dtype))
        scales.append(term.gates.value(rows, at) * scale)
    if not layer.kind.factors:
        raise TypeError(
            f"{layer.path!r} is a {type(layer.module).__name__}; its weight is no matrix, so it has no factors."
        )
    down = downs[0] if len(downs) == 1 else torch.cat(downs)
    z = layer.kind.apply(layer.module, x, down)  # (B, ..., R), or (B, R, ...) for a convolution
    if all(isinstance(s, float) for s in scales):
        if len(ups) == 1:
            return _plus(layer, y, z, ups[0], float(scales[0]))
        return _plus(layer, y, z, torch.cat([u * s for u, s in zip(ups, scales, strict=True)], dim=1), 1.0)
    z = z * _per_rank(scales, [u.shape[1] for u in ups], z, layer.kind.channel)
    return _plus(layer, y, z, ups[0] if len(ups) == 1 else torch.cat(ups, dim=1), 1.0)


def _plus(layer: Layer, y: Tensor, z: Tensor, up: Tensor, scale: float) -> Tensor:
    if layer.kind.channel == -1 and y.dim() > 1 and z.shape[:-1] == y.shape[:-1] and z.dtype == y.dtype:
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), up.mT, alpha=scale).view(y.shape)
    return y + scale * layer.mix(z, up).to(y.dtype)


def _per_rank(scales: Sequence[float | Tensor], ranks: Sequence[int], z: Tensor, channel: int) -> Tensor:
    """The gates of all terms, repeated over their ranks and shaped to multiply z."""
    parts = [torch.as_tensor(s, dtype=z.dtype, device=z.device) for s in scales]
    wide = [leading(p, z.dim() - 1) for p in parts]
    shape = torch.broadcast_shapes((1,) * (z.dim() - 1), *[p.shape for p in wide])  # (B or 1, ...)
    columns = [p.expand(shape)[..., None].expand(*shape, r) for p, r in zip(wide, ranks, strict=True)]
    gates = torch.cat(columns, dim=-1)  # (B or 1, ..., R)
    return gates if channel == -1 else gates.movedim(-1, 1)


class LowRankCall:
    """What a plan has at a layer where everything that is active has factors."""

    def __init__(self, layer: Layer, terms: Sequence[Term]) -> None:
        self.layer, self.terms = layer, tuple(terms)

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, call = first_input(forward, args, kwargs)
        return added(self.layer, x, call(x), self.terms, frame.rows)


def is_plain(module: nn.Module) -> bool:
    """Whether factors can be applied to what goes in and comes out: not for grouped convolutions."""
    return getattr(module, "groups", 1) == 1
