"""What a run has written, as points to be drawn: its loss, rates, norms, gates, memory."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coadapt.training.picture import values_over_steps
from coadapt.training.record import held_out_losses

TRAINING, HELD = "training", "held out"
MOST = 400
"""Points of one line; of longer ones every so-manieth is shown, and the last."""

Log = Sequence[Mapping[str, Any]]
Points = dict[str, list[tuple[int, float]]]
"""Name of a line -> (step, value)."""
PANELS = {
    "learning_rate": "learning rate, log10",
    "grad_norm": "gradient norm, log10",
    "update_norm": "update norm, log10",
    "gate": "gates",
}
"""Figure of each adapter -> the title of its panel. Those of adapters lie orders of magnitude apart."""


def loss(log: Log) -> Points:
    """Training and held-out loss; of several data sets the held-out loss of each."""
    found: Points = {TRAINING: _of(log, "train/loss"), HELD: _of(log, "eval/loss")}
    for line in log:
        for name, value in held_out_losses(line).items():
            found.setdefault(f"{HELD}: {name}", []).append((line["step"], value))
    return {name: thinned(points) for name, points in found.items() if points}


def panel(log: Log, figure: str) -> Points:
    """One figure of each adapter; of what is shown as a logarithm, where it is above 0."""
    found = values_over_steps(log, figure)
    if PANELS[figure].endswith("log10"):
        found = {n: [(step, math.log10(v)) for step, v in points if v > 0] for n, points in found.items()}
    return {name: thinned(points) for name, points in found.items() if points}


def memory(log: Log) -> Points:
    """GiB, at most so far."""
    points = _of(log, "train/peak_memory_gib")
    return {"peak": thinned(points)} if points else {}


def _of(log: Log, key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in log if isinstance(line.get(key), int | float)]


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about `MOST` of the points, the last one among them."""
    every = max(len(points) // MOST, 1)
    return [*points[:-1][::every], *points[-1:]]


def rows(found: Points, order: Iterable[str] = ()) -> tuple[list[int], list[float | None], list[str]]:
    """Columns of a table: steps, values, names.

    Colours go by the order of the names. Those of `order` come first, also where they have no points here, so that a
    name has one colour in all pictures.
    """
    first = min((points[0][0] for points in found.values() if points), default=0)
    places: dict[str, list[tuple[int, float | None]]] = {name: [(first, None)] for name in order}
    for name, points in found.items():
        places[name] = [*points]
    flat = [(step, value, name) for name, points in places.items() for step, value in points]
    return [f[0] for f in flat], [f[1] for f in flat], [f[2] for f in flat]
