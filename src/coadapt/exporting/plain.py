"""A composition as one plain LoRA, which the simplest reader gets right: one rank, alpha = r, every scale within B."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..combining.copies import combined
from ..combining.deltas import Change, Product, Site, cut, distance, fixed, norm, sites, wide
from ..combining.report import Report, Row
from ..combining.weights import fill_factors
from ..core import roles, tied
from ..core.adapter import Adapter, ModuleCopy, build, replace_options
from ..core.composition import Node, names
from ..core.layer import Layer, kind_of
from ..core.method import AttentionMethod, InputMethod, WeightMethod
from ..core.replication import replication_of
from ..core.target import suffix_match
from ..formats.vocabulary import kept
from ..methods.bitfit import BitFit
from ..methods.bottleneck import Bottleneck
from ..methods.lora import LoRA, LoraConfig

RANK = 16
"""Of what has no factors, unless said otherwise: vLLM's own limit is 16."""


@dataclass(frozen=True)
class Obstacle:
    """Something that a plain LoRA at linear layers cannot hold."""

    what: str
    merges: bool = True
    """Whether a merged model could."""


def obstacles(base: Any, adapters: Mapping[str, Adapter], node: Node, ends: bool) -> list[Obstacle]:
    """All that keeps `node` from becoming a plain LoRA; `ends`: embeddings and heads may have one."""
    found: dict[str, Obstacle] = {}
    for name in names(node):
        for part in adapters[name].parts:
            path, kind = part.place.path, type(part.method).__name__
            match part.method:
                case AttentionMethod() | InputMethod():
                    found.setdefault(
                        name, Obstacle(f"{name!r} is virtual tokens ({kind}), no change of weights", False)
                    )
                case ModuleCopy() as method:
                    if reason := _no_matrix(part.place.module, path, base, ends):
                        found.setdefault(
                            f"{name} {path}", Obstacle(f"{name!r} holds a trained copy of {path!r}{reason}")
                        )
                    elif not _same_bias(method.copy, part.place.module):
                        found.setdefault(f"{name} {path}", Obstacle(f"{name!r} trains the bias of {path!r}"))
                case WeightMethod():
                    continue
                case _:
                    at_layer = kind_of(part.place.module) is not None and not issubclass(type(part.method), Bottleneck)
                    what = "is of layers, by what they are given" if at_layer else "is of modules between layers"
                    found.setdefault(name, Obstacle(f"{name!r} {what} ({kind} at {path!r})", False))
    if any(not obstacle.merges for obstacle in found.values()):
        return list(found.values())
    for site in sites(adapters, node):
        path = site.place.path
        if site.place.parameter:
            found.setdefault("experts", Obstacle(f"{path!r} is a parameter of no layer (experts)"))
        elif site.moves(node) and (reason := _no_matrix(site.place.module, path, base, ends)):
            found.setdefault(path, Obstacle(f"{path!r} is adapted{reason}"))
        elif site.bias(node) is not None:
            found.setdefault("biases", Obstacle(f"the bias of {path!r} is trained"))
    if any(kept(adapters[name], base, "auto") for name in names(node)):
        found["rows"] = Obstacle("the base's vocabulary was resized, and the new rows are part of the adapter")
    return list(found.values())


def _no_matrix(module: nn.Module, path: str, base: Any, ends: bool) -> str:
    """Why a plain LoRA has no place at this module; empty where it has."""
    words = roles.word_embeddings(base)
    kind = Layer(module, path).kind.name if isinstance(getattr(module, "weight", None), Tensor) else "module"
    if kind not in ("linear", "embedding"):
        return f", which is no linear layer ({type(module).__name__})"
    if module not in words and kind == "linear" and path not in roles.heads(base):
        return ""
    if not ends:
        return ", an embedding or a head, where this program takes no adapters"
    weights = tied.weights(base, words)
    if len(words) == 2 and weights[words[0]] is weights[words[1]]:
        return (
            ", and the embedding and the head are one weight in this model, which the program adapts at both or neither"
        )
    return "" if module in words or kind == "linear" else ", an embedding other than that of the tokens"


def _same_bias(one: Any, other: Any) -> bool:
    a, b = getattr(one, "bias", None), getattr(other, "bias", None)
    return a is b is None or (a is not None and b is not None and torch.equal(a, b))


