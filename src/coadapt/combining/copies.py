"""Trained copies of whole modules (`modules_to_save`, FullCopy) in adapters that are combined."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, ModuleCopy
from ..core.composition import Node, Seq, names, terms
from ..core.gates import Gate
from ..core.layer import kind_of
from .deltas import wide
from .report import Row

State = dict[str, Tensor]


def combined(base: nn.Module, adapters: Mapping[str, Adapter], node: Node) -> tuple[dict[str, State], list[Row]]:
    """By the path of each copied module, what the new copy holds; and what to report.

    A layer's output is affine in its weight and bias, so a sum of copies of a layer is one copy, exactly.

    Raises:
        ValueError: copies of another module than a layer that are weighed or summed, or a copy of what others adapt.
    """
    copies: dict[str, dict[str, State]] = {}
    for name in names(node):
        for part in adapters[name].parts:
            if isinstance(part.method, ModuleCopy):
                copies.setdefault(part.place.path, {})[name] = dict(part.method.copy.state_dict())
    new: dict[str, State] = {}
    rows: list[Row] = []
    for path, states in copies.items():
        _check(base, adapters, node, path, states)
        before = {k: wide(v) for k, v in base.get_submodule(path).state_dict().items() if v.is_floating_point()}
        found = list(terms(node, states.__contains__))
        alone = len(found) == 1 and found[0][1] == Gate()
        new[path] = states[found[0][0]] if alone else _state(node, before, states)
        size = sum(float((wide(new[path][k]) - v).norm()) ** 2 for k, v in before.items()) ** 0.5
        rows.append(Row(path=path, how="copy", lost=0.0, apart=0.0, norm=size))
    return new, rows


def _state(node: Node, before: State, states: Mapping[str, State]) -> State:
    if isinstance(node, str):
        return {k: wide(v) for k, v in states[node].items()} if node in states else before
    if isinstance(node, Seq):
        for child in node.children:
            before = _state(child, before, states)
        return before
    after = before
    for child, weight in zip(node.children, node.weights, strict=True):
        one = _state(child, before, states)
        after = {k: after[k] + weight * (one[k] - before[k]) for k in before}
    return after


def _check(
    base: nn.Module, adapters: Mapping[str, Adapter], node: Node, path: str, states: Mapping[str, State]
) -> None:
    others = [
        (name, part.place.path)
        for name in names(node)
        for part in adapters[name].parts
        if not isinstance(part.method, ModuleCopy) and f"{part.place.path}.".startswith(f"{path}.")
    ]
    if others:
        raise ValueError(
            f"{path!r} is a trained copy in {', '.join(map(repr, states))}, and {others[0][0]!r} adapts "
            f"{others[0][1]!r} too. No one adapter does both."
        )
    module = base.get_submodule(path)
    if kind_of(module) is None and [gate for _, gate in terms(node, states.__contains__)] != [Gate()]:
        raise ValueError(
            f"{', '.join(map(repr, states))} hold{'s' * (len(states) == 1)} a trained copy of {path!r} "
            f"({type(module).__name__}), and {node!r} weighs or sums it: only copies of single layers can be."
        )


@torch.no_grad()
def fill(adapter: Adapter, states: Mapping[str, State]) -> None:
    """Writes what `combined` gave into the copies of the new adapter."""
    for part in adapter.parts:
        if isinstance(part.method, ModuleCopy) and part.place.path in states:
            part.method.copy.load_state_dict(states[part.place.path])
