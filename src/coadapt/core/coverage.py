"""What was found in a model: its layers by role, and which methods have a place there, or why not."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import PeftConfig
from . import backbone, parts
from .bypass import bypassed
from .layer import kind_of
from .method import METHODS
from .mixture import mixtures
from .roles import attentions


@dataclass(frozen=True)
class Role:
    """Modules that do the same in a model."""

    name: str
    paths: tuple[str, ...]
    note: str = ""
    """What a user should know of them."""


@dataclass(frozen=True)
class Fit:
    """A method, and where it sits in a model if the user names no target."""

    method: str
    """Its `peft_type`."""
    paths: tuple[str, ...]
    why: str = ""
    """Why it has no place."""


def roles(base: nn.Module) -> list[Role]:
    """Every layer of `base` under exactly one role, then the sites of prefixes and the input."""
    out = [Role(name, tuple(paths), _note(base, name, paths)) for name, paths in parts.by_role(base).items()]
    return [*out, *_prefix_sites(base), *_inputs(base)]


def _note(base: nn.Module, name: str, paths: Iterable[str]) -> str:
    first = base.get_submodule(next(iter(paths)))
    if name == "experts" and (raw := [m.raw for m in mixtures(base) if m.raw]):
        return f"no layers, but parameters: {', '.join(raw[0])}"
    if name in ("norm", "router") and kind_of(first) is None:
        return f"{type(first).__name__}, which no method adapts"
    return bypassed(base).get(next(iter(paths)), "")


def _prefix_sites(base: nn.Module) -> list[Role]:
    found = attentions(base)
    out: list[Role] = []
    for role in dict.fromkeys(a.role for a in found):
        here = [a for a in found if a.role == role]
        sizes = sorted({(a.heads, a.head_dim) for a in here})
        note = ", ".join(f"{heads} heads of {dim}" for heads, dim in sizes)
        out.append(Role(f"prefix site: {role}", tuple(a.path for a in here), f"keys and values of {note}"))
    return out


def _inputs(base: Any) -> list[Role]:
    try:
        found = backbone.backbones(base)
        others = backbone.without_tokens(base)
    except ValueError:
        return []
    out = [Role(f"input: {b.role}", (b.path,), f"tokens, {b.width} wide") for b in found]
    return [*(Role(f"input: {role}", (), f"no tokens: a {cls} makes it") for role, cls in others.items()), *out]


def fits(base: nn.Module) -> list[Fit]:
    """Every registered method, with the places that it takes in `base` by itself."""
    return [_fit(name, method.config_class, base) for name, method in METHODS.items()]


def usual(config_class: type[PeftConfig]) -> PeftConfig:
    """A configuration that names no target: defaults, and 1 for each number that has none, or a list of it."""
    fields = [f for f in dataclasses.fields(config_class) if f.init]
    required = [f for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    make: Any = config_class
    return make(**{f.name: [1] if "Sequence" in str(f.type) else 1 for f in required})


def _fit(name: str, config_class: type[PeftConfig], base: nn.Module) -> Fit:
    try:
        places = METHODS[name].places(usual(config_class), base)
    except ValueError as error:
        return Fit(name, (), str(error))
    return Fit(name, tuple(p.path for p in places), "" if places else "nothing in this model is one of its places")
