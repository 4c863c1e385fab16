"""Adapter folders: one adapter, or a composition with one sub-folder per adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig, did_you_mean
from ..core import driving
from ..core.adapter import Adapter, build, replace_options
from ..core.base import base_of
from ..core.composition import Node, Sum, names, trained_gates
from ..core.gates import Learned
from ..core.method import Reparametrization
from ..core.routing import prepare
from ..methods.vblora import VBLoRAConfig
from ..methods.xlora import XLoraConfig
from ..naming import check_name
from . import adapterhub, checkpoint, files, vocabulary, xlora
from .compositions import node_from_json, node_to_json
from .configs import (
    PEFT_VERSION,
    asked_start,
    asked_targets,
    described,
    takes_from_base,
    understood,
    with_start,
    without_start,
)
from .facts import read_facts
from .files import CHECKPOINT, COMPOSITION, CONFIG, GATES, PROVENANCE, TRAINING, WEIGHTS, aside
from .keys import entries, holds_biases, is_unread, present, shared_keys
from .provenance import compare_bases, fingerprint_in, record, start_in

__all__ = ["CONFIG", "Loaded", "aside", "load", "save"]

SCHEMA = 1
_TAKEN = frozenset({CONFIG, WEIGHTS, TRAINING, COMPOSITION, GATES, PROVENANCE, CHECKPOINT, "README.md"})


@dataclass(frozen=True)
class Loaded:
    """What a folder held: adapters, ready to be attached, and their composition."""

    adapters: Sequence[Adapter]
    node: Node


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(
    where: Path,
    adapters: Mapping[str, Adapter],
    node: Node,
    base: nn.Module,
    fingerprint: str,
    embeddings: bool | str = "auto",
) -> None:
    """Writes adapters, and `composition.json` unless the one called "default" is all that there is to say.

    The one called "default" goes into the folder itself, others into sub-folders of their names.

    Raises:
        ValueError: an adapter's name is that of a file, or the composition has a gate per row. Nothing is written.
        RuntimeError: biases are trained along and are merged into the base.
    """
    for name in adapters:
        if name in _TAKEN or (where / name).is_file():
            raise ValueError(f"An adapter called {name!r} cannot be saved in {where}: a file there has that name.")
    if where.is_file():
        raise ValueError(f"{where} is a file; adapters are saved in a folder.")
    plain = list(adapters) == ["default"] and node == "default" and adapters["default"].learning_rate is None
    composition = None if plain else _composition(adapters, node, fingerprint)
    with files.saving(where) as new:
        for name, adapter in adapters.items():
            _save_adapter(new, where, "" if name == "default" else f"{name}/", adapter, base, fingerprint, embeddings)
        new.tensors(GATES, _stored(node))
        new.json(COMPOSITION, composition)
        if (said := xlora.described(adapters, node, where, base)) is not None:
            new.tensors(WEIGHTS, said[1])
            new.json(CONFIG, said[0] | {"peft_version": PEFT_VERSION})
        elif "default" not in adapters and (where / CONFIG).is_file() and xlora.is_one(files.read_json(where / CONFIG)):
            new.tensors(WEIGHTS, {})
            new.json(CONFIG, None)


def _composition(adapters: Mapping[str, Adapter], node: Node, fingerprint: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "base_fingerprint": fingerprint,
        "composition": node_to_json(node),
        "adapters": list(adapters),
        "trainable": checkpoint.trainable(adapters),
        "learning_rates": checkpoint.learning_rates(adapters),
    }


def _save_adapter(
    new: files.Saving,
    where: Path,
    inside: str,
    adapter: Adapter,
    base: nn.Module,
    fingerprint: str,
    embeddings: bool | str,
) -> None:
    _refuse_merged(adapter, base)
    training = driving.state(adapter)
    if isinstance(adapter.shared, Reparametrization):
        training |= adapter.shared.state_dict()
    said = described(adapter, base)
    asked, name = asked_targets(adapter.config), said.get("base_model_name_or_path")
    start = asked_start(adapter.config)
    facts = record(where / inside / PROVENANCE, fingerprint, name, asked_target_modules=asked, asked_start=start)
    own = {e.key: e.read() for e in entries(adapter, base)}
    new.tensors(inside + WEIGHTS, {**vocabulary.kept(adapter, base, embeddings), **own})
    new.tensors(inside + TRAINING, training)
    new.json(inside + PROVENANCE, facts)
    new.json(inside + CONFIG, said)


def _refuse_merged(adapter: Adapter, base: nn.Module) -> None:
    """Files hold whole biases, ours are changes to the base's: those must be there."""
    if holds_biases(adapter) and base_of(base).merged_by is not None:
        raise RuntimeError(
            f"Adapter {adapter.name!r} trains biases, and adapters are merged into the base; unmerge_adapter() first."
        )


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """What stays the same for all adapters of a folder."""

    base: nn.Module
    fingerprint: str
    half: bool


