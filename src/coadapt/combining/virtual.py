"""Prompts, prefixes and bottlenecks: what is exact for each, and their means."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import PeftConfig
from ..core.adapter import Adapter, ModuleCopy, build, replace_options
from ..core.composition import Node, Seq, terms
from ..core.method import InputMethod
from ..methods.prefix import PrefixTuning, PrefixTuningConfig
from ..methods.prompt import PromptTuning, PromptTuningConfig
from .deltas import averaged, voters
from .report import Report, Row
from .ways import Options, Order


def prompts(order: Order) -> tuple[Adapter, Report]:
    """One prompt. "cat": one after another, as in a Seq; "linear": added, as in a Sum; "mean"; None: as `node` says."""
    node, how, adapters = order.node, order.how, order.adapters
    _check(how, ("cat", "linear", "mean"), order.options, "prompts")
    first, *others = adapters.values()
    _same(first, others, "prompt_sites", _roles)
    _same(first, others, "output_virtual_tokens", lambda a: a.config.output_virtual_tokens)  # type: ignore[attr-defined]
    asked = node
    if how == "cat":
        asked = Seq(*_with_weight_one(node, "Prompts with weights are added: how='linear'."))
    elif how == "mean":
        asked = averaged(node)
    values = {role: _tokens(asked, _methods(adapters, role, InputMethod)) for role in _roles(first)}
    config = PromptTuningConfig(
        num_virtual_tokens=len(next(iter(values.values()))),
        prompt_sites=first.config.prompt_sites,  # type: ignore[attr-defined]
        output_virtual_tokens=first.config.output_virtual_tokens,  # type: ignore[attr-defined]
        **order.common,
    )
    adapter = build(order.name, config, order.base)
    for part in adapter.parts:
        if isinstance(part.method, PromptTuning):
            part.method.P.copy_(values[part.place.role])
    said = how or ("cat" if isinstance(node, Seq) else "linear")
    exact = how is None or (how == "linear") or (how == "cat" and (len(adapters) == 1 or isinstance(node, Seq)))
    off = 0.0 if exact else None
    rows = [Row(path=f"{role}'s input", how=said, lost=off, apart=off) for role in values]
    notes = [f"{config.num_virtual_tokens} virtual tokens."]
    return adapter, Report(adapter_name=order.name, rows=rows, notes=notes)


def _tokens(node: Node, methods: Mapping[str, Any]) -> Tensor:
    """(N, D): of a Seq one after the other, of a Sum added."""
    if isinstance(node, str):
        own = methods[node].prompt().detach()
        if own.dim() > 2:
            raise ValueError(f"{node!r} has a prompt for each of {len(own)} tasks; no one prompt can stand for it.")
        return own
    found = [_tokens(child, methods) for child in node.children]
    if isinstance(node, Seq):
        return torch.cat(found)
    if len(lengths := sorted({len(tokens) for tokens in found})) > 1:
        raise ValueError(
            f"Prompts are added token by token; these have {lengths} tokens. how='cat' puts them one after another."
        )
    return torch.stack([w * tokens for tokens, w in zip(found, node.weights, strict=True)]).sum(0)


def prefixes(order: Order) -> tuple[Adapter, Report]:
    """One prefix. "cat" (and None): all of them in one softmax, which is what Seq and Sum of them are; "mean"."""
    node, how, adapters = order.node, order.how, order.adapters
    _check(how, ("cat", "mean"), order.options, "prefixes")
    for adapter in adapters.values():
        _check_prefix(adapter)
    first, *others = adapters.values()
    _same(first, others, "prefix_sites", _paths)
    if how == "mean":
        members = [(n, gate.number) for n, gate in terms(averaged(node), adapters.__contains__)]
        _same(first, others, "num_virtual_tokens", lambda a: _prefix_of(a).shape[0])
        _same(first, others, "position_offset", lambda a: _prefix_of(a).position_offset)
        offset = _prefix_of(first).position_offset
    else:
        members = [
            (n, 1.0)
            for n in _with_weight_one(node, "A gate on a prefix is a bias on its scores, which no other prefix has.")
        ]
        offset = sum(_prefix_of(adapters[n]).position_offset for n, _ in members)
    made: dict[str, Tensor] = {}
    for path in _paths(first):
        own = [w * _keys_values(adapters[n], path) for n, w in members]
        made[path] = torch.stack(own).sum(0) if how == "mean" else torch.cat(own)
    count = len(next(iter(made.values())))
    config = PrefixTuningConfig(
        num_virtual_tokens=count, prefix_sites=first.config.prefix_sites, **order.common  # type: ignore[attr-defined]
    )  # fmt: skip
    adapter = build(order.name, config, order.base)
    if _prefix_of(adapter).position_offset != offset:
        adapter = build(order.name, replace(config, position_offset=offset), order.base)
    for part in adapter.parts:
        if isinstance(part.method, PrefixTuning):
            part.method.P.copy_(made[part.place.path])
    off = None if how == "mean" and len(members) > 1 else 0.0
    rows = [Row(path=path, how=how or "cat", lost=off, apart=off) for path in made]
    notes = [f"{count} virtual tokens; positions are shifted by {offset}."]
    return adapter, Report(adapter_name=order.name, rows=rows, notes=notes)


def _check_prefix(adapter: Adapter) -> None:
    config: Any = adapter.config
    if config.prefix_type != "joint":
        raise ValueError(
            f"{adapter.name!r} is a decoupled prefix: each has a softmax and a gate of its own, so two of them are "
            "not one."
        )
    if config.prefix_layout == "peft" and adapter.two_stacks:
        raise ValueError(
            f"{adapter.name!r} has the field's layout for encoder-decoders (prefix_layout='peft'), in which the "
            "position bias of a prefix depends on its length: two of them are not one."
        )


def modules(order: Order) -> tuple[Adapter, Report]:
    """One bottleneck, or other method around modules. "mean": of the parameters; only of one configuration."""
    node, how, adapters = order.node, order.how, order.adapters
    first, *others = adapters.values()
    kind = next(type(p.method).__name__ for p in first.parts if not isinstance(p.method, ModuleCopy))
    if how is None:
        raise ValueError(f"No {kind} is equal to several others. how='mean' takes the mean of their parameters.")
    _check(how, ("mean",), order.options, kind)
    _same(first, others, "the configuration", lambda a: _shape_of(a.config))
    members = voters(averaged(node))
    if any(not isinstance(n, str) for n, _ in members):
        raise ValueError("how='mean' takes adapters side by side ('a + b'), not a Seq of them.")
    adapter = build(order.name, replace_options(first.config, init_from=None, **order.common), order.base)
    states = [(adapters[n].state_dict(), w) for n, w in members]
    keys = {tuple((k, tuple(t.shape)) for k, t in state.items()) for state, _ in states}
    if len(keys) > 1:
        raise ValueError("how='mean' needs adapters of one shape at the same places; these differ.")
    adapter.load_state_dict({k: torch.stack([w * s[k] for s, w in states]).sum(0) for k in states[0][0]})
    off = 0.0 if len(members) == 1 else None
    rows = [
        Row(path=part.place.path, how="mean", lost=off, apart=off)
        for part in adapter.parts
        if not isinstance(part.method, ModuleCopy)
    ]
    return adapter, Report(adapter_name=order.name, rows=rows)


# ---- what they share -------------------------------------------------------------------------------------------------


def _check(how: str | None, there: Sequence[str], options: Options, what: str) -> None:
    if how is not None and how not in there:
        raise ValueError(
            f"how={how!r} combines changes of weights; for {what} there is {' and '.join(map(repr, there))}."
        )
    if options.r is not None:
        raise ValueError(f"r={options.r!r} has no effect on {what}, which have no rank.")


def _with_weight_one(node: Node, why: str) -> list[str]:
    """The adapters in order, as often as they stand there. Raises ValueError for a weight that is not 1."""
    found = list(terms(node, lambda _: True))
    if wrong := [f"{gate.number:g}*{n}" for n, gate in found if gate.number != 1]:
        raise ValueError(f"how='cat' is exact only where all weights are 1, and here is {wrong[0]}. {why}")
    return [n for n, _ in found]


def _same(first: Adapter, others: Sequence[Adapter], what: str, of: Any) -> None:
    for other in others:
        if of(first) != of(other):
            raise ValueError(
                f"{first.name!r} and {other.name!r} differ in {what} ({of(first)} and {of(other)}), so no one adapter "
                "can stand for both."
            )


def _roles(adapter: Adapter) -> list[str]:
    return [part.place.role for part in adapter.parts if isinstance(part.method, InputMethod)]


def _paths(adapter: Adapter) -> list[str]:
    return [part.place.path for part in adapter.parts if isinstance(part.method, PrefixTuning)]


def _methods(adapters: Mapping[str, Adapter], role: str, cls: type[Any]) -> dict[str, Any]:
    return {
        n: part.method
        for n, adapter in adapters.items()
        for part in adapter.parts
        if part.place.role == role and isinstance(part.method, cls)
    }


def _prefix_of(adapter: Adapter) -> Any:
    return next(part.method for part in adapter.parts if isinstance(part.method, PrefixTuning))


def _keys_values(adapter: Adapter, path: str) -> Tensor:
    """(N, 2, H, D)"""
    method: Any = next(p.method for p in adapter.parts if p.place.path == path and isinstance(p.method, PrefixTuning))
    keys, values = method.prefix()  # each (H, N, D)
    return torch.stack([keys, values]).permute(2, 0, 1, 3).detach()


def _shape_of(config: PeftConfig) -> dict[str, Any]:
    """What of a configuration decides what its numbers mean."""
    idle = (
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "init_from",
        "init_seed",
        "adapter_name",
    )
    return {k: v for k, v in config.to_dict().items() if k not in (*idle, "adapter_dropout")}
