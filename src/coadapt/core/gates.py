"""Gates: what stands before a change. Numbers, learned numbers, one number per row, or what a router makes of the call.

Always tensor data, never a Python branch, so that other gates need no other graph.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .frame import current


class Reading:
    """What gates can read at one site in one call.

    Args:
        site: the site's name, as in `Spot.site`.
        x: what the site is given, (B, ..., I); ids at an embedding.
        y: what the frozen call has made of it.
    """

    __slots__ = ("_known", "site", "x", "y")

    def __init__(self, site: str, x: Tensor, y: Tensor) -> None:
        self.site, self.x, self.y = site, x, y
        self._known: dict[int, Any] = {}

    @property
    def features(self) -> Tensor:
        """(B, ..., D): the input; at an embedding, what was looked up."""
        return self.x if self.x.is_floating_point() else self.y

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """`make()`, worked out once for all gates that ask at this site."""
        found = self._known.get(id(key))
        if found is None:
            found = self._known[id(key)] = make()
        return found


@dataclass(frozen=True)
class Spot:
    """A site as it is when gates are prepared for it."""

    site: str
    path: str
    width: int
    """D of the features that are read there."""
    outputs: int
    """D of what the site gives."""
    children: tuple[int, ...]
    """Which of the gated children have something here."""
    methods: Mapping[int, Sequence[nn.Module]]
    """What each of them has here."""
    kind: str
    """"layer", "attention" or "input"."""
    embeds: bool
    """Whether it is an embedding, which is given ids."""
    tokens: bool
    """Whether features stand last: (B, ..., D)."""
    stream: str
    """The path of the stack whose tokens are read; "" where the model has none."""
    causal: bool
    """Whether a token must not know of later ones there."""

    def described(self) -> "Spot":
        """The same without the adapters themselves."""
        return replace(self, methods={})


def attention_site(path: str) -> str:
    return f"attention:{path}"


def input_site(path: str) -> str:
    return f"input:{path}"


def stream_site(path: str) -> str:
    return f"stream:{path}"


def span_site(path: str) -> str:
    return f"span:{path}"


class TrainedGate(nn.Module):
    """A gate with parameters of its own, which are part of the composition that it stands in."""

    def prepare(self, spots: Sequence[Spot]) -> None:
        """Makes what depends on the model; does nothing the second time.

        Raises:
            ValueError: it cannot stand at one of these sites, or was prepared for others.
        """
        raise NotImplementedError

    def shares(self) -> dict[int, float]:
        """Child -> its gate now; of routers the mean since this was last asked."""
        raise NotImplementedError


def layer_of(path: str) -> str:
    """The layer that a site lies in: its path up to the first number; "" outside of all layers."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return found[0] if found else ""


class Learned(TrainedGate):
    """A gate that is trained: a positive number, stored as its logarithm.

    Args:
        start: its value at the start, greater than 0.
        per_layer: one number for each layer of the model (and one for what lies outside of them).
    """

    def __init__(self, start: float = 1.0, per_layer: bool = False) -> None:
        super().__init__()
        if not start > 0:
            raise ValueError(f"A learned gate starts above 0 (it is stored as its logarithm); got {start}.")
        self.start, self.per_layer = float(start), per_layer
        self.log_gate = nn.Parameter(torch.tensor(math.log(start)))
        self.layers: dict[str, int] = {}

    def prepare(self, spots: Sequence[Spot]) -> None:
        layers = list(dict.fromkeys(layer_of(spot.path) for spot in spots))
        if not self.per_layer or (self.layers and self.layers.keys() >= set(layers)):
            return  # of those that it has it may stand before a few: where an adapter went, others are left
        if self.layers:
            raise ValueError(
                f"{self!r} was made for {len(self.layers)} layers and stands before adapters at {len(layers)} now; "
                "make a new Learned(per_layer=True)."
            )
        self.spread(layers)

    def spread(self, layers: Sequence[str]) -> None:
        """Has one number for each of these layers from now on, which all start from the one that it has."""
        self.layers = {layer: i for i, layer in enumerate(layers)}
        old = self.log_gate.detach()
        self.log_gate = nn.Parameter(old.expand(len(layers)).clone(), requires_grad=self.log_gate.requires_grad)

    def forward(self, path: str = "") -> Tensor:
        """The gate, a scalar; that of the layer which `path` lies in, where each has its own."""
        if not self.per_layer:
            return self.log_gate.exp()
        return self.log_gate[self.layers[layer_of(path)]].exp()

    def values(self) -> dict[str, float]:
        """Layer -> gate; "" -> gate where there is one for all."""
        gates = self.log_gate.detach().exp().reshape(-1).tolist()
        return dict(zip(self.layers or ("",), gates, strict=True))

    def shares(self) -> dict[int, float]:
        return {0: float(self.log_gate.detach().exp().mean())}

    def __repr__(self) -> str:
        return f"Learned({self.shares()[0]:.3g}{', per_layer=True' if self.per_layer else ''})"


