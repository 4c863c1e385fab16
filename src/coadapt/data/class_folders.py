"""Folders of images: one sub-folder for each class, whose name is the class; parts to hold out stand beside `train`."""

from collections.abc import Sequence
from pathlib import Path

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""File endings of images that are read."""


def find(folder: Path, held_out: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Part ("train", or one of `held_out`) -> its images (path relative to `folder`, class); empty where there is none.

    `folder/cat/1.png`, or `folder/train/cat/1.png` with `folder/test/cat/2.png` beside it.
    """
    parts = [part for part in ("train", *held_out) if (folder / part).is_dir()]
    if "train" in parts and not _images(folder / "train", deep=False):
        return {part: _labelled(folder / part, folder) for part in parts}
    found = _labelled(folder, folder)
    return {"train": found} if found else {}


def beside(folder: Path) -> int:
    """How many images stand in `folder` itself, in no class."""
    return len(_images(folder, deep=False))


def _labelled(place: Path, folder: Path) -> list[tuple[str, str]]:
    classes = sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [(str(file.relative_to(folder)), path.name) for path in classes for file in _images(path)]


def _images(place: Path, deep: bool = True) -> list[Path]:
    files = place.rglob("*") if deep else place.iterdir()
    return sorted(p for p in files if p.suffix.lower() in ENDINGS and not p.name.startswith(".") and p.is_file())
