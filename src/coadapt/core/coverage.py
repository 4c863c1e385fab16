"""What was found in a model: its layers by role, and which methods have a place there, or why not."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import PeftConfig
from . import backbone
from .layer import kind_of
from .method import METHODS
from .mixture import mixtures
from .roles import PROJECTIONS, attentions, blocks, bypassed, heads, linears, query_and_value


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
    found: dict[str, list[str]] = {}
    named = _roles_of_linears(base)
    for path, module in base.named_modules():
        if (role := named.get(path) or _role_of(path, module)) is not None:
            found.setdefault(role, []).append(path)
    out = [Role(name, tuple(paths), _note(base, name, paths)) for name, paths in found.items()]
    return [*sorted(out, key=lambda r: _ORDER.index(r.name)), *_prefix_sites(base), *_inputs(base)]


_ORDER = (
    "embedding", "attention query", "attention key", "attention value", "attention fused q, k, v", "attention output",
    "attention, other", "feed-forward first", "feed-forward last", "feed-forward, other", "router", "experts",
    "convolution", "norm", "linear, other", "head",
)  # fmt: skip


def _roles_of_linears(base: nn.Module) -> dict[str, str]:
    """The path of every linear layer, and of what belongs to a mixture of experts -> role."""
    named: dict[str, str] = {}
    top = set(heads(base))
    repeated = blocks(base)
    ends = {p for block in repeated for p, _ in block.attention}
    inside = {p.rpartition(".")[0] for p in ends}
    inside |= {p.rpartition(".")[0] for p in query_and_value(base)}
    mixed = mixtures(base)
    first = {b.feed_forward[0][0] for b in repeated if b.feed_forward}
    last = {b.feed_forward[1][0] for b in repeated if b.feed_forward}
    projections = {end: role for role, ends in PROJECTIONS.items() for end in ends}
    for path, _ in linears(base):
        owner, _, end = path.rpartition(".")
        block = any(path.startswith(f"{b.path}.") for b in repeated)
        if path in top:
            named[path] = "head"
        elif path in ends:
            named[path] = "attention output"
        elif owner in inside:
            made = projections.get(end)
            named[path] = "attention, other" if made is None else f"attention {made}"
            if made == "fused":
                named[path] = "attention fused q, k, v"
        elif any(path.startswith(f"{m.experts}.") for m in mixed):
            named[path] = "experts"
        elif path in first or path in last:
            named[path] = "feed-forward first" if path in first else "feed-forward last"
        else:
            named[path] = "feed-forward, other" if block else "linear, other"
    for mixture in mixed:
        named[mixture.router] = "router"
        if mixture.raw:
            named[mixture.experts] = "experts"
    return named


def _role_of(path: str, module: nn.Module) -> str | None:
    kind = kind_of(module)
    if kind is not None:
        return {"conv": "convolution", "embedding": "embedding", "norm": "norm"}.get(kind.name, "linear, other")
    weight = getattr(module, "weight", None)
    return "norm" if isinstance(weight, Tensor) and weight.dim() == 1 else None


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
