"""Putting a composition into the base's weights, and taking it out again to the bit."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, ModuleCopy, Part
from .around import around, number
from .composition import Node, names, terms
from .gates import Gate
from .layer import Layer, kind_of
from .lowrank import LowRankMethod
from .method import AttentionMethod, InputMethod, WeightMethod
from .modes import evaluating
from .parameter import adapted, methods_at
from .precision import plus_product
from .repacking import INTO, Full, MergeReport, Repacked, float_dtype, repacked
from .store import form_of, packed_store, store_of, take_form


@dataclass
class Merged:
    """What was merged, and what the base held before."""

    node: Node
    modules: frozenset[nn.Module]
    originals: list[tuple[nn.Module, str, nn.Parameter | None]] = field(default_factory=list)
    kept: bool = True
    new_biases: int = 0
    """Layers that had no bias, and have one now."""
    forms: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    """Quantised layers, and what they consisted of."""
    report: MergeReport | None = None
    """What became of quantised layers, where there are any."""


Write = tuple[nn.Module, str, torch.Tensor | None]
"""A module, the name of its weight or bias, and the new value."""


Changed = Mapping[tuple[nn.Module, str], Mapping[str, Sequence[Part]]]
"""Each module whose weights change, with "" or the name of a parameter -> what each adapter has there."""


def changed(adapters: Mapping[str, Adapter], node: Node) -> Changed:
    """What `node` changes of the base's weights.

    Raises:
        TypeError: a method in `node` is not a map of weights.
        ValueError: there is nothing to merge.
    """
    sites: dict[tuple[nn.Module, str], dict[str, list[Part]]] = {}
    for name in names(node):
        for part in adapters[name].parts:
            if isinstance(part.method, AttentionMethod | InputMethod):
                continue
            if not isinstance(part.method, WeightMethod | ModuleCopy):
                raise TypeError(
                    f"Adapter {name!r} cannot be merged: {type(part.method).__name__} at {part.place.path!r} is no map "
                    "of weights. Nothing was changed."
                )
            site = (part.place.module, part.place.parameter)
            sites.setdefault(site, {}).setdefault(name, []).append(part)
    if not sites:
        raise ValueError(f"{node!r} adapts no weight, so there is nothing to merge.")
    return sites


def new_values(module: nn.Module, parameter: str, parts: Mapping[str, Sequence[Part]], node: Node) -> list[Write]:
    """All that `node` makes of the weights at one place of `changed`; nothing is written."""
    return _new_parameter(module, parameter, parts, node) if parameter else _new_weights(module, parts, node)


def check_finite(writes: Sequence[Write], base: nn.Module, node: Node) -> None:
    """Raises ValueError where a new weight or bias has an infinity, or is not a number."""
    for module, name, value in writes:
        if value is not None and not _is_finite(value):
            path = next(n for n, m in base.named_modules() if m is module)
            raise ValueError(f"Merging {node!r} gives a {name} of {path!r} that is not finite. Nothing was changed.")


@torch.no_grad()
def merge(
    base: nn.Module,
    adapters: Mapping[str, Adapter],
    node: Node,
    keep_original: bool = True,
    into: str | None = None,
) -> Merged:
    """Writes W' = node(W) into every layer of the base that `node` adapts; prompts and prefixes stay beside it.

    All new weights are made and checked before the first is written.

    Args:
        into: which base, where that is quantised: the "dequantised" one (the default: a layer becomes one of floats),
            or the "quantised" one (it is quantised anew).

    Raises:
        TypeError: a method in `node` is not a map of weights.
        ValueError: nothing to merge, a gate per row, a result that is not finite, or `into` without quantised layers.
    """
    sites = changed(adapters, node)
    writes: list[Write] = []
    with evaluating(*(adapters[name] for name in names(node))):  # some draw while they train
        for (module, parameter), parts in sites.items():
            if any(p.is_meta for p in module.parameters()):
                path = next(iter(parts.values()))[0].place.path
                raise ValueError(
                    f"{path!r} has no values here (meta device, or offloaded), so nothing can be merged into it."
                )
            writes += new_values(module, parameter, parts, node)
    check_finite(writes, base, node)
    done = Merged(node, frozenset(module for module, _ in sites), kept=keep_original)
    _repack(base, [w for w in writes if packed_store(w[0]) is not None], into, done)
    done_with = {module for module, _ in done.forms}
    _write([w for w in writes if w[0] not in done_with], done)
    if keep_original:
        _to_cpu(base, done)
    else:
        done.forms.clear()
    return done


def _repack(base: nn.Module, writes: Sequence[Write], into: str | None, done: Merged) -> None:
    """Gives quantised layers their new forms, and notes the old ones."""
    if into not in (None, *INTO):
        raise ValueError(f"into={into!r} is not one of {', '.join(map(repr, INTO))}.")
    if into is not None and not writes:
        raise ValueError(
            f"into={into!r} says which form of a quantised base to merge into, but none of the layers that "
            f"{done.node!r} adapts is quantised. Leave it out."
        )
    if not writes:
        return
    into, dtype = into or INTO[0], float_dtype(base)
    given: dict[nn.Module, dict[str, torch.Tensor | None]] = {}
    for module, name, value in writes:
        given.setdefault(module, {})[name] = value
    paths = {module: path for path, module in base.named_modules()}
    new = {module: repacked(module, paths[module], values, into, dtype) for module, values in given.items()}
    for module, (form, _) in new.items():
        done.forms.append((module, form_of(module)))
        done.new_biases += getattr(module, "bias", None) is None and getattr(form, "bias", None) is not None
        take_form(module, form)
    rows: list[Repacked] = [row for _, row in new.values() if row is not None]
    done.report = MergeReport(into=into, rows=rows)


def _write(writes: Sequence[Write], done: Merged) -> None:
    made: dict[int, nn.Parameter] = {}
    for module, name, value in writes:
        old = getattr(module, name)
        if name == "bias" and old is None:
            done.new_biases += 1
        if done.kept:
            done.originals.append((module, name, old))
        tied = made.get(id(old))
        if tied is not None and value is not None and torch.equal(tied, value.to(tied)):
            setattr(module, name, tied)  # tied weights that are still the same stay tied
        elif name == "weight" and kind_of(module) is not None and value is not None:
            store_of(module).write(module, value)
        else:
            setattr(module, name, None if value is None else nn.Parameter(value, requires_grad=False))
        if isinstance(new := getattr(module, name), nn.Parameter):
            made.setdefault(id(old), new)


def _is_finite(value: torch.Tensor) -> bool:
    """Most often read once, without a tensor of as many truths: a sum is finite only if all that it adds are."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


