"""Which modules of a model become sites: by name, by regular expression, by layer."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import TargetedConfig, WeightConfig, did_you_mean, nearest
from . import parts
from .bypass import bypassed
from .layer import kind_of
from .mixture import Mixture, mixtures
from .parameter_layer import MATRIX, numbered, whole
from .roles import Place, heads, linears, query_and_value


def suffix_match(path: str, name: str) -> bool:
    """Whether `name` is the end of `path`, in whole parts."""
    return path == name or path.endswith("." + name)


def layer_index(path: str, patterns: Sequence[str] | str | None = None) -> int | None:
    """The number of the layer that `path` lies in: the first number after one of `patterns`, or the first of all."""
    names = [patterns] if isinstance(patterns, str) else list(patterns or [r"[^.]+"])
    for name in names:
        if found := re.search(rf"(?:^|\.){name}\.(\d+)(?:\.|$)", path):
            return int(found[1])
    return None


Meant = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""Word for a part of a model -> the paths of the layers and of the parameters that it means."""


def layers(
    config: TargetedConfig, base: nn.Module, usual: Sequence[str] | None = None, meant: Meant | None = None
) -> list[tuple[str, nn.Module]]:
    """The layers (modules with a weight of their own) that `config` targets.

    Args:
        usual: paths to take where the configuration names no target; by default the projections that make queries
            and values in every attention block.
        meant: what its words mean, where that is known already.

    Raises:
        ValueError: something asked for matches nothing, or matches what cannot be adapted.
    """
    if usual is None:
        usual = query_and_value(base) if config.target_modules is None else ()
    found = modules(config, base, usual, layers_only=True, meant=meant)
    for path, module in found:
        if kind_of(module) is None:
            inside = [f"{path}.{n}" for n, m in module.named_modules() if kind_of(m) is not None][:4]
            raise ValueError(
                f"{type(config).__name__} adapts layers, but target {path!r} is a {type(module).__name__}. "
                + (f"Layers inside of it: {', '.join(inside)}." if inside else "It has no layer inside.")
            )
    return found


def places(
    config: TargetedConfig, base: nn.Module, kinds: Sequence[str], usual: Sequence[str] | None = None
) -> list[Place]:
    """As `layers`, with parameters that are no layer's weight: those that are named, fused experts, routers.

    Args:
        kinds: what the method adapts; without "experts" each expert is a place of its own.
    """
    meant = _meant(config, base, layers_only=True)
    named = parameters(config, base) if isinstance(config, WeightConfig) else []
    raw = list(dict.fromkeys([*(path for _, found in meant.values() for path in found), *named]))
    only_raw = raw and len(meant) == len(_listed(config)) and not any(paths for paths, _ in meant.values())
    found = [] if only_raw else layers(config, base, usual, meant)
    kept = _without_excluded(config, raw) if only_raw else [path for path in raw if not is_excluded(config, path)]
    at = [place for path in (_in_layers(config, kept) if kept else []) for place in _raw_places(base, path, kinds)]
    return [*(Place(path, module) for path, module in found), *at]


def _raw_places(base: nn.Module, path: str, kinds: Sequence[str]) -> list[Place]:
    owner, _, name = path.rpartition(".")
    place = Place(path, base.get_submodule(owner), parameter=name)
    kind = place.layer.kind.name
    if kind in kinds or kind == MATRIX.name:
        return [place]
    return [replace(place, path=numbered(path, e), expert=e) for e in range(place.layer.shape[0])]


ALL_LINEAR = "all-linear"


def named_parts(config: TargetedConfig) -> list[str]:
    """Those of its targets that are words for parts of a model."""
    return [word for word in _listed(config) if word == ALL_LINEAR or word in parts.WORDS]


def _listed(config: TargetedConfig) -> Sequence[str]:
    wanted = config.target_modules
    return [] if wanted is None else [wanted] if isinstance(wanted, str) else wanted


