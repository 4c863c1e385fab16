"""Adapters that change weights: their true changes, W' - W, become one LoRA; or one adapter of biases, or of norms."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core import roles, target
from ..core.adapter import Adapter, ModuleCopy, build
from ..core.composition import Node
from ..core.replication import replication_of
from ..methods.bitfit import BitFit, BitFitConfig
from ..methods.full_copy import FullCopyConfig
from ..methods.ln_tuning import LNTuning, LNTuningConfig
from ..methods.lora import LoRA, LoraConfig
from .deltas import Change, Product, Site, averaged, cut, dense, distance, norm, sites, voters
from .report import Report, Row
from .ways import WAYS, Options, Order, Voting, Way, ways_text


@dataclass(frozen=True)
class Result:
    """What the new adapter has at one site."""

    site: Site
    change: Change | None
    """None where only the bias changes; a product where it becomes a LoRA's factors, a vector for a norm's weight."""
    bias: Tensor | None


def combine(order: Order) -> tuple[Adapter, Report]:
    """Of adapters that are maps of weights only."""
    node, options = order.node, order.options
    found = sites(order.adapters, node)
    matrices = [site for site in found if site.is_matrix and site.moves(node)]
    how = order.how or _exact(matrices, node)
    _check_rank(matrices, how, options)
    _check_one(order.base, found, matrices, node)
    asked = averaged(node) if how == "mean" else node
    voting = options.voting
    results: list[Result] = []
    rows: list[Row] = []
    for site in found:
        result, more = _at(site, asked, how, options, voting)
        results.append(result)
        rows += more
    adapter = build(order.name, _config(order.base, results, order.common), order.base)
    _fill(adapter, results)
    notes = [f"Biases are changed at {n} layers, exactly."] if (n := sum(r.bias is not None for r in results)) else []
    notes = [] if WAYS[how].vote else notes
    return adapter, Report(adapter_name=order.name, rows=rows, notes=notes)


def _exact(matrices: Sequence[Site], node: Node) -> str:
    """The way that loses nothing."""
    if without := [site for site in matrices if site.factors(node) is None]:
        raise ValueError(
            f"This combination is not of low rank ({without[0].obstacle()} has no factors), so no small LoRA is equal "
            f"to it. Say how=, and r= ('full' is exact, and as large as the layer). {ways_text()}"
        )
    return "cat" if matrices else "linear"


def _check_rank(matrices: Sequence[Site], how: str, options: Options) -> None:
    if not matrices:
        if options.r is not None or how in ("cat", "svd", "ab_linear"):
            raise ValueError(
                f"No weight matrix is changed here, only biases or norms: how={how!r} and r= have no meaning for "
                "those. Use how='linear', which is exact, or another without r=."
            )
    elif WAYS[how].vote and options.r is None:
        raise ValueError(f"how={how!r} gives changes of full rank; say r=, the rank to keep (or 'full').")


def _check_one(base: nn.Module, found: Sequence[Site], matrices: Sequence[Site], node: Node) -> None:
    """Raises ValueError where no one adapter holds all that these change."""
    norms = [site.place.path for site in found if site.moves(node) and not site.is_matrix]
    biases = [site.place.path for site in found if site.bias(node) is not None]
    if norms and (matrices or set(biases) - set(norms)):
        raise ValueError(
            f"A LoRA cannot hold the change of a norm's weight ({norms[0]!r}), and norms alone are not all that these "
            "adapters change. Combine those at norms by themselves."
        )
    new = sorted(set(biases) - set(roles.with_bias(base)))
    if (
        matrices
        and new
        and (outside := sorted(set(biases) - {m.place.path for m in matrices if not m.place.parameter}))
    ):
        raise ValueError(
            f"These adapters give a bias to {new[0]!r}, which has none: a LoRA that holds such ones has biases at its "
            f"own layers only, and {outside[0]!r} is none of them. Combine those at biases (BitFit) by themselves."
        )


def _at(site: Site, node: Node, how: str, options: Options, voting: Voting) -> tuple[Result, list[Row]]:
    """The new change at one site, and what to report of it."""
    way, path = WAYS[how], site.place.path
    rows: list[Row] = []
    bias = site.bias(node)
    if way.vote and bias is not None:
        plain = bias
        bias = _voted(way, [(site.bias(n), w) for n, w in voters(node)], voting)
        off = _share(distance(bias, plain), norm(plain))
        rows.append(Row(path=f"{path}.bias", how=how, lost=0.0, apart=off, norm=norm(plain)))
    elif bias is not None and not site.moves(node):
        rows.append(Row(path=f"{path}.bias", how=how, lost=0.0, apart=0.0, norm=norm(bias)))
    if not site.moves(node):
        return Result(site, None, bias), rows
    true = site.change(node)
    wanted = true
    if way.vote:
        wanted = _voted(way, [(dense(site.change(n)), w) for n, w in voters(node) if site.moves(n)], voting)
    made: Change = wanted
    if site.is_matrix:
        made = _ab_linear(site, node) if how == "ab_linear" else _of_rank(site, wanted, how, options)
    far = 0.0 if made is true else distance(made, true)
    lost = 0.0 if made is wanted else distance(made, wanted) if way.vote else far
    rank = made.rank if isinstance(made, Product) else None
    size = norm(true)
    row = Row(path=path, how=how, rank=rank, lost=_share(lost, norm(wanted)), apart=_share(far, size), norm=size)
    return Result(site, made, bias), [row, *rows]


def _of_rank(site: Site, change: Change, how: str, options: Options) -> Product:
    if options.r is not None:
        return cut(change, options.r)
    if isinstance(change, Product):
        return change
    raise ValueError(
        f"{site.obstacle()} has no factors to put side by side. "
        + ("Use how='svd' with r=." if how == "cat" else f"Say r= with how={how!r}, the rank to keep (or 'full').")
    )


def _share(part: float, whole: float) -> float:
    if part < _NOTHING:
        return 0.0
    return part / whole if whole >= _NOTHING else float("inf")


_NOTHING = 1e-12
"""A norm below this is rounding: the parameters themselves are single precision."""


def _voted(way: Way, changes: Sequence[tuple[Tensor | None, float]], voting: Voting) -> Tensor:
    assert way.vote is not None
    return way.vote([weight * change for change, weight in changes if change is not None], voting)


def _ab_linear(site: Site, node: Node) -> Product:
    """(sum_i sqrt(g_i) B_i) (sum_i sqrt(g_i) A_i): the factors combined apart, cross terms included."""
    found = site.factors(node)
    if found is None:
        raise ValueError(f"how='ab_linear' needs factors everywhere; {site.obstacle()} has none. Use 'svd' with r=.")
    if len(ranks := sorted({a.shape[-2] for a, _, _ in found})) > 1:
        raise ValueError(
            f"how='ab_linear' adds factors of one rank; at {site.place.path!r} the ranks are {ranks}. Use 'linear', "
            "which adds the changes themselves."
        )
    a = torch.stack([abs(s) ** 0.5 * (1 if s >= 0 else -1) * a for a, _, s in found]).sum(0)
    return Product(torch.stack([abs(s) ** 0.5 * b for _, b, s in found]).sum(0), a)


# ---- the new adapter -------------------------------------------------------------------------------------------------


def _config(base: nn.Module, results: Sequence[Result], common: Mapping[str, Any]) -> PeftConfig:
    """What the results are: a LoRA, with biases or not; norms alone; biases alone; copies of modules alone."""
    layers = {r.site.place.path: r.change.rank for r in results if isinstance(r.change, Product) and _is_layer(r)}
    raw = {r.site.place.path: r.change.rank for r in results if isinstance(r.change, Product) and not _is_layer(r)}
    norms = [r.site.place.path for r in results if isinstance(r.change, Tensor)]
    biases = [r.site.place.path for r in results if r.bias is not None]
    if norms:
        return LNTuningConfig(target_modules=_named(norms, base), **common)
    if not layers and not raw and not biases:
        targets = _named(common["modules_to_save"], base)
        return FullCopyConfig(target_modules=targets, **{**common, "modules_to_save": None})
    if not layers and not raw:
        return BitFitConfig(target_modules=_named(biases, base), **common)
    r, patterns = _ranks(layers, raw)
    new = bool(set(biases) - set(roles.with_bias(base)))
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=_named(list(layers), base) if layers else None,
        target_parameters=list(raw) or None,
        rank_pattern=patterns,
        alpha_pattern=patterns,
        lora_bias=new,
        layer_replication=replication_of(base),
        bias="none" if new or not biases else "lora_only" if set(biases) <= set(layers) else "all",
        **common,
    )


def _is_layer(result: Result) -> bool:
    return not result.site.place.parameter


def _ranks(layers: Mapping[str, int], raw: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The rank, and a pattern for the sites with another: by the last part of their names where that is enough.

    Parameters all get the largest rank among them (filled with zeros): not every reader has patterns for those.
    """
    r = max(raw.values()) if raw else Counter(layers.values()).most_common(1)[0][0]
    by_end: dict[str, set[int]] = {}
    for path, rank in layers.items():
        by_end.setdefault(path.rpartition(".")[2], set()).add(rank)
    whole = {path: rank for path, rank in layers.items() if len(by_end[path.rpartition(".")[2]]) > 1}
    ends = {end: min(ranks) for end, ranks in by_end.items() if len(ranks) == 1 and ranks != {r}}
    other = {
        path: rank for path, rank in whole.items() if rank != r or any(p != path and path.endswith(p) for p in whole)
    }
    longest = sorted(other, key=len, reverse=True)  # the first that matches counts, and ends of names match
    return r, {**{path: other[path] for path in longest}, **ends}