def load(
    where: Path,
    base: nn.Module,
    fingerprint: str,
    name: str | None,
    config: PeftConfig | None,
    is_trainable: bool,
    half: bool,
) -> Loaded:
    """Reads a folder and builds its adapters for `base`, which stays as it is.

    Args:
        name: what the adapter is called in the model; in a composition, the one adapter to load out of it.
        config: in place of the folder's own.
        is_trainable: those that trained when the folder was written train again.
        half: as in `build`.

    Raises:
        FileNotFoundError: there is no adapter, or a file is missing.
        ValueError: it does not fit the base; every tensor that is missing, left over or of another shape is listed.
    """
    files.settle(where)
    if not where.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(where)!r}. An adapter is a folder that holds {CONFIG}; one of the hub is called "
            "USER/NAME."
        )
    reader = _Reader(base, fingerprint, half)
    if (where / COMPOSITION).is_file():
        return _load_composition(reader, where, name, is_trainable)
    if (where / CONFIG).is_file():
        if xlora.is_one(said := files.read_json(where / CONFIG)):
            return _load_xlora(reader, where, name, is_trainable)
        if adapterhub.is_one(said):
            return Loaded(*adapterhub.load(where, said, base, name or "default", is_trainable, half))
        adapter = _load_adapter(reader, where, name or "default", config, is_trainable)
        return Loaded([adapter], adapter.name)
    if (where / CHECKPOINT).is_file():
        return Loaded(*checkpoint.load(where, base, fingerprint, is_trainable, half))
    raise _no_adapter(where)


def replication_in(where: Path) -> Any:
    """How the LoRAs of a folder have the blocks of their model repeated; None where they do not, or none is there.

    Raises:
        ValueError: one has them otherwise than another.
    """
    try:
        found = [facts.config.get("layer_replication") for facts in read_facts(where).adapters]
    except (FileNotFoundError, ValueError):
        return None  # loading says what is wrong
    asked = [wanted for wanted in found if wanted]
    if any(wanted != asked[0] for wanted in asked):
        raise ValueError(f"{where} holds LoRAs with different layer_replication: {asked}. Load them one by one.")
    return asked[0] if asked else None


def _load_xlora(reader: _Reader, where: Path, name: str | None, is_trainable: bool) -> Loaded:
    config = understood(files.read_json(where / CONFIG), reader.base)
    assert isinstance(config, XLoraConfig)
    if name is not None:
        raise ValueError(
            f"{where} is an X-LoRA of several adapters, which keep their names; to load one of them as {name!r}, give "
            "its own folder."
        )
    if config.use_trainable_adapters:
        raise ValueError(
            f"{where} is an X-LoRA whose adapters were trained along (use_trainable_adapters), which its folder does "
            "not hold in full. Save it with coadapt, or train it anew."
        )
    adapters = [
        _load_adapter(reader, xlora.expert(where, n, folder), n, None, False) for n, folder in config.names().items()
    ]
    router = config.router()
    node = Sum(*config.names(), weights=router)
    prepare(node, {a.name: a for a in adapters}, reader.base)
    xlora.fill(router, config, where)
    router.requires_grad_(is_trainable)
    return Loaded(adapters, node)


