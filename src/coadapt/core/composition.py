"""Which adapters run, and how they combine: Seq, Sum, gates, and the text form.

A composition turns the call below into the call above. A name is the smallest one, a list of names their sum.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ..config import did_you_mean
from .gates import Gate, Learned, Routed, TrainedGate, Weight, checked_weight, is_zero
from .router import Router
from .routers import router_named

Node = Any
"""A composition: str | Seq | Sum."""


class Seq:
    """One after the other: e2 adapts the model that e1 has adapted. Prompts and prefixes concatenate, in order.

    >>> Seq("language", Sum("task", "style"))
    language >> (task + style)
    """

    def __init__(self, *children: Node) -> None:
        self.children: tuple[Node, ...] = tuple(as_node(c) for c in children)

    def __repr__(self) -> str:
        return " >> ".join(_bracketed(c) for c in self.children) or "nothing"


class Sum:
    """f + sum_i g_i (e_i(f) - f): a gated sum of changes to the same base.

    Joint prefixes share one softmax (their gate is a bias log g on its logits); prompts of equal length are added.

    >>> Sum("task", "style", weights=(1, 0.5))
    task + 0.5*style

    Args:
        children: names or compositions.
        weights: one gate per child (a number, a `Learned()`, or a tensor with one number per row, (B,), or per token,
            (B, T)), or a router, which chooses them all; all 1 if left out.
    """

    def __init__(self, *children: Node, weights: Sequence[Weight] | Router | None = None) -> None:
        self.children: tuple[Node, ...] = tuple(as_node(c) for c in children)
        self.router = weights if isinstance(weights, Router) else None
        if isinstance(weights, Router):
            weights.check_children(len(self.children))
            weights = [Routed(weights, i) for i in range(len(self.children))]
        gates = [1.0] * len(self.children) if weights is None else list(weights)
        if len(gates) != len(self.children):
            raise ValueError(
                f"Sum has {len(self.children)} children and {len(gates)} weights; it needs one weight each."
            )
        self.weights: tuple[Weight, ...] = tuple(checked_weight(g) for g in gates)

    def __repr__(self) -> str:
        if self.router is not None:
            return _routed(self.router, [repr(c) if not isinstance(c, str) else c for c in self.children])
        pairs = zip(self.children, self.weights, strict=True)
        return " + ".join(f"{_shown(w)}{_bracketed(c)}" for c, w in pairs).replace("+ -", "- ") or "nothing"


def _routed(router: Router, children: Sequence[str]) -> str:
    options = [f"{name}={value}" for name, value in router.said().items()]
    return f"{router.name}({', '.join([*children, *options])})"


def _bracketed(node: Node) -> str:
    if isinstance(node, str):
        return node
    return repr(node) if _is_routed(node) else f"({node!r})"


def _shown(weight: Weight) -> str:
    match weight:
        case float():
            return "" if weight == 1 else f"{weight:g}*"
        case Learned():
            return f"{_LEARNED[weight.per_layer]}[{weight.shares()[0]:.3g}]*"
        case _:
            return "per_row*"


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


def trained_gates(node: Node) -> list[TrainedGate]:
    """The gates of a composition that have parameters, routers among them, in order."""
    if isinstance(node, str):
        return []
    own = [w.router if isinstance(w, Routed) else w for w in getattr(node, "weights", ())]
    found = [g for g in own if isinstance(g, TrainedGate)]
    return list(dict.fromkeys([*found, *(g for c in node.children for g in trained_gates(c))]))


def routers(node: Node) -> list[tuple[Router, "Sum"]]:
    """The routers of a composition, each with the Sum whose gates it chooses."""
    if isinstance(node, str):
        return []
    own = [(node.router, node)] if isinstance(node, Sum) and node.router is not None else []
    return [*own, *(r for c in node.children for r in routers(c))]


def row_gates(node: Node) -> list[Tensor]:
    """The gates of a composition that have one number for each row of a batch, or for each of its tokens."""
    if isinstance(node, str):
        return []
    own = [w for w in getattr(node, "weights", ()) if isinstance(w, Tensor)]
    return [*own, *(g for c in node.children for g in row_gates(c))]


def key(node: Node) -> tuple[Any, ...] | str:
    """A hashable stand-in for a composition: equal for equal ones. Tensors and learned gates count by identity."""
    if isinstance(node, str):
        return node
    weights = tuple(_identity(w) for w in getattr(node, "weights", ()))
    return (type(node).__name__, tuple(key(c) for c in node.children), weights)


def _identity(weight: Weight) -> Any:
    match weight:
        case float():
            return weight
        case Routed():
            return (id(weight.router), weight.child)
        case _:
            return id(weight)


def check_known(node: Node, known: Iterable[str]) -> None:
    """Raises ValueError for a name that is no attached adapter."""
    there = list(known)
    for name in names(node):
        if name not in there:
            raise ValueError(
                f"There is no adapter {name!r}.{did_you_mean(name, there)} Attached: {', '.join(there) or 'none'}."
            )


# ---- the text form: "task + 0.5*style", "lang >> task" ---------------------------------------------------------------

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?=\s*\*)"
_TOKEN = re.compile(rf"\s*(>>|{_NUMBER}|[()*,+]|-(?=[\s\d.(])|[^\s()*+>,]+)", re.IGNORECASE)
_LEARNED = ("learned", "learned_per_layer")
"""Words that stand before "*" for a gate that is trained."""


def parse(text: str) -> Node:
    """`"a + 0.5*b"`, `"a >> b"`, brackets; `>>` binds weaker than `+`. Trained gates and routers are new ones.

    `"learned*a + learned_per_layer*b"` has trained gates, `"token_router(a, b >> c, top_k=1)"` a router.

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
        return children[0] if len(terms) == 1 and weights[0] == 1.0 else Sum(*children, weights=weights)

    def term(self, sign: float) -> tuple[Node, Weight]:
        weight: Weight = sign
        if len(self.words) > 1 and self.words[1] == "*":
            weight = self.weight(sign)
            self.take("*")
        if len(self.words) > 1 and self.words[1] == "(" and self.words[0] not in _SIGNS:
            return self.routed(self.words.pop(0)), weight
        if self.take("("):
            node = self.sequence()
            if not self.take(")"):
                raise self.wrong()
            return node, weight
        if not self.words or self.words[0] in _SIGNS:
            raise self.wrong()
        return self.words.pop(0), weight

    def weight(self, sign: float) -> Weight:
        word = self.words.pop(0)
        if word in _LEARNED:
            if sign < 0:
                raise ValueError(f"{self.text!r} is no composition: a learned gate is above 0. {_HOW}")
            return Learned(per_layer=word == _LEARNED[1])
        try:
            return sign * float(word)
        except ValueError:
            raise ValueError(
                f"{self.text!r} is no composition: {word!r} before '*' is no number."
                f"{did_you_mean(word, _LEARNED)} {_HOW}"
            ) from None

    def routed(self, name: str) -> Node:
        """`name(a, b, option=value)`"""
        self.take("(")
        children: list[Node] = []
        options: dict[str, Any] = {}
        while not self.take(")"):
            if (children or options) and not self.take(","):
                raise self.wrong()
            if self.words and "=" in self.words[0]:
                option, _, value = self.words.pop(0).partition("=")
                options[option] = plain(value)
            else:
                children.append(self.sequence())
        return Sum(*children, weights=router_named(name, options))


