"""Runs as processes of their own, which go on when the page, or who serves it, is gone."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from coadapt.formats.files import aside
from coadapt.training.log import RUN
from coadapt.training.presence import note, process_of
from coadapt.ui.form import SETTINGS, as_yaml
from coadapt.ui.runs import LOG, PROMPT

START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell may have it ignored
    "from coadapt.cli import main; main(sys.argv[1:])"
)
"""`coadapt` in this Python, wherever its script is."""
COLUMNS = "110"

children: dict[int, subprocess.Popen[bytes]] = {}
"""Those that this process has started: it has to ask for their ends, or they stay as zombies."""


def start(runs: Path, name: str, values: Mapping[str, Any]) -> Path:
    """Begins a run in a new folder, with its settings beside it; the folder.

    Raises:
        ValueError: the folder is there already.
        OSError: it cannot be written, or no process can be started; nothing is left behind.
    """
    folder = runs / name
    runs.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()  # of two that start at once, one gets it
    except FileExistsError as error:
        raise ValueError(f"{folder} is there already. Choose another name.") from error
    try:
        with aside(folder / SETTINGS) as file:
            file.write_text(as_yaml({**values, "output_dir": str(folder)}), "utf-8")
        _run(folder, "train", "--config", str(folder / SETTINGS))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def go_on(folder: Path) -> None:
    """Goes on with a run that was stopped, or killed, from its last checkpoint.

    Raises:
        ValueError: it runs; or it never got as far as to begin.
    """
    if process_of(folder) is not None:
        raise ValueError(f"{folder} is running.")
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} has not begun, so there is nothing to go on with. Start it anew.")
    # Its own settings name the folder as it was called from where it was started; here it may be called otherwise.
    _run(folder, "train", "--config", str(folder / RUN), "--resume", f"output_dir={folder}")


def _run(folder: Path, *args: str) -> None:
    with (folder / LOG).open("ab") as log:
        log.write(f"{PROMPT}{shlex.join(['coadapt', *args])}\n".encode())
        log.flush()
        child = subprocess.Popen(
            [sys.executable, "-c", START, *args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C for the page is none for its runs
            env={**os.environ, "COLUMNS": COLUMNS, "NO_COLOR": "1"},
        )
    children[child.pid] = child
    with suppress(psutil.NoSuchProcess):
        note(folder, child.pid)


def reap() -> None:
    """Lets go of the processes that have ended."""
    for pid, child in list(children.items()):
        if child.poll() is not None:
            del children[pid]


def stop(folder: Path) -> None:
    """Asks a run to stop after its step, with a checkpoint, as one Ctrl-C does.

    Raises:
        ValueError: it does not run.
    """
    process = process_of(folder)
    if process is None:
        raise ValueError(f"{folder} does not run, so there is nothing to stop.")
    process.send_signal(signal.SIGINT)