def _no_adapter(where: Path) -> FileNotFoundError:
    there = sorted(p.name for p in where.iterdir() if not p.name.startswith("."))
    inside = [n for n in there if (where / n / CONFIG).is_file()]
    hint = f" Its sub-folders {', '.join(inside)} hold one each." if inside else ""
    found = ", ".join(there[:8]) or "nothing"
    return FileNotFoundError(f"{where} holds no adapter: {CONFIG} is missing (found: {found}).{hint}")


def _load_composition(reader: _Reader, where: Path, name: str | None, is_trainable: bool) -> Loaded:
    file = where / COMPOSITION
    said = files.read_json(file)
    if said.get("schema") != SCHEMA:
        raise ValueError(f"{file} is of schema {said.get('schema')!r}; this version of coadapt reads {SCHEMA}.")
    if lost := [k for k in ("adapters", "composition") if k not in said]:
        raise ValueError(f"{file} is incomplete: it does not say {' and '.join(lost)}.")
    listed = [check_name(n) for n in said["adapters"]]
    if twice := sorted({n for n in listed if listed.count(n) > 1}):
        raise ValueError(f"{file} lists {', '.join(map(repr, twice))} more than once; an adapter has one folder.")
    alone = listed == ["default"]  # a folder of one adapter, which goes by any name
    if name is not None and name not in listed and not alone:
        raise ValueError(
            f"{where} holds the adapters {', '.join(listed)}; {name!r} is not among them. To load one under another "
            "name, give its sub-folder."
        )
    trained = listed if name is not None else said.get("trainable") or listed
    adapters = [
        _load_adapter(
            reader, where if n == "default" or alone else where / n, n, None, is_trainable and (n in trained or alone)
        )
        for n in ([name] if name is not None else listed)
    ]
    for adapter in adapters:
        adapter.learning_rate = said.get("learning_rates", {}).get("default" if alone else adapter.name)
    node = name if name is not None else node_from_json(said["composition"])
    if strange := [n for n in names(node) if n not in (name, *listed)]:
        raise ValueError(
            f"{file} has a composition of {', '.join(map(repr, strange))}, which is not among its adapters "
            f"{', '.join(listed)}.{did_you_mean(strange[0], listed)}"
        )
    prepare(node, {a.name: a for a in adapters}, reader.base)
    _fill_gates(where, node, is_trainable)
    return Loaded(adapters, node)


def _stored(node: Node) -> dict[str, Tensor]:
    """What the trained gates of a composition hold, by the names of the file of gates."""
    out: dict[str, Tensor] = {}
    for i, gate in enumerate(trained_gates(node)):
        state = gate.state_dict(keep_vars=True)
        out |= {f"gate_{i}" if isinstance(gate, Learned) else f"gate_{i}.{k}": v for k, v in state.items()}
    return out


@torch.no_grad()
def _fill_gates(where: Path, node: Node, is_trainable: bool) -> None:
    if not (known := _stored(node)):
        return
    tensors = files.read_tensors(where / GATES)
    checkpoint.refuse_misfits(where / GATES, {k: tuple(t.shape) for k, t in known.items()}, tensors)
    for key, tensor in known.items():
        tensor.copy_(tensors[key])
    for gate in trained_gates(node):
        gate.requires_grad_(is_trainable)