class Chooser(TrainedGate):
    """What makes the gates of all children of a Sum: see routers.py."""

    def choose(self, at: Reading) -> Mapping[int, Tensor | float]:
        """Child -> its gate at this site: (), (B,) or features.shape[:-1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Routed:
    """The gate that a router gives one child of its Sum."""

    router: Chooser
    child: int

    @property
    def gate(self) -> TrainedGate:
        return self.router


Weight = float | Learned | Routed | Tensor
"""A number, a learned one, what a router chooses, or a tensor with one number per row, (B,), or token, (B, T)."""


def checked_weight(gate: Any) -> Weight:
    """A gate from what people write. Raises ValueError for what is none."""
    if isinstance(gate, Learned | Routed):
        return gate
    if isinstance(gate, Tensor):
        if gate.dim() > 2:
            raise ValueError(
                f"A gate that is a tensor has one number a row, (B,), or a token, (B, T); got {tuple(gate.shape)}."
            )
        if gate.dim() == 0 and gate.requires_grad:
            raise ValueError("A gate that is one number and trained is a Learned(); a tensor would not be trained.")
        if gate.is_complex() or not bool(gate.isfinite().all()):
            raise ValueError(f"A gate per row or token needs finite numbers; got {gate.tolist()}.")
        return gate if gate.dim() else checked_weight(float(gate))
    if isinstance(gate, bool) or not isinstance(gate, int | float) or not math.isfinite(gate):
        raise ValueError(
            f"A gate is a finite number, a Learned(), or a tensor with one number per row or token; got {gate!r}."
        )
    return float(gate)


def is_zero(weight: Weight) -> bool:
    """Whether a gate is the number 0: what stands behind it takes no part and gets no gradient."""
    return isinstance(weight, float) and weight == 0.0


def per_row(values: Tensor, rows: int) -> Tensor:
    """(B, ...) for a call of `rows` rows: generation repeats each row for its beams, other calls flatten its tokens."""
    count = len(values)
    if rows == count:
        return values
    if rows == 1:  # the same for all rows so far (position ids): from here on they differ
        return values
    if rows % count:
        raise ValueError(
            f"{count} rows were given an adapter each, but this call has {rows} rows; it needs as many, or a multiple."
        )
    return values.repeat_interleave(rows // count, dim=0)


def per_token(values: Tensor, at: Reading) -> Tensor:
    """(B, T) as the site has its tokens, features.shape[:-1].

    Raises:
        ValueError: the site has others than these.
    """
    shape = at.features.shape[:-1]
    if len(shape) == 1 and shape[0] == values.numel():
        return values.flatten()
    if len(shape) == 2 and shape[1] == values.shape[1] and shape[0] % len(values) == 0:
        return per_row(values, shape[0])
    raise ValueError(
        f"A gate per token was given for {tuple(values.shape)} tokens, and {at.site!r} has {tuple(shape)} in this "
        "call. It goes with whole rows, without a cache, virtual tokens or another stack; a router can do more."
    )


@dataclass(frozen=True)
class Gate:
    """A product of gates: what stands before one method when a composition is written out as one sum."""

    number: float = 1.0
    factors: tuple[Learned | Routed | Tensor, ...] = field(default=())

    def times(self, weight: Weight) -> "Gate":
        if isinstance(weight, float):
            return replace(self, number=self.number * weight)
        return replace(self, factors=(*self.factors, weight))

    @property
    def is_number(self) -> bool:
        return len(self.factors) == 0  # torch.compile cannot trace `not` of a tuple

    @property
    def routed(self) -> bool:
        """Whether it depends on the input."""
        return any(isinstance(f, Routed) for f in self.factors)

    def value(self, at: Reading) -> float | Tensor:
        """The gate for one call: a number, (), (B,), or one for each token, features.shape[:-1]; on y's device.

        Evaluated at the site, and not before, so that a recomputation under checkpointing has a graph of its own.
        """
        out: float | Tensor = self.number
        for factor in self.factors:
            match factor:
                case Learned():
                    value: float | Tensor = factor(at.site.rpartition(":")[2])
                case Routed():
                    value = factor.router.choose(at)[factor.child]
                case _:
                    value = per_row(factor, len(at.y)) if factor.dim() == 1 else per_token(factor, at)
            out = product(out, value.to(at.y.device) if isinstance(value, Tensor) else value)
        return out


def product(one: float | Tensor, other: float | Tensor) -> float | Tensor:
    """Two gates as one: those per row stand beside those per token."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        dims = max(one.dim(), other.dim())
        return leading(one, dims) * leading(other, dims)
    return one * other


