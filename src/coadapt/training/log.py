"""What a run writes as it goes: the names of its files, and the lines of its log."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

RUN, METRICS = "run.yaml", "metrics.jsonl"
"""The settings of a run, and its log."""
EVALUATION = "evaluation.json"
"""What `coadapt eval` writes beside the adapters, where nothing else is said."""
Figures = dict[str, dict[str, float]]
"""Group -> figure -> value."""
FIGURES = ("learning_rate", "grad_norm", "update_norm", "update_ratio", "effective_rank")
Points = list[tuple[int, float]]
"""(step, value)"""


def named(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer's names as trackers have them: `train/loss`, `eval/loss`."""
    found: dict[str, Any] = {}
    for name, value in logs.items():
        group, _, rest = name.partition("_")
        known = group in ("train", "eval") and rest
        found[name if name in ("epoch", "step") else f"{group}/{rest}" if known else f"train/{name}"] = value
    return found


def held_out_losses(line: Mapping[str, Any]) -> dict[str, float]:
    """Data set -> its held-out loss, where there are several: `eval/NAME/loss`, with Trainer `eval_NAME/loss`."""
    found = {key: key.removeprefix("eval").removesuffix("/loss") for key in line if key.startswith(("eval/", "eval_"))}
    return {name[1:]: line[key] for key, name in found.items() if key.endswith("/loss") and len(name) > 1}


def values_in(logs: Mapping[str, Any], figure: str) -> dict[str, float]:
    """Name -> value of one figure in a line of the log, with or without the `train/` that trackers have."""
    short = {key.removeprefix("train/"): value for key, value in logs.items()}
    return {key.removeprefix(f"{figure}/"): v for key, v in short.items() if key.startswith(f"{figure}/")}


def figures_in(logs: Mapping[str, Any]) -> Figures:
    """The figures of each adapter, all kinds of its parameters together, in a line of the log."""
    found: Figures = {}
    for figure in FIGURES:
        for name, value in values_in(logs, figure).items():
            found.setdefault(name, {})[figure] = value
    return found


def values_over_steps(log: Sequence[Mapping[str, Any]], figure: str) -> dict[str, Points]:
    """Name -> (step, its value) wherever it was measured."""
    found: dict[str, Points] = {}
    for line in log:
        for name, value in values_in(line, figure).items():
            found.setdefault(name, []).append((line["step"], value))
    return found


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to a metrics file, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    before = file.stat().st_size if file.is_file() else 0
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
    except OSError as error:
        with suppress(OSError):
            os.truncate(file, before)
        raise OSError(f"{file} could not be written: {error}. Make room, then go on with --resume.") from error


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none where there is none. A last line that was cut off is left out.

    Raises:
        ValueError: another line is damaged; names it.
    """
    if not file.is_file():
        return []
    lines = file.read_text("utf-8", errors="replace").splitlines(keepends=True)
    return [_line(file, number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _line(file: Path, number: int, line: str) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found
    raise ValueError(f"{file}, line {number} is damaged: {line.strip()[:80]!r}. Mend that line, or take it out.")
