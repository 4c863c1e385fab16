"""Adapter folders: one adapter, or a composition with one sub-folder per adapter. Written whole or not at all."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import PeftConfig, check_name
from ..core.adapter import Adapter, build, replace_options
from ..core.composition import Node, learned, names
from ..core.target import Place, suffix_match
from ..methods import CONFIGS as _  # noqa: F401  makes the methods known
from ..methods.lora import LoraConfig, targets_of
from ..methods.prefix import PrefixTuningConfig, Projection
from . import checkpoint
from .compositions import node_from_json, node_to_json
from .keys import entries

CONFIG, WEIGHTS, TRAINING = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
COMPOSITION, GATES, CHECKPOINT = "composition.json", "composition.safetensors", "model.safetensors"
SCHEMA = 1
PEFT_VERSION = "0.21.2"  # of the field's library whose layout is written


@dataclass(frozen=True)
class Loaded:
    """What a folder held: adapters, ready to be attached, and their composition."""

    adapters: list[Adapter]
    node: Node


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(where: Path, adapters: Mapping[str, Adapter], node: Node, base: nn.Module, fingerprint: str) -> None:
    """Writes adapters, and `composition.json` unless there is only the one called "default"."""
    described = node_to_json(node)
    where.mkdir(parents=True, exist_ok=True)
    for name, adapter in adapters.items():
        _save_adapter(where if name == "default" else where / name, adapter, base, fingerprint)
    if list(adapters) == ["default"] and names(node) == ["default"] and node == "default":
        return
    gates = {f"gate_{i}": gate.log_gate.detach().cpu() for i, gate in enumerate(learned(node))}
    said = {
        "schema": SCHEMA,
        "base_fingerprint": fingerprint,
        "composition": described,
        "adapters": list(adapters),
        "trainable": [n for n, a in adapters.items() if any(p.requires_grad for p in a.parameters())],
    }
    if gates:
        with aside(where / GATES) as file:
            save_file(gates, file, metadata={"format": "pt"})
    with aside(where / COMPOSITION) as file:
        file.write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def _save_adapter(where: Path, adapter: Adapter, base: nn.Module, fingerprint: str) -> None:
    tensors = {e.key: e.read().cpu().contiguous().clone() for e in entries(adapter)}
    training = _training_state(adapter)
    where.mkdir(parents=True, exist_ok=True)
    with aside(where / WEIGHTS) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    if training:
        with aside(where / TRAINING) as file:
            save_file(training, file, metadata={"format": "pt"})
    else:
        (where / TRAINING).unlink(missing_ok=True)
    with aside(where / CONFIG) as file:
        file.write_text(json.dumps(_described(adapter, base, fingerprint), indent=2, sort_keys=True) + "\n", "utf-8")


def _training_state(adapter: Adapter) -> dict[str, Tensor]:
    if not isinstance(adapter.shared, Projection):
        return {}
    return {k: v.detach().cpu().contiguous().clone() for k, v in adapter.shared.state_dict().items()}


def _described(adapter: Adapter, base: nn.Module, fingerprint: str) -> dict[str, Any]:
    """The configuration as the field's programs read it, with what was found for the fields that were left out."""
    config = adapter.config
    said = config.to_dict()
    said |= {"peft_version": PEFT_VERSION, "inference_mode": True, "base_fingerprint": fingerprint}
    said.pop("init_from", None), said.pop("init_seed", None)
    if isinstance(config, LoraConfig):
        places = [p.place for p in adapter.parts if type(p.method).__name__ == "LoRA"]
        if config.target_modules is None or config.target_modules == "all-linear":
            said["target_modules"] = _listed(places, base)
        said["fan_in_fan_out"] = any("Conv1D" in type(p.module).__name__ for p in places)
        if isinstance(config.lora_alpha, float) and config.lora_alpha.is_integer():
            said["lora_alpha"] = int(config.lora_alpha)
    said |= {k: v for k, v in adapter.facts.items() if said.get(k) is None}
    return {k: v for k, v in said.items() if v is not None or k in _ALWAYS}


_ALWAYS = frozenset({"task_type", "base_model_name_or_path", "revision", "modules_to_save", "layers_to_transform", "layers_pattern"})


def _listed(places: Sequence[Place], base: nn.Module) -> list[str]:
    """Last parts of names where they name just these places, else whole paths."""
    ends, paths = targets_of(places), {p.path for p in places}
    named = {path for path, _ in base.named_modules() if any(suffix_match(path, end) for end in ends)}
    return ends if named == paths else sorted(paths)


