"""Reading and writing files: whole or not at all, also when the process is killed in the middle.

A save of several files writes them all into a hidden folder first; renaming that folder is what makes the save count.
Then the files move to their places. `settle` goes on with such a move where it was cut off, so that a reader finds
either all files of the last save or all of the one before.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, TRAINING = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
COMPOSITION, GATES, CHECKPOINT = "composition.json", "composition.safetensors", "model.safetensors"
PROVENANCE = "provenance.json"
_WRITING, _WRITTEN = ".coadapt-writing", ".coadapt-written"
_LAST = (CONFIG, COMPOSITION)
"""What makes a folder one that holds an adapter, or a composition: gone first, and moved to its place last."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def aside(file: Path) -> Iterator[Path]:
    """A path to write to; renamed to `file` when all is written, removed when something fails.

    Its name is always the same, so that the remains of a process that was killed go with the next one.

    Raises:
        OSError: there is no room; `file` is as it was.
    """
    part = file.with_name(f"{_WRITING}.{file.name}")
    try:
        with _room(file):
            yield part
            _to_disk(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _room(what: Path) -> Iterator[None]:
    """Names what could not be written where the disk is full: the system's own error does not."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, SafetensorError) or error.errno in _FULL
        if not full:
            raise
        free = shutil.disk_usage(what.parent).free / 2**30
        raise OSError(
            f"{what} could not be written, and is as it was before: {error} ({free:.1f} GiB are free there). Make room."
        ) from error


class Saving:
    """The files of one save, written aside. An empty file stands for one that goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tensors(self, name: str, tensors: Mapping[str, "Tensor"]) -> None:
        """Writes a safetensors file; takes it away where there are none."""
        from safetensors.torch import save_file  # which imports torch, and many only look at JSON

        file = self._place(name)
        if tensors:
            save_file(_apart(tensors), file, metadata={"format": "pt"})
        else:
            file.touch()

    def json(self, name: str, values: Mapping[str, Any] | None) -> None:
        """Writes a JSON file; takes it away where `values` is None."""
        file = self._place(name)
        text = "" if values is None else json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, "utf-8")

    def _place(self, name: str) -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


def _apart(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Tensors as safetensors writes them: on the CPU, contiguous, no two in the same memory. Copies where it must."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        found[name] = own.clone() if memory in taken else own
        taken.add(memory)
    return found


@contextmanager
def saving(folder: Path) -> Iterator[Saving]:
    """Context for a save into `folder`: nothing of it is there before all of it is, and nothing if something fails.

    Raises:
        OSError: there is no room; the folder is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    new = folder / _WRITING
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        with _room(folder):
            yield Saving(new)
            _to_disk(*(p for p in new.rglob("*") if p.is_file() and p.stat().st_size))
        old = {folder / p.relative_to(new) for p in new.rglob("*") if p.name in _LAST}
        marks = {file: file.stat().st_ino for file in old if file.is_file()}
        new.replace(folder / _WRITTEN)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for file, mark in marks.items():  # without it, programs that know nothing of `settle` take the folder for empty
        if file.stat().st_ino == mark:
            file.unlink()
    _move(folder)


def settle(folder: Path) -> None:
    """Brings a save that was cut off after all was written to its end. Readers call it first."""
    for place in (folder.parent, folder):
        if (place / _WRITTEN).is_dir():
            _move(place)


def _move(folder: Path) -> None:
    """Moves what was written to its place, what tells of it last. Can be cut off, and done by two processes at once."""
    written = folder / _WRITTEN
    staged = sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    for name in sorted(staged, key=lambda n: _LAST.index(n.name) if n.name in _LAST else -1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            if (written / name).stat().st_size:
                (written / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
                (written / name).unlink()
        except FileNotFoundError:
            continue
    _remove_empty(written)


def _remove_empty(folder: Path) -> None:
    """Not what lies in it: that is of another save, which has begun since."""
    inside = sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True)
    for place in (*inside, folder):
        with suppress(OSError):
            place.rmdir()


def _to_disk(*files: Path) -> None:
    """Waits until the disk holds these files: for all at once, which takes it hardly longer than one."""

    def wait(file: Path) -> None:
        with file.open("rb") as written:
            os.fsync(written.fileno())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(wait, files))  # raises what one of them raised


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_tensors(file: Path) -> dict[str, "Tensor"]:
    """What a safetensors file holds.

    Raises:
        FileNotFoundError: there is none; tells what else is there, pickles by name.
        ValueError: it is damaged.
    """
    if not file.is_file():
        if pickles := sorted(p.name for p in file.parent.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")):
            raise ValueError(
                f"{file.parent} holds its weights as a pickle ({', '.join(pickles)}), which can run any code when it "
                f"is read; coadapt reads {file.name} only. Convert it with the program that wrote it."
            )
        raise FileNotFoundError(f"{file.parent} is incomplete: {file.name} is missing.")
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The fields of a JSON file. Raises ValueError where it is damaged or holds something else."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not named fields.")
    return cast(dict[str, Any], values)
