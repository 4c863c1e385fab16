"""What a composition does to the weights of a base, site by site: as factors where it has them, else as W' - W."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, ModuleCopy, Part
from ..core.around import around
from ..core.composition import Node, Seq, Sum, names, terms
from ..core.experts import Experts
from ..core.gates import Learned, Routed, is_zero
from ..core.layer import Around, Layer
from ..core.lowrank import LowRankMethod
from ..core.parameter import methods_at
from ..core.roles import Place
from ..methods.bitfit import BitFit


def fixed(node: Node) -> Node:
    """The composition with the values of its learned gates, and without what has the weight 0.

    Raises:
        ValueError: a gate per row, which no one adapter can stand for.
    """
    if isinstance(node, str):
        return node
    if isinstance(node, Seq):
        return Seq(*(fixed(child) for child in node.children))
    pairs = [(fixed(c), _number(w)) for c, w in zip(node.children, node.weights, strict=True) if not is_zero(w)]
    return Sum(*(c for c, _ in pairs), weights=[w for _, w in pairs])


def _number(weight: Any) -> float:
    if isinstance(weight, Routed) or (isinstance(weight, Learned) and weight.per_layer):
        what = "a router, whose gates depend on what goes in," if isinstance(weight, Routed) else "a gate per layer"
        raise ValueError(f"A composition with {what} cannot become one adapter. Keep it as a composition.")
    if isinstance(weight, Learned):
        return float(weight().detach())
    if isinstance(weight, Tensor):
        raise ValueError("A composition with a gate per row cannot become one adapter: its rows need different ones.")
    return float(weight)


def voters(node: Node) -> list[tuple[Node, float]]:
    """The members of the outermost sum with their weights; sums inside of it are written out, a Seq is one member."""
    if not isinstance(node, Sum):
        return [(node, 1.0)]
    pairs = zip(node.children, map(_number, node.weights), strict=True)
    return [(n, w * v) for child, w in pairs for n, v in voters(child)]


def averaged(node: Node) -> Node:
    """The weighted mean of the members: their sum over that of their weights. Raises ValueError where that is <= 0."""
    members = voters(node)
    total = sum(w for _, w in members)
    if total <= 0:
        raise ValueError(
            f"how='mean' divides by the sum of the weights, which is {total:g} here. Use 'linear' or 'svd'."
        )
    return Sum(*(n for n, _ in members), weights=[w / total for _, w in members])


@dataclass(frozen=True)
class Product:
    """B A, never multiplied out: B (..., O, R), A (..., R, I)."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def dense(self) -> Tensor:
        """(..., O, I)"""
        return self.b @ self.a


Change = Product | Tensor
"""A change of a weight: a product, a matrix (..., O, I), or a vector (O,)."""


def _svd(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., O, M), S (..., M), V (..., M, I); of a product without making (O, I): QR of both factors first."""
    if isinstance(change, Tensor):
        return torch.linalg.svd(change, full_matrices=False)
    left, b = torch.linalg.qr(change.b)
    right, a = torch.linalg.qr(change.a.mT)
    u, s, v = torch.linalg.svd(b @ a.mT, full_matrices=False)
    return left @ u, s, v @ right.mT


NOISE = 1e-7
"""Singular values below this share of the largest are rounding."""


def cut(change: Change, r: Any) -> Product:
    """The best approximation of rank `r`; "full": of as much rank as is more than rounding. At least 1.

    Of a share, the least rank that keeps so much of the squares' sum (of experts, in each).
    """
    u, s, v = _svd(change)
    real = int((s > NOISE * s.amax(-1, keepdim=True)).sum(-1).max())
    if isinstance(r, float):
        kept = s.double().square().cumsum(-1)
        r = 1 + int((kept < r * kept[..., -1:]).sum(-1).max())
    rank = max(1, min(real, s.shape[-1] if r == "full" else r))
    root = s[..., :rank].sqrt()
    return Product(u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :])


def norm(change: Change) -> float:
    """Frobenius."""
    return float(change.norm() if isinstance(change, Tensor) else _svd(change)[1].norm())


def distance(one: Change, other: Change) -> float:
    """|one - other|, without multiplying products out where both are."""
    if isinstance(one, Product) and isinstance(other, Product):
        return norm(Product(torch.cat([one.b, -other.b], -1), torch.cat([one.a, other.a], -2)))
    return float((dense(one) - dense(other)).norm())


def dense(change: Change) -> Tensor:
    """(..., O, I), or (O,)"""
    return change.dense() if isinstance(change, Product) else change


class _Wide(Around):
    """A layer in the dtype in which changes are computed: W' - W of float32 weights would be mostly rounding."""

    def __init__(self, inner: Layer) -> None:
        super().__init__(inner)
        bias = inner.bias
        self._bias = None if bias is None else wide(bias.detach())

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    def weight(self) -> Tensor:
        return wide(_there(self.inner.weight(), self.path))