_SIGNS = (">>", "*", "+", "-", "(", ")", ",")


def plain(text: str) -> Any:
    """An option's value as it is written: a number, true, false, none, or a word."""
    known: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def as_text(node: Node) -> str:
    """The text form. Raises ValueError for gates per row, which have none."""
    if isinstance(node, str):
        return node
    if isinstance(node, Sum) and node.router is not None:
        return _routed(node.router, [as_text(c) for c in node.children])
    inner = [as_text(c) if isinstance(c, str) or _is_routed(c) else f"({as_text(c)})" for c in node.children]
    if isinstance(node, Seq):
        return " >> ".join(inner)
    written = [f"{_written(w, node)}{c}" for c, w in zip(inner, node.weights, strict=True)]
    return " + ".join(written).replace("+ -", "- ")


def same_text(one: Node, other: Node) -> bool:
    """Whether two compositions read the same, whatever their trained gates have learned."""
    try:
        return as_text(one) == as_text(other)
    except ValueError:
        return False


def _is_routed(node: Node) -> bool:
    return isinstance(node, Sum) and node.router is not None


def _written(weight: Weight, node: Node) -> str:
    match weight:
        case float():
            return "" if weight == 1 else f"{weight!r}*"
        case Learned():
            return f"{_LEARNED[weight.per_layer]}*"
        case _:
            raise ValueError(f"{node!r} has gates per row; it has no text form.")


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


def muted(node: Node, name: str) -> Node:
    """The composition with one adapter at gate 0; what chooses among adapters still knows it."""
    if isinstance(node, str):
        return Sum(node, weights=[0.0]) if node == name else node
    children = [muted(child, name) for child in node.children]
    return Seq(*children) if isinstance(node, Seq) else Sum(*children, weights=node.router or node.weights)


def without(node: Node, name: str) -> Node:
    """The composition with one adapter taken out, and every gate that then has nothing behind it.

    Raises:
        ValueError: a router chooses it.
    """
    if isinstance(node, str):
        return Sum() if node == name else node
    if _is_routed(node) and name in names(node):
        raise ValueError(f"{name!r} is one of those that {node!r} chooses from. set_adapter(...) without it first.")
    if _is_routed(node):
        return node
    pairs = zip(node.children, getattr(node, "weights", node.children), strict=True)
    left = [(child, w) for c, w in pairs if names(child := without(c, name))]
    children = [child for child, _ in left]
    return Seq(*children) if isinstance(node, Seq) else Sum(*children, weights=[w for _, w in left])