@contextmanager
def aside(file: Path) -> Iterator[Path]:
    """A path to write to; renamed to `file` when all is written, removed when something fails."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(
    where: Path, base: nn.Module, fingerprint: str, name: str | None, config: PeftConfig | None, is_trainable: bool, half: bool
) -> Loaded:
    """Reads a folder and builds its adapters for `base`, which stays as it is.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it does not fit the base; every tensor that is missing, left over or of another shape is listed.
    """
    if not where.is_dir():
        raise FileNotFoundError(f"There is no folder {str(where)!r}. An adapter is a folder that holds {CONFIG} (hub ids are not read yet: download it first).")
    if (where / COMPOSITION).is_file():
        return _load_composition(where, base, fingerprint, name, is_trainable, half)
    if (where / CONFIG).is_file():
        adapter = _load_adapter(where, base, fingerprint, name or "default", config, is_trainable, half)
        return Loaded([adapter], adapter.name)
    if (where / CHECKPOINT).is_file():
        return _load_checkpoint(where, base, fingerprint, is_trainable, half)
    there = sorted(p.name for p in where.iterdir())
    inside = [p.name for p in where.iterdir() if (p / CONFIG).is_file()]
    hint = f" Its sub-folders {inside} do." if inside else ""
    raise FileNotFoundError(f"{where} holds no adapter: {CONFIG} is missing (found: {', '.join(there[:8]) or 'nothing'}).{hint}")


def _load_composition(where: Path, base: nn.Module, fingerprint: str, name: str | None, is_trainable: bool, half: bool) -> Loaded:
    said = json.loads((where / COMPOSITION).read_text("utf-8"))
    if said.get("schema") != SCHEMA:
        raise ValueError(f"{where / COMPOSITION} is of schema {said.get('schema')!r}; this version of coadapt reads {SCHEMA}.")
    listed = [check_name(n) for n in said["adapters"]]
    if name is not None and name not in listed:
        raise ValueError(f"{where} holds the adapters {listed}; {name!r} is not among them. A name cannot be given to a composition.")
    adapters = [
        _load_adapter(where if n == "default" else where / n, base, fingerprint, n, None, is_trainable and n in said["trainable"], half)
        for n in ([name] if name else listed)
    ]
    node = name or node_from_json(said["composition"])
    gates = learned(node)
    if gates:
        stored = load_file(where / GATES)
        with torch.no_grad():
            for i, gate in enumerate(gates):
                gate.log_gate.copy_(stored[f"gate_{i}"])
                gate.requires_grad_(is_trainable)
    return Loaded(adapters, node)


def _load_adapter(
    where: Path, base: nn.Module, fingerprint: str, name: str, config: PeftConfig | None, is_trainable: bool, half: bool
) -> Adapter:
    _refuse_pickles(where)
    stored = config or PeftConfig.from_pretrained(where)
    said = json.loads((where / CONFIG).read_text("utf-8"))
    _compare_bases(where, said.get("base_fingerprint"), fingerprint)
    training = where / TRAINING
    if isinstance(stored, PrefixTuningConfig) and stored.prefix_projection and not training.is_file():
        if is_trainable:
            raise ValueError(
                f"{where} holds what inference needs of a prefix with prefix_projection, not the projection itself ({TRAINING} is "
                "missing), so it cannot be trained on. Load it without is_trainable."
            )
        stored = replace_options(stored, prefix_projection=False, encoder_hidden_size=None)
    config = replace_options(stored, inference_mode=not is_trainable, adapter_name=None)
    adapter = build(name, config, base, half)
    file = where / WEIGHTS
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{where} is incomplete: {WEIGHTS} is missing.") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    if isinstance(adapter.shared, Projection):
        adapter.shared.load_state_dict(load_file(training))
    _fill(adapter, tensors, str(file))
    return adapter


def _fill(adapter: Adapter, tensors: Mapping[str, Tensor], file: str) -> None:
    known = {e.key: e for e in entries(adapter)}
    wrong = [f"{k}: not in the file" for k in known if k not in tensors]
    wrong += [f"{k}: not in this adapter" for k in tensors if k not in known]
    wrong += [
        f"{k}: {tuple(t.shape)} in the file, {known[k].shape} in this model" for k, t in tensors.items() if k in known and tuple(t.shape) != known[k].shape
    ]
    if wrong:
        shown = "\n  ".join(wrong[:40]) + (f"\n  and {len(wrong) - 40} more" if len(wrong) > 40 else "")
        raise ValueError(f"{file} does not fit this model ({len(wrong)} of its tensors):\n  {shown}")
    for key, tensor in tensors.items():
        known[key].write(tensor)


def _compare_bases(where: Path, theirs: str | None, ours: str) -> None:
    if theirs and theirs != ours:
        what = "other weights" if theirs.split("-")[0] == ours.split("-")[0] else "other modules or shapes"
        warnings.warn(
            f"{where} was trained on a base with {what}: its fingerprint is {theirs}, this model's is {ours}. "
            "Results will differ from what was trained.",
            stacklevel=2,
        )


def _refuse_pickles(where: Path) -> None:
    if (where / WEIGHTS).is_file():
        return
    if pickles := [p.name for p in where.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]:
        raise ValueError(
            f"{where} holds its weights as a pickle ({', '.join(pickles)}), which can run any code when it is read; coadapt reads "
            f"{WEIGHTS} only. Convert it with the program that wrote it."
        )


def _load_checkpoint(where: Path, base: nn.Module, fingerprint: str, is_trainable: bool, half: bool) -> Loaded:
    """What a stock Trainer wrote of a view: its state_dict, with the configurations in the extra state."""
    state = load_file(where / CHECKPOINT)
    if "_extra_state" not in state:
        raise ValueError(f"{where / CHECKPOINT} holds a model, not the adapters of a view (it has no _extra_state).")
    said = checkpoint.read(state.pop("_extra_state"))
    _compare_bases(where, said["base_fingerprint"], fingerprint)
    adapters: list[Adapter] = []
    holder = nn.Module()
    holder.adapters, holder.gates = nn.Module(), nn.ModuleList()
    for name, values in said["adapters"].items():
        config = replace_options(PeftConfig.from_dict(values), inference_mode=not is_trainable)
        adapters.append(build(check_name(name), config, base, half))
        holder.adapters.add_module(adapters[-1].attribute, adapters[-1])
    node = node_from_json(said["composition"])
    holder.gates = nn.ModuleList(learned(node))
    found = holder.load_state_dict(state, strict=False)
    if found.missing_keys or found.unexpected_keys:
        raise ValueError(f"{where / CHECKPOINT} does not fit this model: missing {found.missing_keys}, left over {found.unexpected_keys}.")
    return Loaded(adapters, node)

