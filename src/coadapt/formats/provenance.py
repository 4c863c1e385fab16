"""What an adapter depends on beside its settings: the base's fingerprint, and the versions that wrote it."""

import functools
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .files import PROVENANCE, read_json

_ROOT = __name__.partition(".")[0]
_NAMES = (_ROOT, "torch", "transformers", "safetensors")


def record(file: Path, fingerprint: str, base: str | None, **facts: Any) -> dict[str, Any]:
    """What `file` is to hold: versions, the base, and `facts` that are not None.

    What others wrote there (data, hardware, figures) stays; to add to it, write what this gives with more `facts`.
    """
    before = read_json(file) if file.is_file() else {}
    now = {
        **before,
        "versions": {**before.get("versions", {}), **versions()},
        "base": {"name": base, "fingerprint": fingerprint},
        **facts,
    }
    return {name: fact for name, fact in now.items() if fact is not None}


def versions(*more: str) -> dict[str, str | None]:
    """Of python and the packages that a result depends on; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in (*_NAMES, *more)}}


@functools.cache
def _version(name: str) -> str | None:
    if name == _ROOT:
        return sys.modules[name].__version__  # also where coadapt runs from its source, without being installed
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def fingerprint_in(folder: Path) -> str | None:
    """Of the base that the adapter in `folder` was trained on, where the folder tells."""
    file = folder / PROVENANCE
    told = read_json(file).get("base") if file.is_file() else None
    return told.get("fingerprint") if isinstance(told, dict) else None


def start_in(folder: Path) -> dict[str, Any] | None:
    """What start the adapter in `folder` was asked for, where its configuration says it in other words."""
    file = folder / PROVENANCE
    told = read_json(file).get("asked_start") if file.is_file() else None
    return told if isinstance(told, dict) else None


def compare_bases(where: Path, theirs: str | None, ours: str) -> None:
    """Warns where the fingerprint in a folder is not that of the model at hand."""
    if theirs and theirs != ours:
        same = theirs.split("-")[0] == ours.split("-")[0]
        warnings.warn(
            f"{where} was trained on a base with {'other weights' if same else 'other modules or shapes'}: its "
            f"fingerprint is {theirs}, this model's is {ours}. Results will differ from what was trained.",
            stacklevel=2,
        )
