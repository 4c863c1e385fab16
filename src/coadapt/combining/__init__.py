"""Adapters into one adapter. (Into the base's weights: core/merging.py.)"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.adapter import Adapter, ModuleCopy, replace_options
from ..core.composition import Node, names
from ..core.method import InputMethod, ModuleMethod, WeightMethod
from ..core.modes import evaluating
from ..methods.prefix import PrefixTuning
from . import copies, virtual, weights
from .deltas import averaged, fixed
from .report import Report, Row
from .ways import WAYS, Options, Order

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
    found = set(kinds.values())
    if len(found) > 1 and found != {"weights", "copies"}:
        told = ", ".join(f"{n!r} is of {kind}" for n, kind in kinds.items())
        raise TypeError(
            f"One adapter cannot be all of these: {told}. Combine those of one kind, and use the results together: a "
            "composition mixes any kinds."
        )
    way = _WAYS_OF["weights" if "copies" in found else found.pop()]
    copied, rows = copies.combined(base, used, averaged(node) if how == "mean" else node)
    configs = [adapter.config for adapter in used.values()]
    tasks = {config.task_type for config in configs} - {None}
    common: dict[str, Any] = {
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "base_model_name_or_path": next(
            (c.base_model_name_or_path for c in configs if c.base_model_name_or_path), None
        ),
        "revision": next((c.revision for c in configs if c.revision), None),
        "modules_to_save": list(copied) or None,
        "inference_mode": True,
        "init_seed": 0,  # so that nothing is drawn from the global generator
    }
    with evaluating(*used.values()):
        adapter, report = way(
            Order(base=base, adapters=used, node=node, how=how, name=name, options=options, common=common)
        )
    copies.fill(adapter, copied)
    adapter.config = replace_options(adapter.config, init_seed=None)
    shown = node if isinstance(node, str) else repr(node)
    return adapter, replace(report, composition=shown, rows=[*report.rows, *rows])


_KINDS: dict[str, type[nn.Module]] = {
    "weights": WeightMethod,
    "prompts": InputMethod,
    "prefixes": PrefixTuning,
    "modules": ModuleMethod,
}
_WAYS_OF: dict[str, Any] = {
    "weights": weights.combine,
    "prompts": virtual.prompts,
    "prefixes": virtual.prefixes,
    "modules": virtual.modules,
}


def _kind(adapter: Adapter) -> str:
    """What the parts of an adapter are. Raises TypeError for what cannot be combined."""
    methods = [part.method for part in adapter.parts if not isinstance(part.method, ModuleCopy)]
    if not methods:
        return "copies"
    for name, cls in _KINDS.items():
        if all(isinstance(method, cls) for method in methods):
            return name
    raise TypeError(f"Adapter {adapter.name!r} ({type(methods[0]).__name__}) cannot be combined.")