@torch.no_grad()
def plain_lora(base: Any, adapters: Mapping[str, Adapter], node: Node, r: Any) -> tuple[Adapter, Report]:
    """A LoRA that stands for `node`, which must have no obstacles, and what was lost of it site by site.

    It sits at all layers whose names end alike (some readers skip a kind of layer that is not adapted in all of them),
    with zeros where nothing changes. What has factors keeps them, exactly; the rest is the best of a rank.

    Args:
        r: the largest rank to keep; "full" for as much as is exact; None for `RANK` where there are no factors.
    """
    node = fixed(node)
    changes: dict[str, Change] = {}
    rows: list[Row] = []
    for path, change, has_factors in _changes(base, adapters, node):
        made = change if isinstance(change, Product) and r in (None, "full") else cut(change, r or RANK)
        size = norm(change)
        off = 0.0 if made is change else distance(made, change)
        share = off / size if size and off > 1e-12 else 0.0
        changes[path] = made
        how = "factors" if has_factors and made is change else "svd"
        rows.append(Row(path=path, how=how, rank=made.rank, lost=share, apart=share, norm=size))
    if not changes:
        raise ValueError(f"{node!r} changes no weights, so there is nothing to export.")
    rank = max(row.rank or 1 for row in rows)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_ends(changes, base),
        layer_replication=replication_of(base),
        **_common(adapters, node),
    )
    adapter = build("default", config, base, blank=True)
    for part in adapter.parts:
        assert isinstance(part.method, LoRA)
        part.method.A.zero_()
        part.method.B.zero_()
        change = changes.pop(part.place.path, None)
        if change is not None:
            assert isinstance(change, Product)
            fill_factors(part.method, change)
    assert not changes, f"no place for {list(changes)}"
    adapter.config = replace_options(adapter.config, init_seed=None, modules_to_save=None)
    return adapter, Report(adapter_name="default", composition=node if isinstance(node, str) else repr(node), rows=rows)


def _changes(base: nn.Module, adapters: Mapping[str, Adapter], node: Node) -> Iterator[tuple[str, Change, bool]]:
    """Path, W' - W as (O, I), and whether it is known as factors."""
    for site in sites(adapters, node):
        if site.moves(node):
            yield site.place.path, site.change(node), _has_factors(site, node)
    states, _ = combined(base, adapters, node)
    for path, state in states.items():
        layer = Layer(base.get_submodule(path), path)
        yield path, wide(layer.kind.canonical(state["weight"])) - wide(layer.weight()), False


def _has_factors(site: Site, node: Node) -> bool:
    return site.factors(node) is not None


def _ends(changes: Mapping[str, Any], base: nn.Module) -> Sequence[str]:
    """The last parts of the names, or the last two where these would name what is no linear layer."""
    found: list[str] = []
    linear = {path for path, _ in roles.linears(base)}
    every = [path for path, _ in base.named_modules() if path]
    heads = set(roles.heads(base))
    for path in changes:
        for parts in (1, 2, 99):
            end = ".".join(path.split(".")[-parts:])
            named = {p for p in every if suffix_match(p, end)}
            if named == {path} or (named <= linear and not (named & heads)):
                found.append(end)
                break
    return sorted(set(found))


def _common(adapters: Mapping[str, Adapter], node: Node) -> dict[str, Any]:
    configs = [adapters[name].config for name in names(node)]
    tasks = {config.task_type for config in configs} - {None}
    return {
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "base_model_name_or_path": next((n for c in configs if (n := c.base_model_name_or_path)), None),
        "revision": next((c.revision for c in configs if c.revision), None),
        "modules_to_save": [],
        "inference_mode": True,
        "init_seed": 0,
    }


def is_new_bias(base: nn.Module, adapters: Mapping[str, Adapter], node: Node) -> list[str]:
    """The layers without a bias that `node` gives one to: a plain model of this class has no place for it."""
    return [
        site.place.path
        for site in sites(adapters, node)
        if site.layer.bias is None
        and any(isinstance(m, BitFit) for found in site.methods.values() for m in found)
        and site.bias(node) is not None
    ]
