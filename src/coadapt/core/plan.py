"""A composition, written out: what stands at each site. Made once for each composition, and kept."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import routing
from .adapter import Adapter, Part
from .around import Methods, NodeCall, NotingCall, SpanCall
from .attention import AttentionCall, AttentionTerm, BehindCall
from .backbone import Backbone, stacks
from .composition import Node, check_known, key, names, routers, row_gates, terms
from .frame import Frame, SiteCall
from .gates import Gate, Gates
from .input import EmbeddingCall, InputCall, embedded_input
from .invocation import InvocationCall
from .layer import Layer
from .lowrank import LowRankCall, Term, is_fused, is_plain
from .merging import Merged
from .method import AttentionMethod, InputMethod, Method
from .parameter import ParameterCall, methods_at
from .pooling import SeenCall
from .roles import siblings
from .stream import Source, SourceCall, StreamCall

_Sites = dict[nn.Module, dict[str, Sequence[Part]]]
"""Module -> adapter name -> what that has there."""


class Plan:
    """What a set of compositions (one, or one for each kind of row) does at each site of the base.

    Args:
        adapters: the view's adapters by name.
        nodes: the compositions; a frame's `rows` are indices into them.
        skip: modules whose adapters are in the weights already (merged).
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: Mapping[str, Adapter],
        nodes: Sequence[Node],
        skip: frozenset[nn.Module] = frozenset(),
    ) -> None:
        self.nodes = tuple(nodes)
        for node in nodes:
            check_known(node, adapters)  # what a `using` on another thread names may be gone
        self.gate_rows = sorted({len(gate) for node in nodes for gate in row_gates(node)})
        """For how many rows there are gates."""
        self.tasks, self.keeps_sums = routing.tasks(nodes, adapters), routing.keeps_sums(nodes)
        self.gates, self.fused = _written_out(nodes), any(map(routing.fused, nodes))
        self.used = list(dict.fromkeys(n for node in nodes for n in names(node)))
        methods = [part.method for name in self.used for part in adapters[name].parts]
        self.labelled = [m for m in methods if isinstance(m, InputMethod) and m.labels is not None]
        """Those whose virtual tokens are learned from."""
        self.calls: dict[nn.Module, SiteCall] = {}
        self.attention: dict[nn.Module, AttentionCall] = {}
        at: dict[str, _Sites] = {kind: {} for kind in ("module", "span", "parameter", "attention", "input", "stream")}
        for name in self.used:
            for kind, sites in adapters[name].by_kind.items():
                for module, parts in sites.items():
                    if module not in skip:
                        at[kind].setdefault(module, {})[name] = parts
        for module, parts in at["module"].items():
            if (call := self._layer_call(module, parts)) is not None:
                self.calls[module] = call
        self.products = [call for call in self.calls.values() if isinstance(call, LowRankCall)]
        self._link()
        for module, parts in at["span"].items():
            self._span(module, parts)
        for module, parts in at["parameter"].items():
            self._parameters(module, parts)
        for module, parts in at["attention"].items():
            self._attention(module, parts)
        self.sources: dict[Source, Sequence[bool]] = {}
        """What has a state of its own, and which of the compositions use it."""
        self._streams(at["stream"], adapters)
        self._inputs(at["input"], adapters)
        self._note_invocations(adapters)
        self.reads_last = any(method.reads_last for method in methods)
        self.refreshed = [method for method in methods if type(method).refresh is not Method.refresh]
        counts = any(method.reads_tokens for method in methods)
        if counts or routing.has_routers(nodes):
            self._note_tokens(base, counts)

    def frame(self, rows: Sequence[int] | None, tasks: Tensor | None = None) -> Frame:
        """For one call."""
        return Frame(self.calls, self.attention, rows, tasks)

    def release(self) -> None:
        """Gives up what is kept for rows that use the same again: it holds as much as their adapters do."""
        for call in self.products:
            if call.rows is not None:
                call.rows.release()

    def _note_invocations(self, adapters: Mapping[str, Adapter]) -> None:
        """Where a stack is called, it is looked at from which token on an adapter is active."""
        for name in self.used:
            invocations = list(dict.fromkeys(p.method.invoked_by for p in adapters[name].parts if p.method.invoked_by))
            for stack in adapters[name].stacks if invocations else ():
                inner = self.calls.get(stack.module)
                self.calls[stack.module] = InvocationCall(stack.module, invocations, inner)

    def _note_tokens(self, base: nn.Module, counts: bool) -> None:
        """Routers average over real tokens, and some methods count them: they are noted where a stack is called."""
        first = any(router.first_pass for node in self.nodes for router, _ in routers(node))
        pools = counts or any(router.pools for node in self.nodes for router, _ in routers(node))
        encoder: str | None = None
        for stack in stacks(base):
            inner = self.calls.get(stack.module)
            self.calls[stack.module] = SeenCall(stack.path, stack.module, encoder, inner, pools, first)
            encoder = stack.path

    def _terms(self, methods: Mapping[str, Any]) -> list[tuple[Any, Gates]]:
        """The methods at one site, with their gates."""
        return [(methods[name], gates) for name, gates in self.gates if name in methods]

    def _layer_call(self, module: nn.Module, parts: Mapping[str, Sequence[Part]]) -> SiteCall | None:
        layer = Layer(module, next(iter(parts.values()))[0].place.path)
        low = all(len(found) == 1 and is_fused(found[0].method) for found in parts.values())
        if low and is_plain(module) and not self.fused:
            found = self._terms({n: methods[0].method for n, methods in parts.items()})
            return LowRankCall(layer, [Term(m, g) for m, g in found]) if found else None
        return NodeCall(layer, self.nodes, _methods(parts))

    def _link(self) -> None:
        """Has the first of the layers that read one input make the products of all."""
        at = {call.layer.path: call for call in self.products}
        for path, call in at.items():
            call.siblings = [at[p] for p in siblings(path) if p in at and at[p].goes_with(call)]

    def _span(self, module: nn.Module, parts: Mapping[str, Sequence[Part]]) -> None:
        place = next(iter(parts.values()))[0].place
        assert place.reads is not None
        path, first = place.reads
        self.calls[module] = SpanCall(
            Layer(module, place.path), self.nodes, _methods(parts), path, self.calls.get(module)
        )
        self.calls[first] = NotingCall(path, self.calls.get(first))

    def _parameters(self, module: nn.Module, parts: Mapping[str, Sequence[Part]]) -> None:
        found: dict[tuple[str, str], dict[str, list[Part]]] = {}
        for name, own in parts.items():
            for part in own:
                found.setdefault((part.place.site, part.place.parameter), {}).setdefault(name, []).append(part)
        at = {key: {name: methods_at(own) for name, own in here.items()} for key, here in found.items()}
        self.calls[module] = ParameterCall(module, self.nodes, at, self.calls.get(module))

    def _attention(self, module: nn.Module, parts: Mapping[str, Sequence[Part]]) -> None:
        methods = {name: part.method for name, found in parts.items() for part in found}
        path = next(iter(parts.values()))[0].place.path
        joined = AttentionCall(module, path, [AttentionTerm(m, g) for m, g in self._terms(methods)])  # type: ignore[arg-type]
        self.attention[module] = joined
        if joined.reads:
            self.calls[module] = NotingCall(joined.site, self.calls.get(module))
        if joined.later:
            self.calls[module] = BehindCall(joined.later, self.calls.get(module))

    def _streams(self, at_stream: _Sites, adapters: Mapping[str, Adapter]) -> None:
        """States of adapters, from the embedded input on along the blocks; not of those whose gates are all 0."""
        uses = {name: [any(True for _ in terms(node, name.__eq__)) for node in self.nodes] for name in self.used}
        there = [n for n in self.used if any(uses[n]) and any(n in parts for parts in at_stream.values())]
        for module, parts in at_stream.items():
            if some := {name: found for name, found in parts.items() if name in there}:
                layer = Layer(module, next(iter(some.values()))[0].place.path)
                self.calls[module] = StreamCall(layer, self.nodes, _methods(some), self.calls.get(module))
        for name in there:
            source: Any = adapters[name].shared
            self.sources[source] = uses[name]
        if there:
            place = adapters[there[0]].stacks[-1]
            self.calls[place.module] = SourceCall(place, list(self.sources), self.calls.get(place.module))
            call = EmbeddingCall(embedded_input(place), self.calls.get(place.embedding))
            self.calls[place.embedding] = call

    def _inputs(self, at_input: _Sites, adapters: Mapping[str, Adapter]) -> None:
        """Prompts, and the shift of positions that prefixes ask for, at the backbones."""
        shifts = [self._offset(node, adapters) for node in self.nodes]
        if not at_input and not any(shifts):
            return
        encoder: InputCall | None = None
        for place in next(adapters[name].stacks for name in self.used if adapters[name].stacks):
            methods = {n: part.method for n, found in at_input.get(place.module, {}).items() for part in found}
            moved = shifts if self._counts_positions(place) else [0] * len(shifts)
            if methods or any(moved) or encoder is not None:
                call = InputCall(place, self.nodes, methods, moved, encoder, self.calls.get(place.module))  # type: ignore[arg-type]
                self.calls[place.module] = call
                self.calls[place.embedding] = EmbeddingCall(call.embedded, self.calls.get(place.embedding))
                encoder = call if place.role == "encoder" and methods else None

    @staticmethod
    def _counts_positions(place: Backbone) -> bool:
        import inspect

        return "position_ids" in inspect.signature(place.module.forward).parameters

    def _offset(self, node: Node, adapters: Mapping[str, Adapter]) -> int:
        """The sum of the offsets of the prefixes that a composition uses."""
        offsets = {
            name: next(
                (p.method.position_offset for p in adapters[name].parts if isinstance(p.method, AttentionMethod)),
                0,
            )
            for name in names(node)
        }
        return sum(offsets[name] for name, _ in terms(node, lambda n: bool(offsets[n])))


