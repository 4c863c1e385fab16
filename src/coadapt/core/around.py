"""A composition around one call, for methods of any kind: the general path beside lowrank.py's fast one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .composition import Node, Seq, Sum
from .frame import Frame
from .gates import Gate, Reading, Weight, gated, is_zero, leading, per_row, span_site
from .layer import Adapted, Around, Known, Layer
from .site import first_input

Methods = Mapping[str, Sequence[nn.Module]]
"""Adapter name -> its methods at one site, in the order in which they stand around the call."""


def around(node: Node, layer: Layer, methods: Methods) -> Layer:
    """`layer` seen through `node`. A name that has nothing here changes nothing."""
    if isinstance(node, str):
        for method in methods.get(node, ()):
            layer = Adapted(layer, method)
        return layer
    if isinstance(node, Seq):
        for child in node.children:
            layer = around(child, layer, methods)
        return layer
    children = [(c, w) for c, w in zip(node.children, node.weights, strict=True) if _has(c, methods) and not is_zero(w)]
    if not children:
        return layer
    if len(children) == 1 and isinstance(children[0][1], float) and children[0][1] == 1.0:
        return around(children[0][0], layer, methods)
    if node.router is not None and hasattr(node.router, "fused"):
        return _Fused(layer, node, methods)
    return _Summed(layer, children, methods)


def _has(node: Node, methods: Methods) -> bool:
    return node in methods if isinstance(node, str) else any(_has(c, methods) for c in node.children)


class _Summed(Around):
    """f + sum_i g_i (e_i(f) - f)"""

    def __init__(self, inner: Layer, children: Sequence[tuple[Node, Weight]], methods: Methods) -> None:
        super().__init__(inner)
        self.terms = [(child, Gate().times(weight)) for child, weight in children]
        self.methods = methods

    def __call__(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        known = Known(self.inner, x, y)
        at = Reading(self.site, x, y)
        out = y
        for child, gate in self.terms:
            change = around(child, known, self.methods)(x) - y
            out = out + gated(gate.value(at), change)
        return out

    @property
    def bias(self) -> Tensor | None:
        inner = self.inner.bias
        changed = [(around(c, self.inner, self.methods).bias, gate) for c, gate in self.terms]
        if all(b is inner for b, _ in changed):
            return inner
        start = torch.zeros_like(next(b for b, _ in changed if b is not None)) if inner is None else inner
        return start + sum(number(g, self.site) * (start * 0 if b is None else b - start) for b, g in changed)

    def weight(self) -> Tensor:
        inner = self.inner.weight()
        return inner + sum(
            number(g, self.site) * (around(c, self.inner, self.methods).weight() - inner) for c, g in self.terms
        )


class _Fused(_Summed):
    """f + V sum_i g_i (e_i(f) - f), with gates that attend to the changes."""

    def __init__(self, inner: Layer, node: Sum, methods: Methods) -> None:
        super().__init__(inner, list(zip(node.children, node.weights, strict=True)), methods)
        self.router: Any = node.router
        self.children = [(i, c) for i, c in enumerate(node.children) if _has(c, methods)]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        known = Known(self.inner, x, y)
        changes = {i: around(child, known, self.methods)(x) - y for i, child in self.children}
        return y + self.router.fused(Reading(self.site, x, y), changes)


def number(gate: Gate, site: str) -> float | Tensor:
    """A gate that is the same in every call. Raises ValueError for others."""
    if gate.routed:
        raise ValueError(
            "A composition with a router cannot be merged, nor can what reads the weight below it (DoRA, GLoRA, "
            "HiRA ...) stand on it: its gates depend on what goes in, so there is no one weight to read."
        )
    if any(isinstance(f, Tensor) for f in gate.factors):
        raise ValueError(
            "A composition with a gate per row cannot be merged, nor can what reads the weight below it (DoRA, GLoRA, "
            "HiRA ...) stand on it: its rows have different weights. Say with adapter_names which rows use what."
        )
    return gate.number if gate.is_number else gate.value(Reading(site, torch.empty(0), torch.empty(0)))


class NodeCall:
    """What a plan has at a module where not everything has factors."""

    def __init__(self, layer: Layer, nodes: Sequence[Node], methods: Methods) -> None:
        self.layer, self.nodes, self.methods = layer, tuple(nodes), methods

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, call = first_input(forward, args, kwargs)
        rest: list[Any] = []

        def frozen(z: Any) -> Tensor:
            out: Any = call(z)
            if not isinstance(out, tuple):
                return out
            rest[:] = out[1:]
            return out[0]

        y = self.run(frame, x, Layer(self.layer.module, self.layer.path, frozen))
        return (y, *rest) if rest else y

    def run(self, frame: Frame, x: Any, layer: Layer) -> Tensor:
        if frame.rows is None:
            return around(self.nodes[0], layer, self.methods)(x)
        y = layer(x)
        known = Known(layer, x, y)
        chosen = per_row(frame.rows, len(x)).to(y.device)
        out = y
        for c, node in enumerate(self.nodes):
            adapted = around(node, known, self.methods)
            if adapted is not known:
                out = torch.where(leading(chosen == c, y.dim()), adapted(x), out)
        return out


class SpanCall(NodeCall):
    """As NodeCall, where the methods read the input of another module, further up in the same block."""

    def __init__(self, layer: Layer, nodes: Sequence[Node], methods: Methods, reads: str, inner: Any) -> None:
        super().__init__(layer, nodes, methods)
        self.reads, self.inner = reads, inner

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = frame.inputs.pop(self.reads)

        def below(_: Any) -> Tensor:
            return forward(*args, **kwargs) if self.inner is None else self.inner(frame, forward, args, kwargs)

        layer = Layer(self.layer.module, self.layer.path, below)
        layer.site = span_site(self.layer.path)
        return self.run(frame, x, layer)


class NotingCall:
    """Notes a module's input for a SpanCall."""

    def __init__(self, path: str, inner: Any) -> None:
        self.path, self.inner = path, inner

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame.inputs[self.path] = first_input(forward, args, kwargs)[0]
        return forward(*args, **kwargs) if self.inner is None else self.inner(frame, forward, args, kwargs)
