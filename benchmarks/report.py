"""Figures, the rows of the table, and how they are written."""

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

RATIO, SECONDS, BYTES, COUNT = "ratio", "s", "B", "count"
"""Units of figures."""
SCALES: dict[str, Sequence[tuple[float, str]]] = {
    SECONDS: ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    BYTES: ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")),
}


@dataclass(frozen=True)
class Figure:
    """One value for each round, or one that needs no second (bytes, graphs)."""

    values: Sequence[float]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def __str__(self) -> str:
        if len(self.values) == 1:
            return shown(self.median, self.unit)
        low, high = (shown(value, self.unit, self.median) for value in self.quartiles)
        return f"{shown(self.median, self.unit)} ({low.split()[0]} .. {high.split()[0]})"


def shown(value: float, unit: str, like: float | None = None) -> str:
    """A value in the scale that suits it, or that suits another, `like`."""
    if unit == RATIO:
        return f"{value:.2f}"
    if unit == COUNT:
        return f"{value:g}"
    size = abs(value if like is None else like)
    factor, name = next((s for s in SCALES[unit] if size >= s[0]), SCALES[unit][-1])
    return f"{value / factor:.3g} {name}" if abs(value / factor) < 100 else f"{value / factor:.0f} {name}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    number: str
    what: str
    base: Figure | None
    """What is compared with, absolutely."""
    peft: Figure | str
    """Or why there is none."""
    coadapt: Figure
    goal: float | None = None
    """At most so much, in coadapt's unit."""

    @property
    def reached(self) -> str:
        """Whether the figure, as it is shown, is not above the goal."""
        if self.goal is None:
            return ""
        digits = 2 if self.coadapt.unit == RATIO else 9
        return "yes" if round(self.coadapt.median, digits) <= round(self.goal, digits) else "no"

    def no_more_than_peft(self) -> "Row":
        """The row with peft's figure as the goal, where there is one."""
        return replace(self, goal=self.peft.median) if isinstance(self.peft, Figure) else self

    def cells(self) -> list[str]:
        base = "" if self.base is None else str(self.base)
        goal = "" if self.goal is None else f"≤ {shown(self.goal, self.coadapt.unit)}"
        return [self.number, self.what, base, str(self.peft), str(self.coadapt), goal, self.reached]

    def as_json(self) -> dict[str, Any]:
        figures = {"base": self.base, "peft": self.peft, "coadapt": self.coadapt}
        return {
            "number": self.number,
            "what": self.what,
            **{name: _json(figure) if isinstance(figure, Figure) else figure for name, figure in figures.items()},
            "goal": self.goal,
            "reached": self.reached,
        }


def _json(figure: Figure) -> dict[str, Any]:
    low, high = figure.quartiles
    return {"unit": figure.unit, "median": figure.median, "quartiles": [low, high], "rounds": list(figure.values)}


Found = Mapping[str, Sequence[float]]
"""What was found for "coadapt", for "peft" where it can do the thing, and for what they are compared with."""


def absolute(
    number: str,
    what: str,
    found: Found,
    unit: str,
    goal: float | None = None,
    *,
    base: str = "base",
    without: str = "none",
) -> Row:
    """A row of figures as they are.

    Args:
        base: what stands beside them in `found`, if that is there.
        without: what stands in peft's place where it has no figure.
    """
    figures = {name: Figure(values, unit) for name, values in found.items()}
    return Row(number, what, figures.get(base), figures.get("peft", without), figures["coadapt"], goal)


def ratio(
    number: str,
    what: str,
    found: Found,
    goal: float | None = None,
    *,
    base: str = "limit",
    unit: str = SECONDS,
    without: str = "none",
) -> Row:
    """A row of figures over that of `base` in the same round."""
    below = found[base]
    ratios = {
        name: [a / b for a, b in zip(found[name], below, strict=True)] for name in ("peft", "coadapt") if name in found
    }
    row = absolute(number, what, ratios, RATIO, goal, without=without)
    return replace(row, base=Figure(below, unit))


HEAD = ("", "measured", "limit or base", "peft", "coadapt", "goal", "reached")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device: str = "cpu") -> str:
    """What a measurement ran on."""
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()}), {_plural(torch.get_num_threads(), 'thread')}"
    return cores if device == "cpu" else f"{torch.cuda.get_device_name()}, {cores}"


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"
