"""Rows from wherever they are: a file, a folder of files, a folder of `datasets`, a hub id."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from coadapt.data import class_folders

KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
"""File endings that are read, and the reader of `datasets` for each."""

HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
"""Names of splits that are held out, best first."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows as they were found."""

    name: str
    rows: Dataset
    held_out: Dataset | None = None
    document: bool = False
    """One long text, to be cut into blocks, and not a table of rows."""
    notes: tuple[str, ...] = field(default=())
    root: Path = field(default=Path())
    """Where the rows' paths begin: the folder of the file that they were read from."""


def read(name: str, config: str | None = None) -> Source:
    """Reads `name`: an existing file or folder, else the id of a dataset on the hub (`config` is its configuration).

    Raises:
        FileNotFoundError: it looks like a path and is not there.
        ValueError: the content cannot be read; the message names file, line and remedy.
    """
    path = Path(name).expanduser()
    if config is not None and path.exists():
        raise ValueError(f"dataset_config={config!r} is for datasets of the hub; {name!r} is a {_what(path)} here.")
    if path.is_file():
        return _from_files(name, {"train": [path]})
    if path.is_dir():
        return _from_folder(name, path)
    if path.suffix in KINDS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"data={name!r}: there is no such file or folder. {_neighbours(path)}")
    return _from_hub(name, config)