def leading(gate: Tensor, dims: int) -> Tensor:
    """A gate with `dims` dims: what it does not tell apart is one."""
    return gate if gate.dim() in (0, dims) else gate.view(*gate.shape, *[1] * (dims - gate.dim()))


def gated(gate: float | Tensor, change: Tensor) -> Tensor:
    """gate × change, for a gate that is a number, (), (B,) or change.shape[:-1]."""
    if not isinstance(gate, Tensor):
        return gate * change
    return leading(gate.to(change.dtype), change.dim()) * change


@dataclass(frozen=True)
class Gates:
    """The gates of one method in each of a plan's compositions; None where it takes no part."""

    each: tuple[Gate | None, ...]

    @cached_property
    def numbers(self) -> list[tuple[int, float]] | None:
        """(composition, its gate) for each that it takes part in; None where one of them is no number."""
        own = [(c, gate) for c, gate in enumerate(self.each) if gate is not None]
        return [(c, gate.number) for c, gate in own] if all(gate.is_number for _, gate in own) else None

    @cached_property
    def table(self) -> tuple[float, ...] | None:
        """The gate in each composition, 0 where it takes no part; None where one of them is no number."""
        if self.numbers is None:
            return None
        return tuple(0.0 if gate is None else gate.number for gate in self.each)

    @property
    def is_one(self) -> bool:
        """Whether it is the number 1 in every row."""
        return all(g is not None and g.number == 1.0 and g.is_number for g in self.each)

    @property
    def reads(self) -> bool:
        """Whether it depends on the site's input, or has one number for each of its tokens."""
        factors = [f for g in self.each if g is not None for f in g.factors]
        return any(isinstance(f, Routed) or (isinstance(f, Tensor) and f.dim() == 2) for f in factors)

    def value(self, rows: Tensor | None, at: Reading) -> float | Tensor:
        """As `Gate.value`. rows: (B,) which composition each row uses, or None for the first."""
        if rows is None:
            assert self.each[0] is not None
            return self.each[0].value(at)
        chosen = per_row(rows, len(at.y)).to(at.y.device)
        like: Any = {"device": at.y.device, "dtype": torch.promote_types(at.y.dtype, torch.float32)}
        if self.table is not None:
            return torch.tensor(self.table, **like)[chosen]
        out = torch.zeros(len(chosen), **like)
        for c, gate in enumerate(self.each):
            if gate is not None:
                value = torch.as_tensor(gate.value(at), **like)
                dims = max(out.dim(), value.dim())
                out = torch.where(leading(chosen == c, dims), leading(value, dims), leading(out, dims))
        return out


def tasks_of_call() -> Tensor:
    """(B,) the task of each row of the call that is running.

    Raises:
        ValueError: it was not told.
    """
    frame = current()
    tasks = None if frame is None else frame.tasks
    if tasks is None:
        raise ValueError(
            "What is active tells tasks apart: the call needs task_ids=[...], one number for each row of the batch."
        )
    return tasks


def tasks_told(known: int) -> Tensor:
    """(B,) the task of each row of the call, for a method that knows so many: of one it need not be told, (1,).

    Outside of a call all that it knows, (known,).
    """
    frame = current()
    if frame is None or known == 1:
        return torch.arange(known)
    return tasks_of_call()
