"""Adapters into one adapter. (Into the base's weights: core/merging.py.)"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.adapter import Adapter, ModuleCopy
from ..core.composition import Node, names
from ..core.method import AttentionMethod, InputMethod, WeightMethod
from ..methods.bottleneck import Bottleneck
from . import virtual, weights
from .deltas import fixed
from .report import Report, Row
from .ways import WAYS, Options

__all__ = ["WAYS", "Options", "Report", "Row", "combine"]


@torch.no_grad()
def combine(
    base: nn.Module, adapters: Mapping[str, Adapter], node: Node, how: str | None, name: str, options: Options
) -> tuple[Adapter, Report]:
    """One new, frozen adapter that stands for `node`, and what was lost of it. `base` and `adapters` stay as they are.

    Args:
        adapters: all that are attached, by name.
        how: one of `WAYS`; None for the one that is exact.

    Raises:
        TypeError, ValueError: adapters that no one adapter can stand for, no exact way where none is named, or options
            that are missing or would have no effect.
    """
    options.check(how)
    node = fixed(node)
    used = {n: adapters[n] for n in names(node)}
    if not used:
        raise ValueError("The composition names no adapter; there is nothing to combine.")
    kinds = {n: _kind(adapter) for n, adapter in used.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{n!r} is of {kind}" for n, kind in kinds.items())
        raise TypeError(
            f"One adapter cannot be all of these: {told}. Combine those of one kind, and use the results together: a "
            "composition mixes any kinds."
        )
    ways = {"weights": weights.combine, "prompts": virtual.prompts, "prefixes": virtual.prefixes}
    way = ways.get(next(iter(kinds.values())), virtual.bottlenecks)
    with _evaluating(used.values()):
        return way(base, used, node, how, name, options)


@contextmanager
def _evaluating(adapters: Iterable[Adapter]) -> Iterator[None]:
    """Without dropout in what makes virtual tokens."""
    training = [module for adapter in adapters for module in adapter.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _kind(adapter: Adapter) -> str:
    """What the parts of an adapter are. Raises TypeError for what cannot be combined."""
    methods: list[Any] = [part.method for part in adapter.parts]
    if copies := [part.place.path for part in adapter.parts if isinstance(part.method, ModuleCopy)]:
        raise TypeError(
            f"Adapter {adapter.name!r} holds trained copies of whole modules ({copies[0]!r}); two copies of a module "
            "are no change that could be combined. Combine adapters without modules_to_save."
        )
    for name, cls in _KINDS.items():
        if all(isinstance(method, cls) for method in methods):
            return name
    raise TypeError(f"Adapter {adapter.name!r} ({type(methods[0]).__name__}) cannot be combined.")


_KINDS: dict[str, type[nn.Module]] = {
    "weights": WeightMethod,
    "prompts": InputMethod,
    "prefixes": AttentionMethod,
    "bottlenecks": Bottleneck,
}
