"""Everything that has factors: W' = W + s B A. Any number of them at a layer are two products, not a loop."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import Frame, current
from .fused import as_rows, fused, narrow
from .gates import Gate, Gates, Reading, leading, per_row
from .layer import Layer
from .method import WeightMethod
from .rows import RowFactors, worth
from .site import first_input


class LowRankMethod(WeightMethod):
    """A weight method whose change is a product of two factors; it needs to give no more than those."""

    dropout: float = 0.0
    """Of the input to A, while training."""
    widens = False
    by_factors: bool = True
    """Whether the factors are all of it. False: `forward` adds noise of its own, so the fused paths leave it alone."""

    def __init__(self, config: Any, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        if not is_plain(layer.module):
            self.widens = True

    @property
    def drops(self) -> float:
        """What share of its input to A is dropped in a call now."""
        return self.dropout if self.training else 0.0

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


def is_fused(method: object) -> TypeGuard[LowRankMethod]:
    """Whether its factors are all that has to be known of a method."""
    return isinstance(method, LowRankMethod) and method.by_factors


class Term(NamedTuple):
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
    if not layer.kind.factors:
        raise TypeError(
            f"{layer.path!r} is a {type(layer.module).__name__}; its weight is no matrix, so it has no factors."
        )
    at = Reading(layer.path, x, y)
    for group in _by_dropout(terms):
        if layer.kind.name == "linear" and x.dtype == y.dtype and _can_fuse(x):
            y = _product(x, y, None, group, rows, at)[0]
        else:
            y = _added(layer, x, y, group, rows, at)
    return y


def _by_dropout(terms: Sequence[Term]) -> list[list[Term]]:
    """Terms that drop the same share of their inputs drop the same ones."""
    found: dict[float, list[Term]] = {}
    for term in terms:
        found.setdefault(term.method.drops, []).append(term)
    return list(found.values())


def _added(layer: Layer, x: Tensor, y: Tensor, terms: Sequence[Term], rows: Tensor | None, at: Reading) -> Tensor:
    """The definition, for layers of every kind."""
    dtype = x.dtype if x.is_floating_point() else y.dtype
    share = terms[0].method.drops if x.is_floating_point() else 0.0
    factors = [term.method.factors() for term in terms]
    down = torch.cat([a.to(dtype) for a, _, _ in factors])
    up = torch.cat([b.to(dtype) for _, b, _ in factors], dim=1)
    z = layer.kind.apply(layer.module, F.dropout(x, share), down)  # (B, ..., R), or (B, R, ...) for a convolution
    gate = _gate(terms, factors, rows, at, z.dim(), z)
    if isinstance(gate, Tensor) and gate.dim() > 1 and layer.kind.channel == 1:
        gate = gate.movedim(-1, 1)
    elif isinstance(gate, Tensor):
        gate = layer.along_channels(gate, z)
    return y + layer.mix(z * gate, up).to(y.dtype)


_Factors = tuple[Tensor, Tensor, float]


def _gate(
    terms: Sequence[Term], factors: Sequence[_Factors], rows: Tensor | None, at: Reading, dims: int, like: Tensor
) -> Tensor | float:
    """g_i s_i of all terms, as a factor of (B, ..., R) with `dims` dims: a number, (R,) or (B or 1, ..., R)."""
    if rows is not None and (frame := current()) is not None and not torch.compiler.is_compiling():
        tables = [term.gates.table for term in terms]
        if None not in tables:
            return _numbers(tables, factors, rows, dims, like, frame)
    gates = [term.gates.value(rows, at) * scale for term, (_, _, scale) in zip(terms, factors, strict=True)]
    if len(gates) == 1 and isinstance(gates[0], float):
        return gates[0]
    ranks = [a.shape[0] for a, _, _ in factors]
    if all(isinstance(g, float) for g in gates):
        numbers = [float(g) for g, r in zip(gates, ranks, strict=True) for _ in range(r)]
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)
    parts = [leading(torch.as_tensor(g, dtype=like.dtype, device=like.device), dims - 1) for g in gates]
    shape = torch.broadcast_shapes((1,) * (dims - 1), *[p.shape for p in parts])  # (B or 1, ...)
    columns = [p.expand(shape)[..., None].expand(*shape, r) for p, r in zip(parts, ranks, strict=True)]
    return torch.cat(columns, dim=-1)


def _numbers(
    tables: Sequence[Any], factors: Sequence[_Factors], rows: Tensor, dims: int, like: Tensor, frame: Frame
) -> Tensor:
    """`_gate` where all gates are numbers: made once in a call for all layers that have the same ones."""
    columns = tuple((table, scale, b.shape[1]) for table, (_, b, scale) in zip(tables, factors, strict=True))
    key = columns, dims, len(like), like.dtype, like.device
    if (known := frame.gates.get(key)) is None:
        each = [[g * scale for g in table] for table, scale, r in columns for _ in range(r)]  # R x compositions
        chosen = torch.tensor(each, dtype=like.dtype).T[per_row(rows, len(like))].to(like.device)
        known = frame.gates[key] = chosen.view(len(chosen), *[1] * (dims - 2), -1)
    return known


def _can_fuse(x: Tensor) -> bool:
    """Whether fused.py can do it at a linear layer: outside of what traces or transforms functions."""
    return (
        x.is_floating_point()
        and x.dim() > 1
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    )


def _product(
    x: Tensor,
    y: Tensor | None,
    linear: Any,
    terms: Sequence[Term],
    rows: Tensor | None,
    at: Reading,
    z: Tensor | None = None,
    others: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """(y with the terms added, their z, the z of each of `others`): see fused.Product."""
    factors = [term.method.factors() for term in terms]
    gate = _gate(terms, factors, rows, at, x.dim(), x)
    if isinstance(gate, Tensor) and gate.dim() > 1:
        gate = gate.expand(*x.shape[:-1], -1).flatten(0, -2)  # (N, R)
    return fused(x, y, linear, _up(factors), gate, terms[0].method.drops, z, (_down(factors), *others))


def _down(factors: Sequence[_Factors]) -> Tensor:
    return factors[0][0] if len(factors) == 1 else torch.cat([a for a, _, _ in factors])


def _up(factors: Sequence[_Factors]) -> Tensor:
    return factors[0][1] if len(factors) == 1 else torch.cat([b for _, b, _ in factors], dim=1)


class LowRankCall:
    """What a plan has at a layer where everything that is active has factors."""

    def __init__(self, layer: Layer, terms: Sequence[Term]) -> None:
        self.layer, self.terms = layer, tuple(terms)
        self.linear = layer.kind.name == "linear"
        self.dry = not any(term.method.dropout for term in terms)
        self.rows = self._row_factors()
        self.siblings: list[LowRankCall] = []
        """At layers that are called after this one, as a rule with the same input: keys and values after queries."""

    def _row_factors(self) -> RowFactors | None:
        """What each composition of a mixed batch has here, if that can be stacked and is worth it."""
        count = len(self.terms[0].gates.each)
        if not self.linear or count == 1:
            return None
        uses: list[list[tuple[LowRankMethod, float]]] = [[] for _ in range(count)]
        ups: dict[int, Tensor] = {}
        for term in self.terms:
            if (numbers := term.gates.numbers) is None:
                return None
            _, ups[id(term.method)], scale = term.method.factors()
            for c, number in numbers:
                uses[c].append((term.method, number * scale))
        return RowFactors(uses) if worth(uses, list(ups.values())) else None

    def goes_with(self, other: "LowRankCall") -> bool:
        """Whether both can be made in one product, in calls in which both drop the same."""
        return self.linear and other.linear

    def share(self) -> float | None:
        """What all of its terms drop of their input in a call now; None where they differ."""
        if self.dry:
            return 0.0
        shares = {term.method.drops for term in self.terms}
        return shares.pop() if len(shares) == 1 else None

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, call = first_input(forward, args, kwargs)
        share = self.share()
        if not self.linear or share is None or not _can_fuse(x):
            return added(self.layer, x, call(x), self.terms, frame.rows)
        rows = frame.rows_of(x) if self.rows is not None and x.dim() == 3 else None
        plain = getattr(forward, "func", None) is nn.Linear.forward
        if not torch.is_grad_enabled() and not share:
            return self._inferred(x, call(x), frame, rows, plain)
        runs = plain and _is_frozen(self.layer.module, x)
        y = None if runs else call(x)
        used = x if y is None else x.to(y.dtype)
        given = frame.given.pop(self, None) if frame.given else None
        linear = self.layer.module if runs else None
        if rows is not None and self.rows is not None:
            down, up, gate = self.rows.stacked(rows)
            return fused(used, y, linear, up, gate, share, None, (down,))[0]
        z = given[1] if given is not None and given[0] is x else None
        siblings = [s for s in self.siblings if s.share() == share] if z is None else []
        others = [_down([t.method.factors() for t in s.terms]) for s in siblings]
        at = Reading(self.layer.path, x, x if y is None else y)
        out, _, *zs = _product(used, y, linear, self.terms, frame.rows, at, z, others)
        for sibling, made in zip(siblings, zs, strict=True):
            frame.given[sibling] = x, made
        return out

    def _inferred(self, x: Tensor, y: Tensor, frame: Frame, chosen: tuple[int, ...] | None, fresh: bool) -> Tensor:
        """Where there is no backward. `fresh`: y was made in this call and belongs to nobody else."""
        if chosen is not None and self.rows is not None:
            made = frame.stacked.get(self)
            if made is None or len(made[0]) != len(chosen) or made[0].dtype != y.dtype:
                made = frame.stacked[self] = self.rows.kept(chosen, y.dtype)
            down, up = made
            return _plus(y, narrow(x.to(y.dtype), down), up, fresh)
        factors = [term.method.factors() for term in self.terms]
        x = x.to(y.dtype)
        gate = _gate(self.terms, factors, frame.rows, Reading(self.layer.path, x, y), x.dim(), x)
        z = F.linear(x, _down(factors).to(y.dtype))
        scale, z = (1.0, z * gate) if isinstance(gate, Tensor) else (gate, z)
        return _plus(y, z, _up(factors).to(y.dtype).mT, fresh, scale)


def _plus(y: Tensor, z: Tensor, up: Tensor, fresh: bool, scale: float = 1.0) -> Tensor:
    """y + scale z up, in place where y is fresh. up is (R, O), or (B, R, O)."""
    if up.dim() == 3:
        return y.baddbmm_(z, up, alpha=scale) if fresh else torch.baddbmm(y, z, up, alpha=scale)
    flat, z = as_rows(y, up), as_rows(z, up)
    if fresh and y.is_contiguous():
        flat.addmm_(z, up, alpha=scale)
        return y
    return torch.addmm(flat, z, up, alpha=scale).view(y.shape)


def _is_frozen(linear: Any, x: Tensor) -> bool:
    """Whether fused.Product can run a linear layer of PyTorch's itself: frozen, no tensors of another kind."""
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and weight.dtype == x.dtype
        and (bias is None or not bias.requires_grad)
        and not torch.is_autocast_enabled(x.device.type)
    )


def is_plain(module: nn.Module) -> bool:
    """Whether factors can be applied to what goes in and comes out: not for grouped convolutions."""
    return vars(module).get("groups", 1) == 1  # not getattr: modules are slow to tell that they lack something
