"""The runs below a folder, read from their own files: which there are, how each stands, and what it has written."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from coadapt.formats.files import COMPOSITION, CONFIG
from coadapt.training.log import METRICS, RUN, read_log
from coadapt.training.presence import noted, process_of
from coadapt.ui.form import SETTINGS

State = Literal["running", "done", "stopped", "failed"]
LOG = "train.log"
"""What a run of the page says, which on a terminal would be on the screen."""
PROMPT = "$ "
"""Before the command that a log, or what was added to it later, begins with."""
DEPTH = 3
"""So many folders below the first one runs are looked for."""
TAIL = 40_000
"""Characters at the end of a log that are looked at."""
PROGRESS = re.compile(r"^step (\d+)/(\d+) ", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands."""

    state: State
    said: str
    """One sentence; for a run that has failed, why."""
    pid: int | None = None


def found(runs: Path) -> dict[str, Path]:
    """Name below `runs` -> the folder of each run, the latest first; links that lead elsewhere are left out."""
    here = runs.resolve()
    folders: dict[str, Path] = {}
    level = [runs]
    for _ in range(DEPTH):
        below: list[Path] = []
        for parent in level:
            with suppress(OSError):
                below += [p for p in parent.iterdir() if p.is_dir() and not p.name.startswith((".", "checkpoint-"))]
        level = []
        for path in below:
            if not path.resolve().is_relative_to(here):
                continue
            if is_run(path):
                folders[path.relative_to(runs).as_posix()] = path
            else:
                level.append(path)
    return dict(sorted(folders.items(), key=lambda item: (-_touched(item[1]), item[0])))


def is_run(folder: Path) -> bool:
    """Whether `coadapt train` wrote there, or is about to."""
    return (folder / RUN).is_file() or (folder / SETTINGS).is_file()


def named(runs: Path, name: str) -> Path:
    """The folder of a run. Raises ValueError where there is no run of that name below `runs`."""
    if name not in (there := found(runs)):
        raise ValueError(f"There is no run {name!r} in {runs}. There are: {', '.join(there) or 'none'}.")
    return there[name]


def _touched(folder: Path) -> float:
    """When the run began: its settings are written then."""
    times = [0.0]
    for name in (SETTINGS, RUN):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def standing(folder: Path) -> Standing:
    """Whether it runs, is done, was stopped, or has failed and why."""
    if (process := process_of(folder)) is not None:
        at = progress(folder)
        said = "Preparing: the model and the data are being read." if at is None else f"Step {at[0]} of {at[1]}."
        if at is not None and at[1] is None:
            said = f"Step {at[0]}."
        return Standing(state="running", said=said, pid=process.pid)
    note = noted(folder)
    if note is not None and "error" in note:
        return Standing(state="failed", said=str(note["error"]))
    last = last_error(folder)
    if note is not None:  # it could not take its note away
        if last == "stopped":
            return Standing(state="stopped", said="It was stopped before its first step.")
        if last is not None:
            return Standing(state="failed", said=last)
        return Standing(state="failed", said="It ended without a word: the process was killed, or the machine stopped.")
    if any((folder / name).is_file() for name in (CONFIG, COMPOSITION)):
        return Standing(state="done", said="Finished; its adapters are saved.")
    if not (folder / RUN).is_file():
        return Standing(state="stopped", said="It has not begun.")
    return Standing(state="stopped", said="It was stopped; it can go on from its last checkpoint.")


def progress(folder: Path) -> tuple[int, int | None] | None:
    """(step, of how many; None where that is not known) of a run; None before its first line."""
    if not _older(folder / LOG, folder / METRICS) and (told := PROGRESS.findall(tail(folder))):
        return int(told[-1][0]), int(told[-1][1])
    log = lines(folder)
    if not log:
        return None
    steps = settings(folder).get("max_steps", -1)
    return max(line["step"] for line in log), steps if isinstance(steps, int) and steps > 0 else None


def _older(file: Path, other: Path) -> bool:
    """Whether a file was written to well before the other: it is of an earlier run in the same folder."""
    with suppress(OSError):
        return file.stat().st_mtime < other.stat().st_mtime - 5
    return False


def settings(folder: Path) -> dict[str, Any]:
    """What the run was told: with every default once it has begun, else what it is started with."""
    for name in (RUN, SETTINGS):
        with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
            values = yaml.safe_load((folder / name).read_text("utf-8"))
            if isinstance(values, dict):
                return cast(dict[str, Any], values)
    return {}


def lines(folder: Path) -> list[dict[str, Any]]:
    """The figures of a run, as far as they can be read: one damaged line does not hide the others' run."""
    with suppress(ValueError, OSError):
        return read_log(folder / METRICS)
    return []


def tail(folder: Path) -> str:
    """The end of what the run said, where it was started from the page; else nothing."""
    file = folder / LOG
    with suppress(OSError):
        with file.open("rb") as log:
            log.seek(max(file.stat().st_size - TAIL, 0))
            return log.read().decode("utf-8", "replace")
    return ""


def last_error(folder: Path) -> str | None:
    """The error that ended the run, as its log has it: from `error:` (click's: `Error:`) on."""
    said = f"\n{tail(folder)}".rpartition(f"\n{PROMPT}")[2]
    found = re.split(r"^error: ", said, flags=re.MULTILINE | re.IGNORECASE)
    return found[-1].strip() if len(found) > 1 else None


def last_lines(folder: Path, count: int = 14) -> str:
    """The last lines of its log; of a run from a terminal, those of its figures."""
    if text := tail(folder).strip():
        return "\n".join(text.splitlines()[-count:])
    return "\n".join(_told(line) for line in lines(folder)[-count:])


def _told(line: Mapping[str, Any]) -> str:
    step = f"step {line['step']}"
    if "warning" in line:
        return f"{step} · warning: {line['warning']}"
    shown = {"train/loss": "loss", "eval/loss": "held-out loss", "eval/accuracy": "held-out accuracy"}
    return " · ".join([step, *(f"{name} {line[key]:.4f}" for key, name in shown.items() if key in line)])


def methods_of(values: Mapping[str, Any]) -> str:
    """`lora + prompt_tuning`, of a run's settings."""
    adapters = values.get("adapters")
    chosen: Sequence[Any] = list(adapters.values()) if isinstance(adapters, dict) else []
    return " + ".join(str(a.get("method", "lora")) for a in chosen if isinstance(a, dict)) or str(
        values.get("method") or "lora"
    )
