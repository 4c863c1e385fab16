"""Layers that have one weight get one change, or one copy, where an adapter says `ensure_weight_tying`."""

from collections.abc import Sequence

from torch import nn

from ..config import PeftConfig, TyingConfig
from . import roles, target
from .bypass import bypassed
from .roles import Place
from .tied import weights


def tied(base: nn.Module, paths: Sequence[str]) -> list[str]:
    """Those of the layers at `paths`, and all others, whose weight is that of another layer, too, that is called."""
    found = [(path, base.get_submodule(path)) for path in paths]
    every = roles.with_tied(base, [(p, m) for p, m in found if getattr(m, "weight", None) is not None])
    never = bypassed(base)
    weight = weights(base, [m for path, m in every if path not in never])
    held = [id(w) for w in weight.values()]
    return [p for p, m in every if m in weight and held.count(id(weight[m])) > 1]


def with_copies(config: PeftConfig, base: nn.Module) -> Sequence[str] | None:
    """`modules_to_save` of a configuration, with the layers that are tied to one of them.

    Raises:
        ValueError: weights are to be tied, and nothing that the adapter names is tied to anything.
    """
    named = config.modules_to_save
    if not same(config):
        return named
    found = [path for path, _ in target.by_name(base, named or (), f"{type(config).__name__}: modules_to_save")]
    return [*(named or ()), *(p for p in tied(base, found) if p not in found)] or None


def with_places(config: TyingConfig, base: nn.Module, found: Sequence[Place], tokens: Sequence[Place]) -> list[Place]:
    """The places of an adapter, with the layers that are tied to one of them.

    Args:
        tokens: where single tokens are trained.

    Raises:
        ValueError: nothing is tied; or what is tied cannot be changed as one.
    """
    if not same(config):
        return list(found)
    who = type(config).__name__
    layers = [place for place in found if not place.parameter]
    shared = tied(base, [place.path for place in layers])
    copied = [path for path, _ in target.by_name(base, with_copies(config, base) or (), who)]
    if not {*shared, *tied(base, copied), *tied(base, [place.path for place in tokens])}:
        raise ValueError(
            f"{who}: ensure_weight_tying has no effect: none of the layers that target_modules, modules_to_save and "
            f"trainable_token_indices name has its weight in common with another layer of this {type(base).__name__}. "
            "Leave it out, or name the embedding or the head of a model that ties them."
        )
    if out := [path for path in shared if target.is_excluded(config, path)]:
        raise ValueError(
            f"{who}: ensure_weight_tying changes {out} as what they are tied to, but exclude_modules leaves them out."
        )
    every = {path: Place(path, base.get_submodule(path)) for path in shared} | {place.path: place for place in layers}
    raw = [place for place in found if place.parameter]
    return [*(every[path] for path, _ in base.named_modules() if path in every), *raw]


def same(config: PeftConfig) -> bool:
    """Whether tied layers are to be one in an adapter of this configuration."""
    return isinstance(config, TyingConfig) and config.ensure_weight_tying