def _load_adapter(reader: _Reader, where: Path, name: str, config: PeftConfig | None, is_trainable: bool) -> Adapter:
    if not (where / CONFIG).is_file():
        raise FileNotFoundError(f"{where} holds no adapter: {CONFIG} is missing.")
    stored = understood(files.read_json(where / CONFIG), reader.base) if config is None else config
    again = takes_from_base(stored)
    stored = with_start(stored, start_in(where))
    tensors = {present(key): tensor for key, tensor in files.read_tensors(where / WEIGHTS).items()}
    compare_bases(where, fingerprint_in(where), reader.fingerprint)
    whole = stored.for_inference() is stored or (where / TRAINING).is_file()
    if not whole:
        if is_trainable:
            raise ValueError(
                f"{where} holds what inference needs of this {stored.method} adapter, not the network that makes its "
                f"virtual tokens ({TRAINING} is missing), so it cannot be trained on. Load it without is_trainable."
            )
        stored = stored.for_inference()
    if is_trainable and isinstance(stored, VBLoRAConfig) and stored.save_only_topk_weights:
        raise ValueError(
            f"{where} was written with save_only_topk_weights, for inference: it says which vectors each piece has, "
            "and nothing of the others, so it cannot be trained on. Load it without is_trainable."
        )
    stored = replace_options(stored, inference_mode=not is_trainable, adapter_name=None)
    adapter = build(name, without_start(stored), reader.base, reader.half, blank=not again)
    adapter.config = replace_options(stored, modules_to_save=adapter.config.modules_to_save)
    _refuse_merged(adapter, reader.base)
    if isinstance(adapter.shared, Reparametrization):
        _fill_shared(adapter.shared, where / TRAINING)
    if is_trainable and (known := driving.state(adapter)) and (where / TRAINING).is_file():
        tensors_of_training = files.read_tensors(where / TRAINING)
        checkpoint.refuse_misfits(where / TRAINING, {k: tuple(t.shape) for k, t in known.items()}, tensors_of_training)
        driving.restore(adapter, tensors_of_training)
    _fill(adapter, reader, tensors, where / WEIGHTS, taken=not again)
    if not is_trainable:
        driving.settle(adapter)
    return adapter


def _fill_shared(network: nn.Module, file: Path) -> None:
    tensors = files.read_tensors(file)
    checkpoint.refuse_misfits(file, {k: tuple(t.shape) for k, t in network.state_dict().items()}, tensors)
    network.load_state_dict(tensors)


def _fill(adapter: Adapter, reader: _Reader, tensors: Mapping[str, Tensor], file: Path, taken: bool) -> None:
    known = {e.key: e for e in entries(adapter, reader.base, taken)}
    others = {k: t for k, t in tensors.items() if k not in known}
    done = vocabulary.taken(adapter, reader.base, others, reader.half, file)
    done |= {k for k, t in others.items() if _is_the_bases(k, t, reader.base) or _is_shared(k, t, adapter, tensors)}
    done |= {k for k, t in others.items() if _is_copied(k, t, tensors) or is_unread(k, adapter)}
    used = {k: t for k, t in tensors.items() if k not in done}
    checkpoint.refuse_misfits(file, {k: e.shape for k, e in known.items()}, used)
    for key, entry in known.items():
        entry.write(used[key])


def _is_the_bases(key: str, tensor: Tensor, base: nn.Module) -> bool:
    """Whether a tensor is the base's own weight over again, as the field writes it for adapted embeddings."""
    weight = _keys_of_the_base(base).get(key)
    if weight is None or weight.is_meta or weight.shape != tensor.shape:
        return False
    half = min((weight.dtype, tensor.dtype), key=lambda d: d.itemsize)
    return torch.equal(weight.detach().cpu().to(half), tensor.to(half))


def _is_shared(key: str, tensor: Tensor, adapter: Adapter, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is what all sites share over again, as the field writes it at each site for RandLoRA."""
    once = shared_keys(adapter).get(key.rpartition(".")[2])
    return once is not None and once in tensors and torch.equal(tensors[once], tensor)


def _is_copied(key: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is the bias of a trained copy over again, or that of its original, which nothing uses: the field
    writes both with `bias="all"`."""
    once = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return once != key and once in tensors and (".original_module." in key or torch.equal(tensors[once], tensor))


def _keys_of_the_base(base: nn.Module) -> dict[str, nn.Parameter]:
    keys: dict[str, nn.Parameter] = {}
    for path, module in base.named_modules():
        inside = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            keys |= dict.fromkeys(
                (vocabulary.ROOT + inside + name, f"{vocabulary.ROOT}{inside}base_layer.{name}"), parameter
            )
    return keys