def _words(config: TargetedConfig, base: nn.Module, layers_only: bool) -> list[str]:
    """Those of the targets that name a part of the model, and no module that can be adapted itself."""
    found = named_parts(config)
    every = [p for p, m in base.named_modules() if found and (kind_of(m) is not None if layers_only else _is_called(m))]
    return [word for word in found if not any(suffix_match(path, word) for path in every)]


def _meant(config: TargetedConfig, base: nn.Module, layers_only: bool) -> Meant:
    return {word: _part(config, base, word) for word in _words(config, base, layers_only)}


def _is_called(module: nn.Module) -> bool:
    """Not so a list of experts, say: a model calls what is in it."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _part(config: TargetedConfig, base: nn.Module, word: str) -> tuple[list[str], list[str]]:
    """The paths of layers and of parameters that a word means."""
    if word != ALL_LINEAR:
        try:
            return parts.named(base, word)
        except ValueError as error:
            raise ValueError(f"{_who(config)}: target_modules={word!r}: {error}") from None
    top = heads(base)
    paths = [n for n, _ in linears(base) if not any(n == head or n.startswith(f"{head}.") for head in top)]
    if not paths:
        raise ValueError(
            f"{_who(config)}: target_modules='all-linear' finds none beside the head in {type(base).__name__}. "
            "Name the modules; LoRA takes convolutions, too."
        )
    raw = [m for m in mixtures(base) if m.raw]
    named = isinstance(config, WeightConfig) and config.target_parameters
    if raw and "experts" not in _listed(config) and not named:
        warnings.warn(_left_out(config, paths, raw), stacklevel=2)
    return paths, []


def modules(
    config: TargetedConfig,
    base: nn.Module,
    usual: Sequence[str],
    layers_only: bool = False,
    meant: Meant | None = None,
) -> list[tuple[str, nn.Module]]:
    """As `layers`, for modules of any class."""
    every = {n: m for n, m in base.named_modules() if n}
    wanted = config.target_modules
    words = _meant(config, base, layers_only) if meant is None else meant
    paths_of_words = {path for paths, _ in words.values() for path in paths}
    if words:
        names = [name for name in _listed(config) if name not in words]
        paths_of_words |= set(_by_names(config, names, every, base)) if names else set()
        if not paths_of_words:
            raise ValueError(
                f"{_who(config)}: target_modules={config.target_modules!r} names parameters that are no layers in this "
                f"{type(base).__name__}; this method adapts modules. Maps of weights adapt those (LoRA, OFT ...)."
            )
    match wanted:
        case _ if words:
            paths = [path for path in every if path in paths_of_words]
        case None:
            paths = list(usual)
            if not paths:
                raise ValueError(
                    f"{_who(config)} found no usual place in {type(base).__name__}; name target_modules. {_some(base)}"
                )
        case str():
            paths = [n for n in every if re.fullmatch(wanted, n)]
            if not paths:
                raise ValueError(
                    f"{_who(config)}: the regular expression target_modules={wanted!r} matches no module. {_some(base)}"
                )
        case _:
            paths = _by_names(config, wanted, every, base)
    paths = _without_excluded(config, paths)
    paths = _in_layers(config, paths)
    skipped = bypassed(base)
    if never := next((path for path in paths if path in skipped), None):
        raise ValueError(
            f"{_who(config)}: {never!r} cannot be adapted: {skipped[never]}, so an adapter there would never run."
        )
    if lists := [path for path in paths if not _is_called(every[path])]:
        raise ValueError(
            f"{_who(config)}: {lists[0]!r} is a {type(every[lists[0]]).__name__}, which nothing calls, so an adapter "
            "there would never run. Name modules inside of it."
        )
    if both := sorted({p for p in paths for name in config.modules_to_save or () if suffix_match(p, name)}):
        raise ValueError(f"{_who(config)}: {both} are in target_modules and in modules_to_save; choose one.")
    return [(p, every[p]) for p in paths]


def parameters(config: WeightConfig, base: nn.Module) -> list[str]:
    """The paths of the parameters that `config.target_parameters` names: ends of their paths, in whole parts.

    Raises:
        ValueError: a name matches nothing, or the weight of a layer.
    """
    wanted = config.target_parameters
    if not wanted:
        return []
    floats = {name: p for name, p in base.named_parameters() if p.is_floating_point()}  # not what is quantised
    every = {name: name.rpartition(".") for name, p in floats.items() if p.dim() in (2, 3)}
    raw = [n for n, (owner, _, _) in every.items() if kind_of(base.get_submodule(owner)) is None]
    if missing := [name for name in wanted if not any(suffix_match(path, name) for path in raw)]:
        layer = [path for path in every if any(suffix_match(path, name) for name in missing)]
        there = list(dict.fromkeys(".".join(path.split(".")[-3:]) for path in raw))
        hint = f" {layer[0]!r} is the weight of a layer: name that in target_modules." if layer else ""
        raise ValueError(
            f"{_who(config)}: target_parameters {missing} match no parameter of this {type(base).__name__} that is not "
            f"a layer's weight.{hint} There are: {', '.join(there) or 'none'}."
        )
    return [path for path in raw if any(suffix_match(path, name) for name in wanted)]


def _left_out(config: TargetedConfig, paths: Sequence[str], mixed: Sequence[Mixture]) -> str:
    ends = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return (
        f"{_who(config)}: target_modules='all-linear' found {len(paths)} layers ({ends}). The experts of {len(mixed)} "
        f"mixtures are not among them: {mixed[0].experts!r} holds {' and '.join(mixed[0].raw)} as parameters, not as "
        "layers. Add them, target_modules=['all-linear', 'experts'], or name target_modules to say that this is meant."
    )


def _by_names(config: TargetedConfig, names: Sequence[str], every: dict[str, nn.Module], base: nn.Module) -> list[str]:
    wanted, found, matched = set(names), list[str](), set[str]()
    for path in every:
        if own := wanted.intersection(_ends(path)):
            found.append(path)
            matched |= own
    if missing := [name for name in names if name not in matched]:
        ends = {path.rpartition(".")[2] for path in every} | set(every)
        hints = "; ".join(f"{m!r}: nearest {', '.join(nearest(m, ends)) or 'nothing'}" for m in missing)
        raise ValueError(f"{_who(config)}: target_modules matches no module for {missing} ({hints}). {_some(base)}")
    return found


def _ends(path: str) -> list[str]:
    """All that `suffix_match` takes as its name."""
    return [path, *(path[i + 1 :] for i, letter in enumerate(path) if letter == ".")]


def _without_excluded(config: TargetedConfig, paths: list[str]) -> list[str]:
    excluded = config.exclude_modules
    if excluded is None:
        return paths
    gone = {p for p in paths if is_excluded(config, p)}
    if isinstance(excluded, str):
        idle = [] if gone else [excluded]
    else:
        idle = [name for name in excluded if not any(suffix_match(p, name) for p in paths)]
    if idle:
        raise ValueError(f"{_who(config)}: exclude_modules {idle} leaves nothing out: no target has such a name.")
    if len(gone) == len(paths):
        raise ValueError(f"{_who(config)}: exclude_modules={excluded!r} leaves no target over.")
    return [p for p in paths if p not in gone]


def is_excluded(config: TargetedConfig, path: str) -> bool:
    match config.exclude_modules:
        case None:
            return False
        case str() as pattern:
            return re.fullmatch(pattern, path) is not None
        case names:
            return any(suffix_match(path, name) for name in names)


def _in_layers(config: TargetedConfig, paths: list[str]) -> list[str]:
    if config.layers_to_transform is None:
        return paths
    asked = config.layers_to_transform
    wanted = {asked} if isinstance(asked, int) else set(asked)
    numbered = {p: layer_index(p, config.layers_pattern) for p in paths}
    there = {n for n in numbered.values() if n is not None}
    if lost := sorted(wanted - there):
        raise ValueError(
            f"{_who(config)}: layers_to_transform {lost} hold no target; the targets lie in layers {sorted(there)}."
        )
    return [p for p, n in numbered.items() if n in wanted]


def _who(config: TargetedConfig) -> str:
    return type(config).__name__


def _some(base: nn.Module) -> str:
    ends = dict.fromkeys(path.rpartition(".")[2] for path, _ in linears(base))
    return f"Linear layers of this {type(base).__name__}: {', '.join(ends) or 'none'}."


def by_name(base: nn.Module, names: Sequence[str], what: str) -> list[tuple[str, nn.Module]]:
    """The modules whose path ends in one of `names`. Raises ValueError for a name that matches nothing."""
    every = {n: m for n, m in base.named_modules() if n} if names else {}
    for name in names:
        if not any(suffix_match(path, name) for path in every):
            ends = {path.rpartition(".")[2] for path in every}
            raise ValueError(
                f"{what}: no module of {type(base).__name__} is called {name!r}.{did_you_mean(name, ends)}"
            )
    return [(p, m) for p, m in every.items() if any(suffix_match(p, name) for name in names)]


def among(config: TargetedConfig, field: str, paths: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Those of the targets `paths` that a second field of the configuration names; left out, those in `usual`.

    Raises:
        ValueError: a name matches none of the targets.
    """
    wanted = getattr(config, field)
    if wanted is None:
        return [path for path in paths if whole(path) in usual]
    if isinstance(wanted, str):
        found, idle = [p for p in paths if re.fullmatch(wanted, p)], [wanted]
        idle = [] if found else idle
    else:
        found = [p for p in paths if any(suffix_match(whole(p), name) for name in wanted)]
        idle = [name for name in wanted if not any(suffix_match(whole(p), name) for p in paths)]
    if idle:
        ends = sorted({whole(p).rpartition(".")[2] for p in paths})
        raise ValueError(f"{_who(config)}: {field} {idle} matches none of the targets, which are called {ends}.")
    return found