def _written_out(nodes: Sequence[Node]) -> list[tuple[str, Gates]]:
    """Every adapter that some composition uses, with its gate in each; one that is used twice stands twice."""
    out: list[tuple[str, tuple[Gate | None, ...]]] = []
    for c, node in enumerate(nodes):
        for name, gate in terms(node, lambda _: True):
            free = next((i for i, (n, gates) in enumerate(out) if n == name and gates[c] is None), None)
            blank: tuple[Gate | None, ...] = (None,) * len(nodes) if free is None else out[free][1]
            row = (name, (*blank[:c], gate, *blank[c + 1 :]))
            if free is None:
                out.append(row)
            else:
                out[free] = row
    return [(name, Gates(gates)) for name, gates in out]


def _methods(parts: Mapping[str, Sequence[Part]]) -> Methods:
    return {name: [part.method for part in found] for name, found in parts.items()}


class Plans:
    """The plans of one view, kept by composition, so that switching back costs a look-up."""

    KEPT = 64

    def __init__(self, base: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self.base, self.adapters = base, adapters
        self._plans: dict[Any, Plan] = {}
        self._rows: weakref.ref[Plan] | None = None
        """The last that a mixed batch used."""

    def clear(self) -> None:
        """To be called when weights are merged, or the base's own come back."""
        self._plans.clear()

    def forget(self, name: str) -> None:
        """To be called when an adapter comes or goes: others' plans stay."""
        self._plans = {found: plan for found, plan in self._plans.items() if name not in plan.used}

    def one(self, node: Node, merged: Merged | None) -> Plan:
        """For a call with one composition for all rows."""
        return self._made([node], merged)

    def rows(self, nodes: Sequence[Node], merged: Merged | None) -> tuple[Plan, list[int]]:
        """For a call with one composition per row, and which of the plan's each row uses."""
        distinct = {key(n): n for n in nodes}
        where = {k: i for i, k in enumerate(sorted(distinct, key=str))}
        plan = self._made([distinct[k] for k in where], merged)
        last = None if self._rows is None or torch.compiler.is_compiling() else self._rows()
        if last is not plan:
            if last is not None:
                last.release()
            self._rows = weakref.ref(plan)
        return plan, [where[key(n)] for n in nodes]

    def _made(self, nodes: Sequence[Node], merged: Merged | None) -> Plan:
        if merged is not None and any(key(n) != key(merged.node) for n in nodes):
            raise RuntimeError(
                f"{merged.node!r} is merged into the base; unmerge_adapter() before calling with {nodes[0]!r}."
            )
        found = tuple(key(n) for n in nodes)
        plan = self._plans.get(found)
        if plan is None:
            plan = Plan(self.base, self.adapters, nodes, merged.modules if merged else frozenset())
            if len(self._plans) >= self.KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[found] = plan
        return plan
