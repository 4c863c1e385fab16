"""A view's state_dict in a file, as a stock Trainer writes it: its extra state says how to build the adapters again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core import driving, tied
from ..core.adapter import Adapter, build, replace_options
from ..core.composition import Node, trained_gates
from ..core.routing import prepare
from ..naming import check_name
from .compositions import node_from_json, node_to_json
from .configs import without_start
from .files import CHECKPOINT, read_tensors
from .provenance import compare_bases

SCHEMA = 1
EXTRA = "_extra_state"
_FREE = frozenset(
    "base_model_name_or_path revision task_type inference_mode init_from init_seed init_lora_weights "
    "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs "
    "adapter_dropout lora_dropout".split()
)
"""Options that may differ between a state and the view that loads it: they do not change what the weights mean."""


def describe(adapters: Mapping[str, Adapter], node: Node, fingerprint: str) -> Tensor:
    """Configurations, composition and fingerprint as JSON, (bytes,) uint8."""
    said = {
        "schema": SCHEMA,
        "adapters": {name: adapter.config.to_dict() for name, adapter in adapters.items()},
        "trainable": trainable(adapters),
        "learning_rates": learning_rates(adapters),
        "composition": node_to_json(node),
        "base_fingerprint": fingerprint,
    }
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def trainable(adapters: Mapping[str, Adapter]) -> list[str]:
    """The names of those that get gradients."""
    return [name for name, a in adapters.items() if any(p.requires_grad for p in a.parameters())]


def learning_rates(adapters: Mapping[str, Adapter]) -> dict[str, float]:
    """What `param_groups` was told, by name."""
    return {name: a.learning_rate for name, a in adapters.items() if a.learning_rate is not None}


def read(state: Tensor) -> dict[str, Any]:
    """Undoes `describe`. Raises ValueError where it is of another schema, or none of ours."""
    try:
        said = json.loads(bytes(state.tolist()))
    except ValueError as error:
        raise ValueError(f"The extra state was not written by coadapt: {error}") from error
    if not isinstance(said, dict) or said.get("schema") != SCHEMA:
        found = said.get("schema") if isinstance(said, dict) else said
        raise ValueError(
            f"The extra state is of schema {found!r}; this version of coadapt reads {SCHEMA}. Update coadapt."
        )
    return said


def compare(state: Tensor, adapters: Mapping[str, Adapter]) -> None:
    """Raises ValueError where `state` is of a view with other adapters, or with the same names made otherwise."""
    theirs = read(state)["adapters"]
    if sorted(theirs) != sorted(adapters):
        raise ValueError(
            f"This state holds the adapters {sorted(theirs)}, the view has {sorted(adapters)}. "
            "Use PeftModel.from_pretrained to attach what is saved."
        )
    wrong: list[str] = []
    for name, adapter in adapters.items():
        ours = json.loads(json.dumps(adapter.config.to_dict()))
        fields = sorted((ours.keys() | theirs[name].keys()) - _FREE)
        wrong += [
            f"{name}: {f}={theirs[name].get(f)!r} there, {ours.get(f)!r} here"
            for f in fields
            if theirs[name].get(f) != ours.get(f)
        ]
    if wrong:
        raise ValueError("This state is of adapters with other options:\n  " + "\n  ".join(wrong))


def load(where: Path, base: nn.Module, fingerprint: str, is_trainable: bool, half: bool) -> tuple[list[Adapter], Node]:
    """Builds the adapters that a Trainer's checkpoint holds.

    Raises:
        ValueError: the file holds a whole model, or does not fit `base`; everything that does not is listed.
    """
    file = where / CHECKPOINT
    state = read_tensors(file)
    if EXTRA not in state:
        raise ValueError(f"{file} holds a model, not the adapters of a view (it has no {EXTRA}).")
    said = read(state.pop(EXTRA))
    compare_bases(where, said.get("base_fingerprint"), fingerprint)
    adapters: list[Adapter] = []
    for name, values in said["adapters"].items():
        config = PeftConfig.from_dict(values)
        trains = is_trainable and name in (said.get("trainable") or [name])
        empty = replace_options(without_start(config), inference_mode=not trains)
        adapter = build(check_name(name), empty, base, half, blank=True)
        adapter.config = replace_options(config, inference_mode=not trains)
        adapter.learning_rate = said.get("learning_rates", {}).get(name)
        adapters.append(adapter)
    node = node_from_json(said["composition"])
    prepare(node, {a.name: a for a in adapters}, base)
    _fill(file, adapters, node, state)
    for adapter in adapters:
        if adapter.config.inference_mode:
            driving.settle(adapter)
    for gate in trained_gates(node):
        gate.requires_grad_(is_trainable)
    return adapters, node


def _fill(file: Path, adapters: list[Adapter], node: Node, state: Mapping[str, Tensor]) -> None:
    view = nn.Module()
    view.adapters, view.gates = nn.Module(), nn.ModuleList(trained_gates(node))
    for adapter in adapters:
        view.adapters.add_module(adapter.attribute, adapter)
    known = tied.once(view.state_dict(), view)
    refuse_misfits(file, {k: tuple(t.shape) for k, t in known.items()}, state)
    view.load_state_dict(tied.everywhere(state, view))


def refuse_misfits(file: Path, known: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError with all keys of `tensors` that are missing, left over, or of another shape than is known."""
    wrong = [f"{k}: not in the file" for k in known if k not in tensors]
    wrong += [f"{k}: not in this adapter" for k in tensors if k not in known]
    wrong += [
        f"{k}: {tuple(t.shape)} in the file, {known[k]} in this model"
        for k, t in tensors.items()
        if k in known and tuple(t.shape) != known[k]
    ]
    if wrong:
        raise ValueError(f"{file} does not fit this model ({len(wrong)} of its tensors):\n  " + "\n  ".join(wrong))
