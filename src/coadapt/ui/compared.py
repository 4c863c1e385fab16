"""Several runs beside each other: what each came to, and which of their settings differ."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coadapt.training.units import GIB, duration, size
from coadapt.ui import runs
from coadapt.ui.curves import Points, loss, thinned

ALWAYS = ("output_dir",)
"""Settings that differ of necessity."""
NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What one run came to so far."""

    name: str
    state: runs.State
    adapters: str
    parameters: int | None
    """Of the saved adapters; None where none are saved yet."""
    last: float | None
    """Held-out loss."""
    best: float | None
    seconds: float | None
    memory: float | None
    """GiB."""

    def cells(self) -> dict[str, str]:
        """Column -> what stands there."""
        return {
            "run": self.name,
            "state": self.state,
            "adapters": self.adapters,
            "parameters": NOTHING if self.parameters is None else f"{self.parameters:,}",
            "held-out loss": _loss(self.last),
            "best": _loss(self.best),
            "time": NOTHING if self.seconds is None else duration(self.seconds),
            "memory": NOTHING if self.memory is None else size(self.memory * GIB),
        }


def _loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def summary(name: str, folder: Path) -> Summary:
    """Reads a run's files."""
    log = runs.lines(folder)
    held_out = [line["eval/loss"] for line in log if "eval/loss" in line]
    return Summary(
        name=name,
        state=runs.standing(folder).state,
        adapters=runs.methods_of(runs.settings(folder)),
        parameters=saved_parameters(folder),
        last=held_out[-1] if held_out else None,
        best=min(held_out, default=None),
        seconds=_last(log, "train/runtime"),
        memory=_last(log, "train/peak_memory_gib"),
    )


def _last(log: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((line[key] for line in reversed(log) if key in line), None)


def saved_parameters(folder: Path) -> int | None:
    """Numbers in the adapters of a finished run; None where it has none."""
    from coadapt.formats.facts import read_facts  # imports torch, which a page does not wait for

    with suppress(ValueError, OSError):
        return sum(math.prod(shape) for a in read_facts(folder).adapters for shape in a.tensors.values()) or None
    return None


def differing(folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """Setting -> its value in each run, of those that are not the same in all."""
    flat = [dict(_flat(runs.settings(folder))) for folder in folders.values()]
    names = dict.fromkeys(name for values in flat for name in values)
    found = {name: [_shown(values.get(name)) for values in flat] for name in names if name not in ALWAYS}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(value, f"{before}{name}.") if isinstance(value, dict) else [(f"{before}{name}", value)]
    return found


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return NOTHING if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def curves(folders: Mapping[str, Path], which: str) -> Points:
    """Run -> its loss, `training` or `held out`."""
    found = {name: loss(runs.lines(folder)).get(which, []) for name, folder in folders.items()}
    return {name: thinned(points) for name, points in found.items() if points}