def fingerprint(rows: Iterable[Any]) -> str:
    """SHA-256 over the content of the rows, in order; the same for the same rows in another kind of file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _from_folder(name: str, folder: Path) -> Source:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _from_splits(name, datasets.load_from_disk(str(folder)))
    files = sorted(p for p in folder.iterdir() if p.suffix in KINDS and not p.name.startswith((".", "README")))
    endings = sorted({p.suffix for p in files})
    if not any(KINDS[file.suffix] != "text" for file in files) and (found := class_folders.find(folder, HELD_OUT)):
        return _from_images(name, folder, found)
    if not files:
        raise ValueError(
            f"data={name!r}: the folder holds no file that ends in {', '.join(KINDS)}, nor a folder of images for each "
            f"class ({', '.join(class_folders.ENDINGS)})."
        )
    if len(endings) > 1:
        raise ValueError(f"data={name!r}: its files end in {' and '.join(endings)}. Name one file, or move the others.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    if "train" not in splits:
        raise ValueError(f"data={name!r}: all files are held-out parts ({_names(files)}); none is for training.")
    return _from_files(name, splits)


def _from_images(name: str, folder: Path, found: dict[str, list[tuple[str, str]]]) -> Source:
    parts = DatasetDict()
    for part, images in found.items():
        parts[part] = Dataset.from_dict({"image": [path for path, _ in images], "label": [of for _, of in images]})
    loose = class_folders.beside(folder)
    notes = [f"not used: {loose} images in no class's folder"] if loose else []
    return _from_splits(name, parts, notes, root=folder)


def _split_of(file: Path) -> str:
    words = file.stem.lower().replace("-", "_").replace(".", "_").split("_")
    return next((split for split in HELD_OUT if split in words or f"{split}set" in words), "train")


def _from_files(name: str, splits: dict[str, list[Path]]) -> Source:
    files = [file for group in splits.values() for file in group]
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"data={name!r}: {file} is empty.")
        if file.suffix != ".parquet":
            check_utf8(file)
    kind = KINDS.get(files[0].suffix)
    if kind is None:
        raise ValueError(
            f"data={name!r}: files that end in {files[0].suffix!r} are not read. Read: {', '.join(KINDS)}."
        )
    parts = {split: _load(kind, group) for split, group in splits.items()}
    notes = sorted({note for _, note in parts.values() if note})
    rows = DatasetDict({split: rows for split, (rows, _) in parts.items()})
    return _from_splits(name, rows, notes, document=kind == "text", root=files[0].parent)


def _load(kind: str, files: list[Path]) -> tuple[Dataset, str | None]:
    """The rows, and what had to be done to read them."""
    match kind:
        case "csv":
            # `"a", "b, c"`: a blank before a quote hides the quote from the reader; only then it is skipped, since it
            # may belong to the text.
            options = _csv_options(files[0])
            attempts = [
                (options, None),
                ({**options, "skipinitialspace": True}, "blanks at the start of cells were skipped"),
            ]
        case "json":
            attempts = [(_json_options(files[0]), None)]
        case "text":
            attempts = [({"sample_by": "document"}, None)]
        case _:
            attempts = [({}, None)]
    reasons: list[str] = []
    for options, note in attempts:
        try:
            rows = _quietly(datasets.load_dataset, kind, data_files=[str(f) for f in files], split="train", **options)
        except Exception as error:
            # datasets wraps the reader's own message, which has the line, in one that does not.
            cause = error.__cause__ or error
            partly = f"not all of them have {cause}" if isinstance(cause, KeyError) else str(cause)
            reasons.append(" ".join(partly.split()))
        else:
            return rows, note
    raise ValueError(f"{_names(files)} cannot be read as {kind}: {reasons[0]}")


def _quietly(load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls `load` without the log and the bars of `datasets`: what goes wrong is told by the error."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        return load(*args, **options)
    finally:
        datasets.logging.set_verbosity(before)


def _csv_options(file: Path) -> dict[str, Any]:
    """Every column as text: `007`, `NA` and `None` stay what they are. A .tsv has no quoting, a .csv has."""
    tabs = file.suffix == ".tsv"
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header = next(csv.reader(lines, delimiter="\t" if tabs else ",", quoting=quoting), [])
    if len(set(header)) < len(header) or not all(h.strip() for h in header):
        raise ValueError(f"{file}: the first line must name each column once; it reads {header}.")
    return {
        "sep": "\t" if tabs else ",",
        "quoting": quoting,
        "keep_default_na": False,
        "encoding": "utf-8-sig",
        "features": datasets.Features({column: datasets.Value("string") for column in header}),
    }


def _json_options(file: Path) -> dict[str, Any]:
    """One object that holds the rows in one of its fields needs that field's name."""
    if file.suffix != ".json":
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return {}  # JSON lines under another name
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or {"messages", "conversations"} & set(content):
        return {}
    lists = [key for key, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1:
        raise ValueError(
            f"{file} is one object with the fields {list(content)}; its rows should be a list in one of them."
        )
    return {"field": lists[0]}


def check_utf8(file: Path) -> None:
    """Raises a ValueError that names the byte and its line if `file` is not UTF-8."""
    with file.open("rb") as lines:
        start = 0
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is not UTF-8: line {number} has the byte 0x{line[error.start]:02x} (byte "
                    f"{start + error.start} of the file). Convert it first, for example: iconv -f latin1 -t utf-8 "
                    f"{file.name} > utf8-{file.name}"
                ) from error
            start += len(line)


def _from_hub(name: str, config: str | None) -> Source:
    try:
        return _from_splits(name, _quietly(datasets.load_dataset, name, config))
    except Exception as error:
        raise ValueError(
            f"data={name!r} is no file or folder here, and could not be loaded as a dataset of the hub: {error}"
        ) from error


def _from_splits(
    name: str,
    found: Dataset | DatasetDict,
    notes: Sequence[str] = (),
    document: bool = False,
    root: Path = Path(),
) -> Source:
    if isinstance(found, Dataset):
        return Source(name=name, rows=found)
    if "train" not in found:
        raise ValueError(f"data={name!r} has the splits {', '.join(map(str, found))}, and none is called train.")
    held_out = next((split for split in HELD_OUT if split in found), None)
    unused = [split for split in found if split not in ("train", held_out)]
    told = [f"held-out rows: its part {held_out!r}"] if held_out else []
    told += [f"not used: {', '.join(map(str, unused))}"] if unused else []
    return Source(
        name=name,
        rows=found["train"],
        held_out=found[held_out] if held_out else None,
        document=document,
        notes=(*notes, *told),
        root=root,
    )


def _names(files: list[Path]) -> str:
    shown = ", ".join(f.name for f in files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"


def _what(path: Path) -> str:
    return "file" if path.is_file() else "folder"


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} is not there either."
    there = sorted(_readable(path.parent))[:8]
    return f"In {path.parent} there is: {', '.join(there)}." if there else f"{path.parent} holds no data."


def _readable(folder: Path) -> Iterator[str]:
    return (p.name for p in folder.iterdir() if p.suffix in KINDS or p.is_dir())