@torch.no_grad()
def unmerge(done: Merged) -> None:
    """Puts the very parameters back that stood there before, ties included."""
    for module, name, old in reversed(done.originals):
        now = getattr(module, name)
        if old is not None and now is not None and old.device != now.device:
            old.data = old.data.to(now.device)
        setattr(module, name, old)
    for module, form in done.forms:
        device = Layer(module).like().device
        take_form(module, form)
        if Layer(module).like().device != device:
            module.to(device)


def _new_weights(module: nn.Module, parts: Mapping[str, Sequence[Part]], node: Node) -> list[Write]:
    path = next(iter(parts.values()))[0].place.path
    if any(isinstance(p.method, ModuleCopy) for found in parts.values() for p in found):
        return _copied(module, parts, node)
    methods = {name: [p.method for p in found] for name, found in parts.items()}
    low = {n: found[0] for n, found in methods.items() if len(found) == 1 and isinstance(found[0], LowRankMethod)}
    plain = Layer(module, path)
    plain = plain if packed_store(module) is None else Full(plain)
    if len(low) == len(methods):
        changed = _plus_products(plain, low, node)
        return [(module, "weight", plain.kind.canonical(changed))]
    layer = around(node, plain, methods)
    stored = layer.kind.canonical(layer.weight())
    out: list[Write] = [(module, "weight", stored.to(plain.like().dtype))]
    if layer.bias is not layer_bias(module):
        bias = layer.bias
        out.append((module, "bias", None if bias is None else bias.to(stored.device, plain.like().dtype)))
    return out