def _named(paths: Sequence[str], base: nn.Module) -> list[str] | str:
    """Targets that name just `paths`: ends of their names, else whole, else as a regular expression."""
    every = [name for name, _ in base.named_modules() if name]
    for names in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if {path for path in every if any(target.suffix_match(path, name) for name in names)} == set(paths):
            return names
    return "|".join(map(re.escape, sorted(paths)))


def _fill(adapter: Adapter, results: Sequence[Result]) -> None:
    here = {(r.site.place.module, r.site.place.parameter): r for r in results}
    for part in adapter.parts:
        result = here.get((part.place.module, part.place.parameter))
        match part.method:
            case LoRA() as method:
                assert result is not None and isinstance(result.change, Product)
                fill_factors(method, result.change)
            case BitFit() as method:
                if result is not None and result.bias is not None:
                    method.delta.copy_(result.bias)
            case LNTuning() as method:
                assert result is not None
                if isinstance(result.change, Tensor):
                    method.weight.add_(result.change)
                if method.bias is not None and result.bias is not None:
                    method.bias.add_(result.bias)
            case _:  # a copy of a module
                assert isinstance(part.method, ModuleCopy)


def fill_factors(method: LoRA, change: Product) -> None:
    """The factors, with zeros where the method has more rank. Its scale is 1."""
    room = method.B.shape[-1] - change.rank
    a, b = nn.functional.pad(change.a, (0, 0, 0, room)), nn.functional.pad(change.b, (0, room))
    method.A.copy_(a.reshape(method.A.shape))
    method.B.copy_(b)
