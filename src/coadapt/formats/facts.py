"""What a folder says of its adapters, whoever wrote it, without building one: settings, keys and shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from ..lora_options import variants
from . import checkpoint, files
from .compositions import node_from_json
from .files import CHECKPOINT, COMPOSITION, CONFIG, WEIGHTS

LISTED = 8
Form = Literal["folder", "checkpoint"]
"""An adapter folder; what a stock Trainer writes of a view."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One adapter."""

    name: str
    folder: Path
    """Of its own; of a Trainer's checkpoint that of all of them."""
    config: Mapping[str, Any]
    """As the file has it."""
    tensors: Mapping[str, tuple[int, ...]]
    """Key -> shape; of a Trainer's checkpoint none, whose keys are no folder's."""
    form: Form = "folder"
    base: Mapping[str, Any] | None = None
    """The base's own config.json, where it is at hand."""

    @property
    def kind(self) -> str:
        """The method, by the field's name; of LoRA's variants ours."""
        said = str(self.config.get("peft_type"))
        return next(iter(variants(self.config)), said) if said == "LORA" else said

    @property
    def ranks(self) -> set[int]:
        """Of a LoRA: as its tensors have them, else as its settings say."""
        found = {shape[0] for key, shape in self.tensors.items() if re.search(r"lora_(embedding_)?A(\.weight)?$", key)}
        pattern: Mapping[str, int] = self.config.get("rank_pattern") or {}
        return found or {int(self.config.get("r", 8)), *map(int, pattern.values())}

    @property
    def base_name(self) -> str:
        """The base, as one writes it in a command."""
        return str(self.config.get("base_model_name_or_path") or "BASE")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The adapters of a folder, and what was active."""

    adapters: list[Facts]
    composition: Any
    """A `Node`."""


def places(folder: Path) -> list[Path]:
    """Where the adapters of a folder are: it itself, sub-folders; none in a Trainer's checkpoint."""
    return [p for p in (folder, *sorted(folder.iterdir())) if (p / CONFIG).is_file() and not p.is_symlink()]


def read_facts(folder: Path, base: Mapping[str, Any] | None = None) -> Contents:
    """Reads an adapter folder (coadapt's or the field's), a composition, or a stock Trainer's checkpoint of a view.

    Raises:
        FileNotFoundError: it is none of these.
        ValueError: a file is damaged, or weights are a pickle.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    files.settle(folder)
    if found := places(folder):
        adapters = [_of_folder(place, "default" if place == folder else place.name, base) for place in found]
        told = files.read_json(folder / COMPOSITION) if (folder / COMPOSITION).is_file() else {}
        node = node_from_json(told["composition"]) if "composition" in told else adapters[0].name
        return Contents(adapters=adapters, composition=node)
    if (folder / CHECKPOINT).is_file():
        return _of_checkpoint(folder, base)
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:LISTED]) or "nothing"
    raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG} is missing (found: {there}).")


def _of_folder(place: Path, name: str, base: Mapping[str, Any] | None) -> Facts:
    if not (place / WEIGHTS).is_file():
        files.read_tensors(place / WEIGHTS)  # says what is there instead
    try:
        with safe_open(str(place / WEIGHTS), "pt") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except files.SafetensorError as error:
        raise ValueError(f"{place / WEIGHTS} is damaged, or no safetensors file: {error}") from error
    return Facts(name=name, folder=place, config=files.read_json(place / CONFIG), tensors=shapes, base=base)


def _of_checkpoint(folder: Path, base: Mapping[str, Any] | None) -> Contents:
    file = folder / CHECKPOINT
    try:
        with safe_open(str(file), "pt") as tensors:
            known = checkpoint.EXTRA in tensors.keys()
            said = checkpoint.read(tensors.get_tensor(checkpoint.EXTRA)) if known else None
    except files.SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from error
    if said is None:
        raise FileNotFoundError(f"{file} holds a model, and no adapter.")
    adapters = [
        Facts(name=name, folder=folder, config=config, tensors={}, form="checkpoint", base=base)
        for name, config in said["adapters"].items()
    ]
    return Contents(adapters=adapters, composition=node_from_json(said["composition"]))
