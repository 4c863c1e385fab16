"""From what a person names at the start, folders and a base, to an engine that knows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from coadapt.data.segments import Framing
from coadapt.model import PeftModel
from coadapt.serving.catalog import NAME, NO_NAME, Entry, holds_adapter
from coadapt.serving.engine import Engine
from coadapt.training.load import base_of, framing_of, grow, load_bare


@dataclass(frozen=True, kw_only=True)
class Given:
    """An adapter folder, and what clients call it."""

    name: str
    folder: Path

    @classmethod
    def read(cls, text: str) -> "Given":
        """`NAME=DIR`, or `DIR` alone, whose last part is the name then. Raises ValueError for what is no name."""
        name, parted, path = text.partition("=")
        if not parted or "/" in name:
            name, path = Path(text).resolve().name, text
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for an adapter: {NO_NAME}. Give one: --adapter NAME={path}.")
        return cls(name=name, folder=Path(path))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the server begins with. The view has no adapters yet."""

    view: PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    """What clients call it."""
    root: str
    framing: Framing | None
    entries: Sequence[Entry]
    notes: Sequence[str]


def listed(given: Sequence[Given], adapters_dir: Path | None) -> tuple[list[Entry], list[str]]:
    """All adapters, and what was left out. Reads settings only.

    Raises:
        FileNotFoundError, ValueError: a folder holds no adapter, or a name is there twice.
    """
    found, notes = [Entry.read(one.name, one.folder, given=True) for one in given], list[str]()
    if adapters_dir is not None:
        if not adapters_dir.is_dir():
            raise FileNotFoundError(f"There is no folder --adapters-dir {str(adapters_dir)!r}.")
        root = adapters_dir.resolve()
        for folder in sorted(path for path in adapters_dir.iterdir() if holds_adapter(path)):
            try:
                found.append(_in_folder(folder, root))
            except (ValueError, OSError) as error:  # the others can be served
                notes.append(_left_out(folder, error))
    names = [entry.name for entry in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"The name {twice[0]!r} is there twice. Give one of them another: --adapter NAME=DIR.")
    return found, notes


def _in_folder(folder: Path, root: Path) -> Entry:
    if not folder.resolve().is_relative_to(root):
        raise ValueError("it is a link that leads out of --adapters-dir.")
    if not NAME.fullmatch(folder.name):
        raise ValueError(f"its name is none for an adapter ({NO_NAME}).")
    return Entry.read(folder.name, folder)


def _left_out(folder: Path, error: Exception) -> str:
    return f"{folder} is left out: {str(error).splitlines()[0]}"


def introduced(engine: Engine, entries: Sequence[Entry], most: int) -> tuple[list[Entry], list[str]]:
    """Tells an engine, which does not run yet, of all adapters, and loads so many; those, and what was left out.

    Raises:
        ValueError: one that was named does not fit the base.
    """
    kept, notes = list[Entry](), list[str]()
    for entry in entries:
        try:
            (engine.load if len(kept) < most else engine.offer)(entry.name, entry.folder)
            kept.append(entry)
        except (ValueError, OSError) as error:
            if entry.given:
                raise
            notes.append(_left_out(entry.folder, error))
    return kept, notes


def base_for(model: str | None, entries: Sequence[Entry]) -> str:
    """The base: as it is told, else as the first adapter names it. Raises ValueError where neither does."""
    named = model or next((name for entry in entries if (name := base_of(entry.folder))), None)
    if named is None:
        raise ValueError("Which base? Give --model" + (f"; {entries[0].folder} names none." if entries else "."))
    return named


def opened(
    model: str | None,
    given: Sequence[Given],
    adapters_dir: Path | None,
    *,
    name: str | None,
    device: torch.device,
) -> Opened:
    """Lists the adapters, and loads the base.

    Args:
        name: what clients call the base; None: its folder's name, or its hub id.

    Raises:
        FileNotFoundError, ValueError: something is not there, does not fit, or is no language model.
    """
    entries, notes = listed(given, adapters_dir)
    root = base_for(model, entries)
    called = name or (Path(root).resolve().name if Path(root).is_dir() else root)
    if called in [entry.name for entry in entries]:
        raise ValueError(f"Base and adapter are both called {called!r}. Give the base another name: --name NAME.")
    ready = load_bare(root, given[0].folder if given else None, device=device)
    if ready.task != "causal-lm":
        raise ValueError(f"{root} is a model for {ready.task}; the server answers with causal language models only.")
    for one in given:
        grow(ready.model, one.folder)
    return Opened(
        view=PeftModel(ready.model).to(device).eval(),
        tokenizer=ready.tokenizer,
        base=called,
        root=root,
        framing=framing_of(Path(root)) if Path(root).is_dir() else None,
        entries=entries,
        notes=notes,
    )