def _there(value: Tensor, path: str) -> Tensor:
    if value.is_meta:
        raise ValueError(
            f"{path!r} has no values here (meta device, or offloaded), so what its adapters change cannot be computed. "
            "Load the base."
        )
    return value


def wide(tensor: Tensor) -> Tensor:
    """In double precision, but on Apple's devices, which have none."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


class Site:
    """A layer, or a parameter, of the base, with the methods that some adapters have there."""

    def __init__(self, place: Place, methods: Mapping[str, Sequence[Any]]) -> None:
        self.place, self.methods = place, methods
        self.layer = place.layer
        self._wide = _Wide(self.layer)

    @property
    def is_matrix(self) -> bool:
        """Whether factors can say what changes here; a norm's weight is a vector."""
        return self.layer.kind.factors

    def moves(self, node: Node) -> bool:
        """Whether `node` changes the weight here, and not only the bias."""
        return any(not isinstance(method, BitFit) for name in names(node) for method in self.methods.get(name, ()))

    def factors(self, node: Node) -> list[tuple[Tensor, Tensor, float]] | None:
        """A (..., R, I), B (..., O, R) and the scale, gate included, of each adapter; None where one has no factors."""
        out: list[tuple[Tensor, Tensor, float]] = []
        for name, gate in terms(node, self.methods.__contains__):
            for method in self.methods[name]:
                if isinstance(method, BitFit):
                    continue
                if not isinstance(method, LowRankMethod | Experts) or (own := method.factors()) is None:
                    return None
                a, b, scale = own
                a, b = (wide(_there(factor, self.place.path)) for factor in (a, b))
                out.append((a if b.dim() == 3 else a.flatten(1), b, gate.number * scale))  # (E, R, I) of experts
        return out

    def change(self, node: Node) -> Change:
        """W' - W, exact whatever the composition, which must move the weight."""
        found = self.factors(node)
        if found is not None:
            a, b = torch.cat([a for a, _, _ in found], -2), torch.cat([s * b for _, b, s in found], -1)
            return Product(b, a)
        before = self._wide.weight()
        after = around(node, self._wide, self.methods).weight() - before
        return after.flatten(1) if self.is_matrix and not self.place.parameter else after

    def bias(self, node: Node) -> Tensor | None:
        """b' - b, (O,); None where biases stay as they are."""
        before, after = self._wide.bias, around(node, self._wide, self.methods).bias
        if after is before or after is None:
            return None
        return wide(after) if before is None else wide(after) - _there(before, self.place.path)

    def obstacle(self) -> str:
        """The method that has no factors, and where."""
        every = (m.each[0] if isinstance(m, Experts) else m for found in self.methods.values() for m in found)
        kinds = (type(m).__name__ for m in every if not isinstance(m, LowRankMethod))
        return f"{next(k for k in kinds if k != BitFit.__name__)} at {self.place.path!r}"


def sites(adapters: Mapping[str, Adapter], node: Node) -> Sequence[Site]:
    """Every layer and parameter that `node` adapts (and does not copy)."""
    found: dict[tuple[Any, str], dict[str, list[Part]]] = {}
    for name in names(node):
        for part in adapters[name].parts:
            if not isinstance(part.method, ModuleCopy):
                key = part.place.module, part.place.parameter
                found.setdefault(key, {}).setdefault(name, []).append(part)
    out: list[Site] = []
    for parts in found.values():
        place = next(iter(parts.values()))[0].place
        methods = {name: methods_at(own) for name, own in parts.items()}
        out.append(Site(replace(place, path=place.site, expert=None), methods))
    return out
