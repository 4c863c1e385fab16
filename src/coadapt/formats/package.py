"""What of a folder belongs to its adapters, as it can lie where others read it: no paths, no keys, nothing else."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .facts import places
from .files import COMPOSITION, CONFIG, GATES, PROVENANCE, TRAINING, WEIGHTS, read_json, read_tensors, settle

CARD, PICTURE = "README.md", "loss.png"
OF_ADAPTERS = (CONFIG, WEIGHTS, TRAINING, COMPOSITION, GATES, PROVENANCE)
BESIDE = (
    *(CARD, PICTURE, "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "normalizer.json"),
)
"""What may stand beside adapters: card, picture, tokenizer, processor. Of nothing else is anything known here."""
SECRET = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{24,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""Keys of hubs, of services and of machines."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """What is to lie in a repository."""

    files: Mapping[str, Path | bytes]
    """Name there -> the file, or its content where that differs from the folder's."""
    stays: list[str]
    """What else lies in the folder."""

    def size(self, name: str) -> int:
        """Bytes."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def pack(folder: Path, base: str | None = None) -> Package:
    """The files of a folder that belong to its adapters, without the paths of this machine.

    Links are never followed, and no file is known that could be a pickle, an optimiser's state, a log or data.

    Args:
        base: the model of the hub that the adapters are for, in place of what the folder names.

    Raises:
        FileNotFoundError: it holds no adapter.
        ValueError: a file holds what looks like a key, or the base is named by a path of this machine.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    settle(folder)
    if not (where := places(folder)):
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG} is missing (found: {there}).")
    for place in where:
        if not (place / WEIGHTS).is_file():
            read_tensors(place / WEIGHTS)  # says what is there instead
    known = [folder / name for name in (*OF_ADAPTERS, *BESIDE)]
    known += [place / name for place in where if place != folder for name in OF_ADAPTERS]
    found = [file for file in known if file.is_file() and not file.is_symlink()]
    files = {file.relative_to(folder).as_posix(): _content(file, base) for file in found}
    for name, content in files.items():
        if not name.endswith(".safetensors") and SECRET.search(_read(content)):
            raise ValueError(f"{folder / name} holds what looks like a key, so nothing was sent. Take it out.")
    inside = {place.name for place in where if place != folder}
    return Package(files=files, stays=sorted(p.name for p in folder.iterdir() if p.name not in {*files, *inside}))


def _read(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _content(file: Path, base: str | None) -> Path | bytes:
    """The file itself, or what it says without the paths of this machine."""
    if file.suffix != ".json" or file.name in ("tokenizer.json", "vocab.json"):
        return file
    said = read_json(file)
    fit = dict(said)
    if file.name == CONFIG and "base_model_name_or_path" in said:
        fit["base_model_name_or_path"] = base or _known_to_others(file, said["base_model_name_or_path"])
    if file.name == PROVENANCE and base and isinstance(said.get("base"), dict):
        fit["base"] = {**said["base"], "name": base}
    fit = without_paths(fit)
    return file if fit == said else (json.dumps(fit, indent=2, ensure_ascii=False) + "\n").encode()


def _known_to_others(file: Path, name: Any) -> str:
    if not name or is_here(str(name)):
        said = f"names its base as {name!r}, a path of this machine" if name else "names no base"
        raise ValueError(
            f"{file} {said}, so nobody could load it. Say which model of the hub it is (--base-model, base_model=)."
        )
    return str(name)


def is_here(name: str) -> bool:
    """Whether a model or a data set is named by its place on this machine, and not by a hub's name for it."""
    return name.startswith((".", "~", "/", "\\")) or ":" in name or name.count("/") > 1 or Path(name).exists()


def without_paths(value: Any) -> Any:
    """The same values; of a path that leads out of the folder at hand, its last part."""
    if isinstance(value, dict):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    if isinstance(value, str) and (value.startswith(("/", "~/", "../")) or re.match(r"[A-Za-z]:[\\/]", value)):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def place_of(name: str | Path, revision: str | None = None) -> Path:
    """The folder that is meant: the one of this name, else what a repository of the hub holds, in the cache.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: `revision` would have no effect on a folder.
    """
    folder = Path(name)
    if isinstance(name, Path) or is_here(name) or name.count("/") != 1:
        if revision is not None:
            raise ValueError(f"revision={revision!r} has no effect: {str(name)!r} is a folder, not a repository.")
        return folder
    from .hub import fetch  # importing it takes a third of a second, and most adapters lie in a folder

    return fetch(name, revision)
