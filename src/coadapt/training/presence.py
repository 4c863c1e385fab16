"""Which process trains a run: a file beside its log while it goes, so that anybody who looks finds it, and its end.

A process that is killed leaves the file behind; when it began tells it from a later one of the same number.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from coadapt.formats.files import aside

PROCESS = "process.json"
SAME = 2.0
"""Seconds by which two readings of the time that a process began at may differ."""


@contextmanager
def present(folder: Path) -> Iterator[None]:
    """Context: the folder says which process trains it; afterwards, where that has failed, why."""
    note(folder, os.getpid())
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # a full disk may be what it failed of
            note(folder, os.getpid(), str(error) or type(error).__name__)
        raise
    except BaseException:
        (folder / PROCESS).unlink(missing_ok=True)
        raise
    (folder / PROCESS).unlink(missing_ok=True)


def note(folder: Path, pid: int, error: str | None = None) -> None:
    """Writes which process it is. Raises psutil.NoSuchProcess where it has gone already."""
    said: dict[str, Any] = {"pid": pid, "started": psutil.Process(pid).create_time()}
    with aside(folder / PROCESS) as file:
        file.write_text(json.dumps(said if error is None else {**said, "error": error}) + "\n", "utf-8")


def noted(folder: Path) -> dict[str, Any] | None:
    """What the file says; None where there is none, or it is no such file."""
    with suppress(OSError, ValueError):
        said = json.loads((folder / PROCESS).read_text("utf-8"))
        if isinstance(said, dict) and isinstance(said.get("pid"), int):
            return said
    return None


def process_of(folder: Path) -> psutil.Process | None:
    """The process that trains the run now; None where none does."""
    said = noted(folder)
    if said is None or "error" in said:
        return None
    with suppress(psutil.Error, TypeError, ValueError):
        process = psutil.Process(said["pid"])
        if abs(process.create_time() - float(said.get("started", 0))) < SAME:
            return process if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else None
    return None
