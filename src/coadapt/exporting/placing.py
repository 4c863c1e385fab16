"""The folder that is written: aside first, renamed when it is whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RECORD = "export.json"
"""Says what a folder is; and that it may be written anew when that is asked for."""


def refuse_taken(out: Path, overwrite: bool) -> None:
    """Raises ValueError where `out` may not be written."""
    aside = _aside("replaced", out)
    if aside.is_dir() and not out.exists():  # a process was killed between taking the old one away and putting the new
        aside.rename(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file. Choose another folder.")
    if not overwrite:
        raise ValueError(f"{out} is there already and not empty. Choose another folder, or overwrite it (--overwrite).")
    if not (out / RECORD).is_file():
        raise ValueError(
            f"{out} is nothing that export wrote (it has no {RECORD}), so it is not overwritten. Choose another folder."
        )


@contextmanager
def placed(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder, which becomes `out` when all is written.

    Its name is always the same, so that the remains of a process that was killed go with the next one.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = _aside("writing", out), _aside("replaced", out)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        new.chmod(0o755)
        if out.exists() and any(out.iterdir()):
            refuse_taken(out, overwrite)  # once more: exporting takes its time
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        elif out.exists():
            out.rmdir()
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _aside(what: str, out: Path) -> Path:
    return out.with_name(f".coadapt-{what}.{out.name}")