def _plus_products(layer: Layer, methods: Mapping[str, LowRankMethod], node: Node) -> torch.Tensor:
    """W + sum_i g_i s_i B_i A_i, however many there are, as one product."""
    ups: list[torch.Tensor] = []
    downs: list[torch.Tensor] = []
    for name, gate in terms(node, methods.__contains__):
        a, b, scale = methods[name].factors()
        a, factor = a.flatten(1), number(gate, layer.site) * scale
        smaller = len(b) <= a.shape[1]  # the same of a transposed layer that is tied to this one
        ups.append(b * factor if smaller else b)
        downs.append(a if smaller else a * factor)
    weight = layer.weight()
    if not ups:
        return weight
    return plus_product(weight.flatten(1), torch.cat(ups, dim=1), torch.cat(downs)).view(weight.shape)


def _new_parameter(module: nn.Module, name: str, parts: Mapping[str, Sequence[Part]], node: Node) -> list[Write]:
    path = next(iter(parts.values()))[0].place.site
    methods = {adapter: methods_at(found) for adapter, found in parts.items()}
    return [(module, name, adapted(node, module, path, name, methods))]


def layer_bias(module: nn.Module) -> torch.Tensor | None:
    """The bias of a layer, or None."""
    return getattr(module, "bias", None)


def _copied(module: nn.Module, parts: Mapping[str, Sequence[Part]], node: Node) -> list[Write]:
    found = [p for own in parts.values() for p in own]
    written = list(terms(node, parts.__contains__))
    if len(found) != 1 or [gate for _, gate in written] != [Gate()]:
        raise ValueError(
            f"{found[0].place.path!r} is a full copy in an adapter, and {node!r} weighs it or changes it again; "
            "merge that adapter by itself."
        )
    source: Any = found[0].method.copy
    owners = dict(module.named_modules())
    return [
        (owners[name.rpartition(".")[0]], name.rpartition(".")[2], value.detach().clone())
        for name, value in source.named_parameters()
    ]


def _to_cpu(base: nn.Module, done: Merged) -> None:
    """Originals wait on the CPU, but for those that another module still uses."""
    used = {id(p) for p in base.parameters()}
    for _, _, old in done.originals:
        if old is not None and id(old) not in used:
            old.data = old.data.cpu()


def warn_of_new_biases(base: nn.Module, count: int) -> None:
    """Warns that `count` layers have a bias for which the model's class has no place."""
    warnings.warn(
        f"{count} layers that had no bias have one now. {type(base).__name__} has none there: saved and loaded again, "
        "the model would lose them.",
        stacklevel=3,
    )


def refuse_beside(adapters: Mapping[str, Adapter], node: Node) -> None:
    """Raises TypeError where part of `node` cannot live in the base's weights and would be lost with the adapters."""
    lost = [
        n for n in names(node) if any(isinstance(p.method, AttentionMethod | InputMethod) for p in adapters[n].parts)
    ]
    if lost:
        raise TypeError(
            f"{', '.join(map(repr, lost))} cannot be merged into weights (a prompt or a prefix) and would be lost. "
            "Name the others: merge_and_unload(adapter_names=[...])."
        )


def untie(base: Any) -> None:
    """Says in the configuration that embeddings and head differ where a merge made them differ (a reload would tie)."""
    config = getattr(base, "config", None)
    if (
        config is None
        or not getattr(config, "tie_word_embeddings", False)
        or not hasattr(base, "get_output_embeddings")
    ):
        return
    into, out = base.get_input_embeddings(), base.get_output_embeddings()
    if into is not None and out is not None and into.weight is not out.weight:
        config.tie_word_embeddings = False
