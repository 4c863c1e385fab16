"""The parts of a model: every layer under one role, and the words that name roles as targets."""

import re

from torch import Tensor, nn

from .bypass import bypassed
from .layer import kind_of
from .mixture import mixtures
from .roles import PROJECTIONS, blocks, heads, linears, query_and_value, word_embeddings

WORDS = {
    "attention": ("attention ", "attention,"),
    "mlp": ("feed-forward",),
    "experts": ("experts",),
    "shared_experts": ("shared experts",),
    "router": ("router",),
    "ssm": ("state space",),
    "embeddings": ("embedding",),
    "head": ("head",),
}
"""What `target_modules` takes for a part of a model -> the beginnings of the roles that it means."""

_STATE_SPACE = re.compile(r"Mamba|SSM|DeltaNet|RgLru|RecurrentBlock|[ms]LSTM")
"""Classes that mix tokens by a recurrence of states."""

_FEED_FORWARD = re.compile(r"\.\d+\.(mlps?|ffns?|ff|feed_forward)\.")
"""In repeated layers without attention, whose parts are found by their names only."""


def by_role(base: nn.Module) -> dict[str, list[str]]:
    """The paths of the layers of `base` (and of experts and routers that are parameters) by role, in a fixed order."""
    found: dict[str, list[str]] = {}
    named = _of_linears(base)
    for path, module in base.named_modules():
        if (role := named.get(path) or _of_others(path, module)) is not None:
            found.setdefault(role, []).append(path)
    return {role: found[role] for role in _ORDER if role in found}


def named(base: nn.Module, word: str) -> tuple[list[str], list[str]]:
    """What one of WORDS means in `base`: the paths of layers, and of parameters that are no layer's weight.

    Raises:
        ValueError: nothing of that name is there, or nothing that is called.
    """
    roles = by_role(base)
    every = [path for role, paths in roles.items() if role.startswith(WORDS[word]) for path in paths]
    if word == "embeddings" and (words := word_embeddings(base)):
        rows = {len(module.get_parameter("weight")) for module in words}
        every = [p for p in every if len(base.get_submodule(p).get_parameter("weight")) in rows]  # not of positions
    skipped = bypassed(base)
    raw = {mixture.experts: mixture.raw for mixture in mixtures(base) if mixture.raw}
    layers, parameters = list[str](), list[str]()
    for path in every:
        if path in raw:
            parameters += [f"{path}.{name}" for name in raw[path]]
        elif path not in skipped and kind_of(base.get_submodule(path)) is not None:
            layers.append(path)
        elif path not in skipped:
            parameters.append(f"{path}.weight")  # a router that multiplies by itself
    if not layers and not parameters:
        there = [w for w, starts in WORDS.items() if any(role.startswith(starts) for role in roles)]
        why = f": {skipped[every[0]]}" if every else ""
        raise ValueError(
            f"this {type(base).__name__} has no {word} to adapt{why}. It has {', '.join(there) or 'none'}."
        )
    return layers, parameters


_ORDER = (
    "embedding", "attention query", "attention key", "attention value", "attention fused q, k, v", "attention output",
    "attention, other", "feed-forward first", "feed-forward last", "feed-forward, other", "router", "experts",
    "shared experts", "state space", "convolution", "norm", "linear, other", "head",
)  # fmt: skip


def _of_linears(base: nn.Module) -> dict[str, str]:
    """The path of every linear layer, and of what belongs to a mixture of experts -> role."""
    named: dict[str, str] = {}
    top = set(heads(base))
    repeated = blocks(base)
    ends = {p for block in repeated for p, _ in block.attention}
    inside = {p.rpartition(".")[0] for p in ends}
    inside |= {p.rpartition(".")[0] for p in query_and_value(base)}
    mixed = mixtures(base)
    states = [path for path, module in base.named_modules() if path and _STATE_SPACE.search(type(module).__name__)]
    first = {b.feed_forward[0][0] for b in repeated if b.feed_forward}
    last = {b.feed_forward[1][0] for b in repeated if b.feed_forward}
    projections = {end: role for role, ends in PROJECTIONS.items() for end in ends}
    for path, _ in linears(base):
        owner, _, end = path.rpartition(".")
        if path in top:
            named[path] = "head"
        elif any(path.startswith(f"{state}.") for state in states):
            named[path] = "state space"
        elif path in ends:
            named[path] = "attention output"
        elif owner in inside:
            made = projections.get(end)
            named[path] = "attention, other" if made is None else f"attention {made}"
            if made == "fused":
                named[path] = "attention fused q, k, v"
        elif any(path.startswith(f"{m.experts}.") for m in mixed):
            named[path] = "experts"
        elif re.search(r"(^|\.)shared_(experts?|mlp|expert_gate)(\.|$)", path):
            named[path] = "shared experts"
        elif path in first or path in last:
            named[path] = "feed-forward first" if path in first else "feed-forward last"
        else:
            block = any(path.startswith(f"{b.path}.") for b in repeated) or _FEED_FORWARD.search(path)
            named[path] = "feed-forward, other" if block else "linear, other"
    for mixture in mixed:
        named[mixture.router] = "router"
        if mixture.raw:
            named[mixture.experts] = "experts"
    return named


def _of_others(path: str, module: nn.Module) -> str | None:
    kind = kind_of(module)
    if kind is not None:
        return {"conv": "convolution", "embedding": "embedding", "norm": "norm"}.get(kind.name, "linear, other")
    weight = getattr(module, "weight", None)
    return "norm" if isinstance(weight, Tensor) and weight.dim() == 1 else None