def matrices(places: Sequence[Place], kinds: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(path, O, I K) of the places at layers of these kinds."""
    for place in places:
        layer = place.layer
        if layer.kind.name in kinds:
            yield place.path, layer.shape[0], math.prod(layer.shape[1:])


def largest(places: Sequence[Place]) -> tuple[int, int]:
    """The most O and the most I K of the places."""
    shapes = [place.layer.shape for place in places]
    return max(shape[0] for shape in shapes), max(math.prod(shape[1:]) for shape in shapes)


def matching(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """What the first key of `pattern` that fits says of `path`: the end of its name, or a regular expression for it."""
    return next((value for key, value in pattern.items() if _fits(key, path)), default)


def check_patterns(config: TargetedConfig, places: Sequence[Place], *names: str) -> None:
    """Refuses a key of the patterns (fields of these `names`) that fits none of the places."""
    for name in names:
        for key in getattr(config, name):
            if not any(_fits(key, place.path) for place in places):
                raise ValueError(
                    f"{_who(config)}: {name} key {key!r} matches none of the {len(places)} targets, "
                    f"{places[0].path!r} among them."
                )


def check_divides(config: Any, name: str, places: Sequence[Place]) -> None:
    """Refuses a field that does not divide the inputs and outputs of all places."""
    size = getattr(config, name)
    for place in places:
        out, *rest = place.layer.shape
        if out % size or math.prod(rest) % size:
            raise ValueError(
                f"{_who(config)}: {name}={size} does not divide the {math.prod(rest)} inputs and {out} outputs of "
                f"{place.path!r}. Pick a divisor of both, or leave the layer out of target_modules."
            )


def _fits(key: str, path: str) -> bool:
    return any(re.fullmatch(rf"(.*\.)?({key})", name) for name in {path, whole(path)})


def check_transposed(config: Any, modules: Sequence[nn.Module]) -> None:
    """Refuses fan_in_fan_out=True where no layer stores its weight transposed."""
    if config.fan_in_fan_out and not any("Conv1D" in type(module).__name__ for module in modules):
        raise ValueError(
            f"{_who(config)}: fan_in_fan_out=True, but no target stores its weight transposed. Leave it out: it is "
            "found."
        )
