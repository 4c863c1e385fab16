"""Folders of AdapterHub's `adapters`: bottlenecks, LoRA, (IA)^3, prefixes, ReFT and unions of them, read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...config import PeftConfig
from ...core.adapter import Adapter, build, replace_options
from ...core.composition import Node, Seq
from .. import files
from . import bottleneck, lora, prefix, reft
from .tensors import WEIGHTS, Fill, Tensors, parsed

_READERS: dict[str, Callable[[Mapping[str, Any], Tensors, Any], tuple[PeftConfig, Fill]]] = {
    "bottleneck": bottleneck.read,
    "lora": lora.read,
    "prefix_tuning": prefix.read,
    "reft": reft.read,
}
_NOT_READ: Mapping[str, Any] = {
    "use_gating": False,
    "ln_before": False,
    "ln_after": False,
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "shared_W_phm": False,
    "factorized_phm_rule": False,
    "use_dora": False,  # theirs leaves the scale out of the length
    "vera_d": None,
    "vera_b": None,
}
"""Fields that change the result and have no counterpart here -> the value at which they say nothing."""


def is_one(said: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is one of AdapterHub's."""
    return "peft_type" not in said and "config" in said and "model_type" in said


def load(
    where: Path, said: Mapping[str, Any], base: Any, name: str, is_trainable: bool, half: bool
) -> tuple[list[Adapter], Node]:
    """The adapters of a folder, and how they are composed: a union is one adapter for each of its parts.

    Raises:
        ValueError: a method or an option that is not read, or tensors that do not fit this base; all are named.
    """
    config = said["config"]
    if not isinstance(config, Mapping):
        raise ValueError(
            f"{where} names its configuration {config!r} instead of writing it out, as adapter-transformers 1 did. "
            "Load and save it with a later version of `adapters`."
        )
    tensors = Tensors(parsed(files.read_tensors(where / WEIGHTS), base))
    union = config.get("architecture") == "union"
    parts: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    if union:
        parts = [(str(c.get("architecture") or "bottleneck"), c) for c in config["configs"]]
        parts.sort(key=lambda part: part[0] != "lora")  # which acts below what reads the layer's output
    found: list[Adapter] = []
    for kind, own in parts:
        _refuse(where, own)
        made, fill = _READERS[str(own.get("architecture") or "bottleneck")](own, tensors, base)
        options: dict[str, Any] = {"inference_mode": not is_trainable, "init_seed": 0}
        options["base_model_name_or_path"] = said.get("model_name") or None
        called = f"{name}_{kind}" if union else name
        adapter = build(called, replace_options(made, **options), base, half, blank=True)
        adapter.config = replace_options(adapter.config, init_seed=None)
        with torch.no_grad():
            fill(adapter)
        found.append(adapter)
    if left := tensors.left():
        raise ValueError(f"{where} holds tensors for which this base has no place: {', '.join(left[:8])}.")
    node: Node = Seq(*(adapter.name for adapter in found)) if len(found) > 1 else found[0].name
    return found, node


def _refuse(where: Path, config: Mapping[str, Any]) -> None:
    kind = str(config.get("architecture") or "bottleneck")
    if kind not in _READERS:
        raise ValueError(f"{where} holds {kind!r}; of AdapterHub's methods these are read: {', '.join(_READERS)}.")
    wrong = {k: config[k] for k, idle in _NOT_READ.items() if k in config and config[k] not in (idle, None)}
    if wrong:
        raise ValueError(f"{where} asks for {wrong}, which is not read here and would change the result.")
