"""Which adapters run, and how they combine: Seq, Sum, gates, and the text form.

A composition turns the call below into the call above. A name is the smallest one, a list of names their sum.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import did_you_mean


class Learned(nn.Module):
    """A gate that is trained: one positive number, stored as its logarithm.

    Args:
        start: its value at the start, greater than 0.
    """

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        if not start > 0:
            raise ValueError(f"A learned gate starts above 0 (it is stored as its logarithm); got {start}.")
        self.log_gate = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> Tensor:
        """The gate, a scalar tensor."""
        return self.log_gate.exp()


Weight = float | Learned | Tensor
"""A gate: a number, a learned scalar, or one number per row of the batch, (B,)."""
Node = Any
"""A composition: str | Seq | Sum."""


class Seq:
    """One after the other: e2 adapts the model that e1 has adapted. Prompts and prefixes concatenate, in order."""

    def __init__(self, *children: Node) -> None:
        self.children: tuple[Node, ...] = tuple(as_node(c) for c in children)

    def __repr__(self) -> str:
        return " >> ".join(_bracketed(c) for c in self.children) or "nothing"


class Sum:
    """f + sum_i g_i (e_i(f) - f): a gated sum of changes to the same base.

    Joint prefixes share one softmax (their gate is a bias log g on its logits); prompts of equal length are added.

    Args:
        children: names or compositions.
        weights: one gate per child; all 1 if left out. A number, a `Learned()`, or a tensor with one number per row.
    """

    def __init__(self, *children: Node, weights: Sequence[Weight] | None = None) -> None:
        self.children: tuple[Node, ...] = tuple(as_node(c) for c in children)
        gates = [1.0] * len(self.children) if weights is None else list(weights)
        if len(gates) != len(self.children):
            raise ValueError(
                f"Sum has {len(self.children)} children and {len(gates)} weights; it needs one weight each."
            )
        self.weights: tuple[Weight, ...] = tuple(_weight(g) for g in gates)

    def __repr__(self) -> str:
        pairs = zip(self.children, self.weights, strict=True)
        return " + ".join(f"{_shown(w)}{_bracketed(c)}" for c, w in pairs) or "nothing"


def _weight(gate: Any) -> Weight:
    if isinstance(gate, Learned):
        return gate
    if isinstance(gate, Tensor):
        if gate.dim() > 1:
            raise ValueError(f"A gate per row is a vector with one number a row; got the shape {tuple(gate.shape)}.")
        return gate if gate.dim() else float(gate)
    if isinstance(gate, bool) or not isinstance(gate, int | float) or not math.isfinite(gate):
        raise ValueError(f"A gate is a finite number, a Learned() or a tensor with one number per row; got {gate!r}.")
    return float(gate)


def _bracketed(node: Node) -> str:
    return node if isinstance(node, str) else f"({node!r})"


def _shown(weight: Weight) -> str:
    match weight:
        case float():
            return "" if weight == 1 else f"{weight:g}*"
        case Learned():
            return f"learned[{float(weight().detach()):.3g}]*"
        case _:
            return "per_row*"


def is_zero(weight: Weight) -> bool:
    """Whether a gate is the number 0: what stands behind it takes no part and gets no gradient."""
    return isinstance(weight, float) and weight == 0.0


def as_node(composition: Any) -> Node:
    """A composition from what people write: a name, a text, a list of names, Seq, Sum, or None for nothing."""
    match composition:
        case Seq() | Sum():
            return composition
        case str():
            return parse(composition)
        case None:
            return Sum()
        case list() | tuple():
            return Sum(*composition) if len(composition) != 1 else as_node(composition[0])
        case _:
            raise TypeError(f"A composition is a name, a text, a list, Seq or Sum; got a {type(composition).__name__}.")


def names(node: Node) -> list[str]:
    """The adapters in a composition, each once, in order."""
    return [node] if isinstance(node, str) else list(dict.fromkeys(n for c in node.children for n in names(c)))


def learned(node: Node) -> list[Learned]:
    """The trained gates of a composition, in order."""
    if isinstance(node, str):
        return []
    own = [w for w in getattr(node, "weights", ()) if isinstance(w, Learned)]
    return list(dict.fromkeys([*own, *(g for c in node.children for g in learned(c))]))


def key(node: Node) -> tuple[Any, ...] | str:
    """A hashable stand-in for a composition: equal for equal ones. Tensors and learned gates count by identity."""
    if isinstance(node, str):
        return node
    weights = tuple(w if isinstance(w, float) else id(w) for w in getattr(node, "weights", ()))
    return (type(node).__name__, tuple(key(c) for c in node.children), weights)


def check_known(node: Node, known: Iterable[str]) -> None:
    """Raises ValueError for a name that is no attached adapter."""
    there = list(known)
    for name in names(node):
        if name not in there:
            raise ValueError(
                f"There is no adapter {name!r}.{did_you_mean(name, there)} Attached: {', '.join(there) or 'none'}."
            )


# ---- the text form: "task + 0.5*style", "lang >> task" ---------------------------------------------------------------

_TOKEN = re.compile(r"\s*(>>|[()*]|[+-](?=[\s\d.(])|[^\s()*+>]+)")


def parse(text: str) -> Node:
    """`"a + 0.5*b"`, `"a >> b"`, brackets; `>>` binds weaker than `+`.

    Raises:
        ValueError: the text is no composition.
    """
    words, at = [], 0
    while at < len(text.rstrip()):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"{text!r} is no composition: {text[at:]!r} cannot be read. {_HOW}")
        words.append(found[1])
        at = found.end()
    if not words:
        raise ValueError(f"An empty text names no adapter. {_HOW}")
    reader = _Reader(text, words)
    node = reader.sequence()
    if reader.words:
        raise reader.wrong()
    return node


_HOW = 'Write it like "task + 0.5*style" or "lang >> task".'


class _Reader:
    def __init__(self, text: str, words: list[str]) -> None:
        self.text, self.words = text, words

    def wrong(self) -> ValueError:
        found = repr(self.words[0]) if self.words else "its end"
        return ValueError(f"{self.text!r} is no composition: {found} was not expected. {_HOW}")

    def take(self, *wanted: str) -> str | None:
        return self.words.pop(0) if self.words and self.words[0] in wanted else None

    def sequence(self) -> Node:
        parts = [self.sum()]
        while self.take(">>"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else Seq(*parts)

    def sum(self) -> Node:
        sign = -1.0 if self.take("-") else 1.0
        terms = [self.term(sign)]
        while found := self.take("+", "-"):
            terms.append(self.term(-1.0 if found == "-" else 1.0))
        children, weights = zip(*terms, strict=True)
        return children[0] if len(terms) == 1 and weights[0] == 1 else Sum(*children, weights=weights)

    def term(self, sign: float) -> tuple[Node, float]:
        weight = 1.0
        if len(self.words) > 1 and self.words[1] == "*":
            try:
                weight = float(self.words.pop(0))
            except ValueError:
                raise ValueError(
                    f"{self.text!r} is no composition: a weight before '*' must be a number. {_HOW}"
                ) from None
            self.take("*")
        if self.take("("):
            node = self.sequence()
            if not self.take(")"):
                raise self.wrong()
            return node, sign * weight
        if not self.words or self.words[0] in (">>", "*", "+", "-", ")"):
            raise self.wrong()
        return self.words.pop(0), sign * weight


def as_text(node: Node) -> str:
    """The text form. Raises ValueError for gates that have none (learned ones, one per row)."""
    if isinstance(node, str):
        return node
    inner = [as_text(c) if isinstance(c, str) else f"({as_text(c)})" for c in node.children]
    if isinstance(node, Seq):
        return " >> ".join(inner)
    if not all(isinstance(w, float) for w in node.weights):
        raise ValueError(f"{node!r} has gates that are no numbers; it has no text form.")
    return " + ".join(f"{w!r}*{c}" if w != 1 else c for c, w in zip(inner, node.weights, strict=True))


# ---- gates as they are used at a site --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """A product of gates: what stands before one method when a composition is written out as one sum."""

    number: float = 1.0
    factors: tuple[Learned | Tensor, ...] = field(default=())

    def times(self, weight: Weight) -> "Gate":
        if isinstance(weight, float):
            return replace(self, number=self.number * weight)
        return replace(self, factors=(*self.factors, weight))

    def value(self, rows: int, like: Tensor) -> float | Tensor:
        """The gate for a call of `rows` rows: a number, a scalar, or (rows,), on like's device.

        Evaluated at the site, and not before, so that a recomputation under checkpointing has a graph of its own.
        """
        out: float | Tensor = self.number
        for factor in self.factors:
            out = out * (factor() if isinstance(factor, Learned) else per_row(factor, rows)).to(like.device)
        return out


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


def terms(node: Node, has: Callable[[str], bool], gate: Gate | None = None) -> Iterator[tuple[str, Gate]]:
    """A composition written out as a plain sum, for methods whose changes add up: Seq and Sum are then the same."""
    gate = gate or Gate()
    if isinstance(node, str):
        if has(node):
            yield node, gate
        return
    weights: Sequence[Weight] = getattr(node, "weights", (1.0,) * len(node.children))
    for child, weight in zip(node.children, weights, strict=True):
        if not is_zero(weight):
            yield from terms(child, has, gate.times(weight))


def without(node: Node, name: str) -> Node:
    """The composition with one adapter taken out, and every gate that then has nothing behind it."""
    if isinstance(node, str):
        return Sum() if node == name else node
    pairs = zip(node.children, getattr(node, "weights", node.children), strict=True)
    left = [(child, w) for c, w in pairs if names(child := without(c, name))]
    children = [c for c, _ in left]
    return Seq(*children) if isinstance(node, Seq) else Sum(*children, weights=[w for _, w in left])
