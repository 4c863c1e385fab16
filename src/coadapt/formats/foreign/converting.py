"""From one program's file to another's. What a file is, it tells itself."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..files import CONFIG
from . import diffusers, folders, kohya, loralib
from .layers import Parts

Form = Literal["peft", "loralib", "kohya", "diffusers", "safetensors"]
FORMS: tuple[Form, ...] = ("peft", "loralib", "kohya", "diffusers", "safetensors")
PICKLES = {
    "adapter_model.bin": "adapter_model.safetensors",
    "pytorch_adapter.bin": "adapter.safetensors",
    "pytorch_lora_weights.bin": "pytorch_lora_weights.safetensors",
}
"""Pickles of adapter folders -> what the same tensors are called as safetensors."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What files leave out."""

    alpha: float | None = None
    """loralib's lora_alpha."""
    enable: Sequence[bool] | None = None
    """loralib's enable_lora."""
    base: str | None = None
    """The model that peft's configuration is to name."""
    paths: Mapping[str, Mapping[str, str]] | None = None
    """For kohya's names: part -> name with underscores -> path of a module."""
    trusted: Path | None = None
    """The one pickle that may be read."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was found, and what was written."""

    form: Form
    out: Sequence[Path]
    layers: int
    """Modules that are changed; 0 where only the container was."""


def convert(source: Path, out: Path, to: Form, options: Options | None = None) -> Converted:
    """Reads an adapter of one program and writes it for another.

    Args:
        source: a file, or a folder of peft.
        out: a folder for peft and for a folder as safetensors, else a file.

    Raises:
        FileExistsError: `out` is there.
        ValueError: what it holds is not known, is incomplete, or cannot be said in the other form.
    """
    options = options or Options()
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already. Choose another name.")
    if to == "safetensors":
        return _unpickled(source, out, options)
    form, parts = read(source, options)
    layers = sum(map(len, parts.values()))
    if to == "peft":
        return Converted(form=form, out=folders.write(parts, out, options.base), layers=layers)
    writers = {"loralib": loralib.write, "kohya": kohya.write, "diffusers": diffusers.write}
    _save(out, writers[to](parts))
    return Converted(form=form, out=[out], layers=layers)


def read(source: Path, options: Options) -> tuple[Form, Parts]:
    """What a file or folder holds, and which program's it is."""
    if source.is_dir():
        if any((p / CONFIG).is_file() for p in (source, *source.iterdir())):
            return "peft", folders.read(source)
        inside = [p for p in source.iterdir() if p.suffix in (".safetensors", ".pt", ".bin", ".ckpt")]
        if len(inside) != 1:
            raise ValueError(f"{source} holds no {CONFIG} and {len(inside)} files of weights; name one of them.")
        source = inside[0]
    tensors, metadata = read_file(source, options.trusted)
    if kohya.is_one(tensors):
        return "kohya", kohya.read(tensors, options.paths)
    if loralib.is_one(tensors):
        return "loralib", loralib.read(tensors, options.alpha, options.enable)
    if diffusers.is_one(tensors):
        return "diffusers", diffusers.read(tensors, metadata)
    some = ", ".join(sorted(tensors)[:3])
    raise ValueError(f"{source} is of no form that is known here ({some} …): peft, loralib, kohya, diffusers.")


def read_file(file: Path, trusted: Path | None) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a file and what it says of them; a pickle only where it is `trusted`.

    Raises:
        ValueError: it is a pickle that was not named, or holds something else than tensors.
    """
    if file.suffix == ".safetensors":
        tensors = files.read_tensors(file)
        with safe_open(file, "pt") as opened:
            return tensors, opened.metadata() or {}
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    if trusted is None or trusted.resolve() != file.resolve():
        raise ValueError(
            f"{file} is a pickle, which can run any code when it is read. If you know who wrote it, say so for "
            f"this one file: --trust-pickle {file}"
        )
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors, which is not read even so: {error}") from error
    found = found.get("state_dict", found.get("model_state_dict", found)) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{file} holds a {type(found).__name__}, not named tensors.")
    return found, {}


def _unpickled(source: Path, out: Path, options: Options) -> Converted:
    """A folder, or a file, whose pickle becomes safetensors; nothing else changes."""
    if source.is_file():
        tensors, _ = read_file(source, options.trusted)
        _save(out, tensors)
        return Converted(form="safetensors", out=[out], layers=0)
    found = [name for name in PICKLES if (source / name).is_file()]
    if not found:
        raise ValueError(f"{source} holds none of {', '.join(PICKLES)}.")
    with files.saving(out) as new:
        for name in found:
            new.tensors(PICKLES[name], read_file(source / name, options.trusted)[0])
        new.json(CONFIG, files.read_json(source / CONFIG))
    return Converted(form="safetensors", out=[out], layers=0)


def _save(out: Path, tensors: Mapping[str, Tensor]) -> None:
    """Whole, or not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".coadapt-writing.{out.name}")
    try:
        save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, aside, {"format": "pt"})
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
