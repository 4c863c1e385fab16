"""What a run has written, as points to be drawn: its loss, rates, norms, gates, memory."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coadapt.training.log import held_out_losses, values_over_steps
from coadapt.training.palette import HELD_OUT, TRAIN, adapter_colors

TRAINING, HELD = "training", "held out"
MOST = 400
"""Points of one line; of longer ones every so-manieth is shown, and the last."""

FAR = 30

Log = Sequence[Mapping[str, Any]]
Points = dict[str, list[tuple[int, float]]]
"""Name of a line -> (step, value)."""
PANELS = {
    "learning_rate": ("learning rate", True),
    "grad_norm": ("gradient norm", True),
    "update_norm": ("update norm, of one step", True),
    "gate": ("gates", False),
}
"""Figure of each adapter -> the title of its panel, and whether its axis is logarithmic."""


def loss(log: Log) -> Points:
    """Training and held-out loss; of several data sets the held-out loss of each."""
    found: Points = {TRAINING: _of(log, "train/loss"), HELD: _of(log, "eval/loss")}
    for line in log:
        for name, value in held_out_losses(line).items():
            found.setdefault(f"{HELD}: {name}", []).append((line["step"], value))
    return {name: thinned(points) for name, points in found.items() if points}


def panel(log: Log, figure: str) -> Points:
    """One figure of each adapter; where the axis is logarithmic, what is above 0."""
    found = values_over_steps(log, figure)
    if PANELS[figure][1]:
        found = {name: [(step, value) for step, value in points if value > 0] for name, points in found.items()}
    return {name: thinned(points) for name, points in found.items() if points}


def memory(log: Log) -> Points:
    """GiB, at most so far."""
    points = _of(log, "train/peak_memory_gib")
    return {"peak": thinned(points)} if points else {}


def spread(points: Points) -> bool:
    """Whether the values lie so far apart that a plain axis shows the small ones as one."""
    values = [value for line in points.values() for _, value in line]
    return bool(values) and min(values) > 0 and max(values) / min(values) > FAR


def _of(log: Log, key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in log if isinstance(line.get(key), int | float)]


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about `MOST` of the points, the last one among them."""
    every = max(len(points) // MOST, 1)
    return [*points[:-1][::every], *points[-1:]]


def colors(names: Iterable[str], adapters: Iterable[str] = ()) -> dict[str, str]:
    """Line -> its colour; an adapter has the one that it has on a terminal and in loss.png."""
    known = {TRAINING: TRAIN, HELD: HELD_OUT, "peak": TRAIN}
    return {**adapter_colors(dict.fromkeys([*adapters, *(name for name in names if name not in known)])), **known}
