"""Images and their classes: looked at once before training, opened again whenever a batch needs them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import BaseImageProcessor

from coadapt.data.by_task import TASK, Tasks
from coadapt.data.prepare import Plan, Prepared, dropped, split_rows
from coadapt.data.source import Source, fingerprint
from coadapt.data.tokens import Tally, class_name

SHOWN = 3
"""So many files that are left out are named."""


def need_pillow() -> None:
    """Raises a ValueError with the command where the library that reads images is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ValueError("Images are read with pillow, which is not installed. Run: pip install pillow") from error


def opened(file: Path) -> Any:
    """The image in a file: turned as its camera held it, in RGB, transparent parts white.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as an image; says why.
    """
    need_pillow()
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as found:
            image = ImageOps.exif_transpose(found)
            if not image.has_transparency_data:
                return image.convert("RGB")
            seen = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no image {str(file)!r}.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ImageCollator:
    """Rows (`image`: a path, `labels`: a class) as a batch: `pixel_values` (B, channels, H, W) and `labels` (B,)."""

    processor: BaseImageProcessor

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        seen = self.processor([opened(Path(e["image"])) for e in examples], return_tensors="pt")
        told = {key: torch.tensor([e[key] for e in examples]) for key in ("labels", TASK) if key in examples[0]}
        return {**seen, **told}


@dataclass
class _Looked:
    """What looking at the files of some rows came to."""

    tally: Tally = field(default_factory=Tally)
    sizes: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    left_out: list[str] = field(default_factory=list[str])


def prepare_images(found: Plan, *, eval_split: float, seed: int, tasks: Tasks | None = None) -> Prepared:
    """Splits, and looks at each file; those that are no images are left out, and named.

    `eval_split`, `seed` and `tasks` as in `prepare`.

    Raises:
        ValueError: no row has an image that can be read, or pillow is missing.
    """
    need_pillow()
    rows, held_rows = split_rows(found, eval_split, seed)
    train, held = _Looked(), _Looked()
    place = found.source.root
    examples = _examples(rows, found, place, train, tasks)
    held_out = None
    if held_rows is not None:
        held_out = _examples(held_rows, found, place if found.held_out is None else found.held_out.root, held, tasks)
    return Prepared(
        train=examples,
        held_out=held_out,
        framing=None,
        max_length=None,
        tally=train.tally,
        held_out_tally=held.tally,
        fingerprint=fingerprint(_with_content(found.source, found.form.columns["image"])),
        notes=tuple(_notes(found, train, held)),
    )


def _examples(rows: Dataset, found: Plan, place: Path, looked: _Looked, tasks: Tasks | None) -> Dataset:
    columns, made, tally = found.form.columns, list[dict[str, Any]](), looked.tally
    for row in rows:
        image, label = row[columns["image"]], row[columns["label"]]  # type: ignore[index, call-overload]
        own = {} if tasks is None else {TASK: tasks.of(row)}  # type: ignore[arg-type]
        tally.rows += 1
        name = class_name(label, found.classes)
        if not image or label is None or label == "":
            tally.drop("empty")
        elif name not in found.classes:
            tally.drop("a class that no training row has")
        elif (why := _look(place / image, looked)) is not None:
            tally.drop(why)
            looked.left_out.append(str(image))
        else:
            tally.trained += 1
            made.append({"image": str(place / image), "labels": found.classes.index(name), **own})
    if not made:
        raise ValueError(
            f"None of the {tally.rows} rows has an image that can be read: {dropped(tally)}"
            + (f" (the first: {place / looked.left_out[0]})" if looked.left_out else "")
            + f". Paths in the column {columns['image']!r} are relative to {place}."
        )
    return Dataset.from_list(made)


def _look(file: Path, looked: _Looked) -> str | None:
    """What is wrong with a file, without reading all of it."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            looked.sizes.add(image.size)
            image.verify()
    except FileNotFoundError:
        return "no such file"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "no image"
    return None


def _with_content(source: Source, column: str) -> Iterator[Mapping[str, Any]]:
    """The rows with a digest of each file: other images under the same names are other data."""
    for row in source.rows:
        assert isinstance(row, dict)
        file = source.root / str(row[column])
        yield {**row, "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None}


def _notes(found: Plan, train: _Looked, held: _Looked) -> Iterator[str]:
    yield from found.source.notes
    if found.form.note:
        yield found.form.note
    sizes = sorted(train.sizes | held.sizes, key=lambda size: size[0] * size[1])
    small, large = (f"{width} x {height}" for width, height in (sizes[0], sizes[-1]))
    yield f"images of {small} pixels" if small == large else f"images of {small} to {large} pixels"
    for name, looked in (("train", train), ("held out", held)):
        if looked.tally.dropped:
            more = len(looked.left_out) - SHOWN
            named = ", ".join(looked.left_out[:SHOWN]) + (f" and {more} more" if more > 0 else "")
            yield f"{name}: dropped {dropped(looked.tally)}" + (f": {named}" if named else "")
