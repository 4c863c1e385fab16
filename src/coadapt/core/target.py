"""Which modules of a model become sites: by name, by regular expression, by layer."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..config import TargetedConfig, did_you_mean, nearest
from .layer import kind_of
from .mixture import Mixture, mixtures
from .roles import Place, bypassed, heads, linears, query_and_value


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


def layers(config: TargetedConfig, base: nn.Module, usual: Sequence[str] | None = None) -> list[tuple[str, nn.Module]]:
    """The layers (modules with a weight of their own) that `config` targets.

    Args:
        usual: paths to take where the configuration names no target; by default the projections that make queries
            and values in every attention block.

    Raises:
        ValueError: something asked for matches nothing, or matches what cannot be adapted.
    """
    if usual is None:
        usual = query_and_value(base) if config.target_modules is None else ()
    found = modules(config, base, usual)
    for path, module in found:
        if kind_of(module) is None:
            inside = [f"{path}.{n}" for n, m in module.named_modules() if kind_of(m) is not None][:4]
            raise ValueError(
                f"{type(config).__name__} adapts layers, but target {path!r} is a {type(module).__name__}. "
                + (f"Layers inside of it: {', '.join(inside)}." if inside else "It has no layer inside.")
            )
    return found


def modules(config: TargetedConfig, base: nn.Module, usual: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """As `layers`, for modules of any class."""
    every = {n: m for n, m in base.named_modules() if n}
    wanted = config.target_modules
    match wanted:
        case None:
            paths = list(usual)
            if not paths:
                raise ValueError(
                    f"{_who(config)} found no usual place in {type(base).__name__}; name target_modules. {_some(base)}"
                )
        case "all-linear":
            top = heads(base)
            paths = [n for n, _ in linears(base) if not any(n == head or n.startswith(f"{head}.") for head in top)]
            if not paths:
                raise ValueError(
                    f"{_who(config)}: target_modules='all-linear' finds none beside the head in {type(base).__name__}. "
                    "Name the modules; LoRA takes convolutions, too."
                )
            if (left := [m for m in mixtures(base) if m.raw]) and not getattr(config, "target_parameters", None):
                warnings.warn(_left_out(config, paths, left), stacklevel=2)
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
    if both := sorted({p for p in paths for name in config.modules_to_save or () if suffix_match(p, name)}):
        raise ValueError(f"{_who(config)}: {both} are in target_modules and in modules_to_save; choose one.")
    return [(p, every[p]) for p in paths]


def parameters(config: Any, base: nn.Module) -> list[Place]:
    """The parameters that `config.target_parameters` names: ends of their paths, in whole parts.

    Raises:
        ValueError: a name matches nothing, or the weight of a layer.
    """
    wanted = config.target_parameters
    if not wanted:
        return []
    floats = {name: p for name, p in base.named_parameters() if p.is_floating_point()}  # not what is quantised
    every = {name: name.rpartition(".") for name, p in floats.items() if p.dim() in (2, 3)}
    raw = {n: (owner, end) for n, (owner, _, end) in every.items() if kind_of(base.get_submodule(owner)) is None}
    if missing := [name for name in wanted if not any(suffix_match(path, name) for path in raw)]:
        layer = [path for path in every if any(suffix_match(path, name) for name in missing)]
        there = list(dict.fromkeys(".".join(path.split(".")[-3:]) for path in raw))
        hint = f" {layer[0]!r} is the weight of a layer: name that in target_modules." if layer else ""
        raise ValueError(
            f"{_who(config)}: target_parameters {missing} match no parameter of this {type(base).__name__} that is not "
            f"a layer's weight.{hint} There are: {', '.join(there) or 'none'}."
        )
    return [
        Place(path, base.get_submodule(owner), parameter=end)
        for path, (owner, end) in raw.items()
        if any(suffix_match(path, name) for name in wanted)
    ]


def _left_out(config: TargetedConfig, paths: Sequence[str], mixed: Sequence[Mixture]) -> str:
    ends = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return (
        f"{_who(config)}: target_modules='all-linear' found {len(paths)} layers ({ends}). The experts of {len(mixed)} "
        f"mixtures are not among them: {mixed[0].experts!r} holds {' and '.join(mixed[0].raw)} as parameters, not as "
        "layers. Name those in target_parameters (LoraConfig), or target_modules to say that this is meant."
    )


def _by_names(config: TargetedConfig, names: Sequence[str], every: dict[str, nn.Module], base: nn.Module) -> list[str]:
    missing = [name for name in names if not any(suffix_match(path, name) for path in every)]
    if missing:
        ends = {path.rpartition(".")[2] for path in every} | set(every)
        hints = "; ".join(f"{m!r}: nearest {', '.join(nearest(m, ends)) or 'nothing'}" for m in missing)
        raise ValueError(f"{_who(config)}: target_modules matches no module for {missing} ({hints}). {_some(base)}")
    return [path for path in every if any(suffix_match(path, name) for name in names)]


def _without_excluded(config: TargetedConfig, paths: list[str]) -> list[str]:
    excluded = config.exclude_modules
    if excluded is None:
        return paths
    if isinstance(excluded, str):
        gone = {p for p in paths if re.fullmatch(excluded, p)}
        idle = [] if gone else [excluded]
    else:
        gone = {p for p in paths if any(suffix_match(p, name) for name in excluded)}
        idle = [name for name in excluded if not any(suffix_match(p, name) for p in paths)]
    if idle:
        raise ValueError(f"{_who(config)}: exclude_modules {idle} leaves nothing out: no target has such a name.")
    if len(gone) == len(paths):
        raise ValueError(f"{_who(config)}: exclude_modules={excluded!r} leaves no target over.")
    return [p for p in paths if p not in gone]


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
        return [path for path in paths if path in usual]
    if isinstance(wanted, str):
        found, idle = [p for p in paths if re.fullmatch(wanted, p)], [wanted]
        idle = [] if found else idle
    else:
        found = [p for p in paths if any(suffix_match(p, name) for name in wanted)]
        idle = [name for name in wanted if not any(suffix_match(p, name) for p in paths)]
    if idle:
        ends = sorted({p.rpartition(".")[2] for p in paths})
        raise ValueError(f"{_who(config)}: {field} {idle} matches none of the targets, which are called {ends}.")
    return found


def check_transposed(config: Any, modules: Sequence[nn.Module]) -> None:
    """Refuses fan_in_fan_out=True where no layer stores its weight transposed."""
    if config.fan_in_fan_out and not any("Conv1D" in type(module).__name__ for module in modules):
        raise ValueError(
            f"{_who(config)}: fan_in_fan_out=True, but no target stores its weight transposed. Leave it out: it is "
            "found."
        )
