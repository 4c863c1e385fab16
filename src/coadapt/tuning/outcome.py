"""What a comparison came to: each method's score and cost with their spread, and who is behind whom."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from coadapt.evaluation.metrics import Metric
from coadapt.formats.files import aside
from coadapt.formats.provenance import versions
from coadapt.training.settings import RunConfig
from coadapt.training.units import size
from coadapt.tuning.plan import CompareConfig
from coadapt.tuning.spread import LEVEL, Scored, Spread, Verdict, verdicts
from coadapt.tuning.trial import Result

RESULTS = "results.json"
COSTS: Mapping[str, str] = {
    "parameters": "parameters that train",
    "peak_bytes": "memory of a step",
    "seconds_per_step": "time of a step",
    "latency": "time of an answer, in times of the base's",
}
"""Figure -> what it is; less is better."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A candidate and all of its trainings."""

    name: str
    run: RunConfig
    """With its default rates."""
    parameters: int
    total: int
    steps: int
    tuned: Mapping[float, Result]
    """What the rates were multiplied by -> the training that tried it."""
    chosen: float
    repeats: Mapping[int, Result]
    """Seed -> the training that was scored."""

    @property
    def good(self) -> dict[int, Result]:
        """The repeats that came to something."""
        return {seed: one for seed, one in self.repeats.items() if not one.failed}

    @property
    def failed(self) -> dict[str, str]:
        """Which training failed -> why."""
        tuned = {f"rates x {factor:.3g}": one.failed for factor, one in self.tuned.items()}
        repeats = {f"seed {seed}": one.failed for seed, one in self.repeats.items()}
        return {what: why for what, why in (tuned | repeats).items() if why}

    @property
    def rates(self) -> dict[str, float]:
        """Adapter -> the rate that was chosen."""
        return {name: rate * self.chosen for name, rate in self.run.peak_rates().items()}

    @property
    def at_edge(self) -> bool:
        """Whether the best rate was the largest or the smallest that was tried, so that a better one may be beyond."""
        return len(self.tuned) > 1 and self.chosen in (min(self.tuned), max(self.tuned))

    def scored(self) -> Scored | None:
        """The score of each seed and row; None where no training came to its end."""
        runs = [(seed, one) for seed, one in self.good.items() if one.values]
        if not runs:
            return None
        return Scored(
            values=np.asarray([one.values for _, one in runs], dtype=np.float64),
            weights=np.asarray(runs[0][1].weights, dtype=np.float64),
            seeds=tuple(seed for seed, _ in runs),
        )

    def cost(self, figure: str) -> "Figure | None":
        """A cost over the repeats; None where it was not measured."""
        if figure == "parameters":
            return Figure(mean=self.parameters, deviation=0.0)
        found = [value for one in self.good.values() if (value := _cost(one, figure)) is not None]
        if not found:
            return None
        return Figure(mean=statistics.fmean(found), deviation=statistics.stdev(found) if len(found) > 1 else None)


def _cost(one: Result, figure: str) -> float | None:
    if figure == "latency":
        return None if one.latency is None or not one.base_latency else one.latency / one.base_latency
    return getattr(one, figure)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A mean over seeds, and the standard deviation; None where there was one seed."""

    mean: float
    deviation: float | None

    def shown(self, write: Callable[[float], str]) -> str:
        """`12.3 ms ± 0.4 ms`, without the second where it is nothing."""
        return write(self.mean) + (f" ± {write(self.deviation)}" if self.deviation else "")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A comparison with all of its results."""

    config: CompareConfig
    metric: Metric
    """The score."""
    rows: Mapping[str, int]
    """Part of the data -> its examples."""
    entrants: Sequence[Entrant]

    @cached_property
    def scored(self) -> dict[str, Scored]:
        """Of the candidates of which a training came to its end."""
        return {one.name: scored for one in self.entrants if (scored := one.scored()) is not None}

    @property
    def score(self) -> str:
        """The name of the score."""
        return self.metric.name.replace("_", " ")

    @cached_property
    def judged(self) -> tuple[str, dict[str, Verdict]]:
        """(the best mean, each one's verdict, the best first)"""
        return verdicts(self.scored, self.metric.higher_is_better)

    def entrant(self, name: str) -> Entrant:
        return next(one for one in self.entrants if one.name == name)

    @property
    def seeds(self) -> int:
        return self.config.seeds


def sentences(found: Compared) -> list[str]:
    """What may be said of the results, and what may not."""
    best, told = found.judged
    score = told[best].score
    said = [f"{best} has the best mean: {found.score} {pm(score)}."]
    others = [name for name in told if name != best]
    worse = [name for name in others if (gap := told[name].behind) is not None and gap.clear]
    alike = [name for name in others if name not in worse]
    if found.seeds == 1 and others:
        said.append("One seed tells nothing of how another would do, so no method is called better than another.")
    else:
        if worse:
            said.append(f"Clearly behind it: {', '.join(worse)}.")
        if alike:
            said.append(
                f"Not told apart from it by {found.seeds} seeds and {found.rows['held-out']} rows: {', '.join(alike)}."
            )
    edges = [one.name for one in found.entrants if one.at_edge]
    if edges:
        said.append(
            f"The best rate was the smallest or the largest that was tried, and a better one may be beyond: "
            f"{', '.join(edges)}."
        )
    said += [f"{one.name} failed with {what}: {why}" for one in found.entrants for what, why in one.failed.items()]
    return said


def pm(found: Spread) -> str:
    """`1.234 ± 0.012`, with two digits of the second."""
    half = (found.high - found.low) / 2
    digits = max(0, min(6, 1 - int(np.floor(np.log10(half))))) if half > 0 else 4
    return f"{found.mean:.{digits}f} ± {half:.{digits}f}"


def verdict_word(one: Verdict) -> str:
    """Behind, or not told apart."""
    if one.behind is None:
        return ""
    return "behind" if one.behind.clear else "not told apart"


def duration(seconds: float) -> str:
    """`12.3 ms` or `1.23 s`."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def count(number: float) -> str:
    """`1.2K`, `3.4M`."""
    for least, sign in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= least:
            return f"{number / least:.3g}{sign}"
    return f"{number:.0f}"


WRITE: Mapping[str, Callable[[float], str]] = {
    "parameters": count,
    "peak_bytes": size,
    "seconds_per_step": duration,
    "latency": lambda ratio: f"{ratio:.2f}",
}
"""Cost -> how it is written."""


def table(found: Compared) -> Table:
    """One line for each method, the best first; fits into 80 columns."""
    best, told = found.judged
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("method", overflow="fold", max_width=16)
    for title in (found.score, "behind", "trains", "memory", "step", "answer"):
        shown.add_column(title, justify="right", no_wrap=title != "behind")
    for name, one in told.items():
        costs = [(figure, found.entrant(name).cost(figure)) for figure in COSTS]
        gap = "best mean" if one.behind is None else pm(one.behind)
        style = "bold" if name == best else "" if one.behind is not None and one.behind.clear else "bold dim"
        shown.add_row(name, pm(one.score), gap, *(WRITE[f](c.mean) if c else "-" for f, c in costs), style=style)
    return shown


def tell(found: Compared) -> Iterable[Table | Text]:
    """What is printed at the end."""
    yield Text("")
    yield table(found)
    yield Text(
        f"{LEVEL:.0%} intervals over {found.seeds} seeds and {found.rows['held-out']} held-out rows; behind: row by "
        "row and seed by seed, all of them together. Answer: of a batch, in times of the base's.",
        "dim",
    )
    yield Text("")
    for line in sentences(found):
        yield Text(line)


def plain(found: Compared) -> dict[str, Any]:
    """All of it as plain values."""
    best, told = found.judged if found.scored else ("", {})
    return {
        "score": found.score,
        "higher_is_better": found.metric.higher_is_better,
        "best_mean": best,
        "level": LEVEL,
        "rows": dict(found.rows),
        "seeds": found.seeds,
        "sentences": sentences(found) if found.scored else [],
        "methods": [_plain(one, told.get(one.name)) for one in found.entrants],
        "settings": found.config.plain(),
        "versions": versions("accelerate", "datasets", "tokenizers"),
    }


def _plain(one: Entrant, verdict: Verdict | None) -> dict[str, Any]:
    costs = {figure: None if (cost := one.cost(figure)) is None else asdict(cost) for figure in COSTS}
    return {
        "name": one.name,
        "score": None if verdict is None else asdict(verdict.score),
        "behind": None if verdict is None or verdict.behind is None else asdict(verdict.behind),
        "clearly_behind": bool(verdict and verdict.behind and verdict.behind.clear),
        "costs": costs,
        "parameters_of": one.total,
        "steps": one.steps,
        "rates": one.rates,
        "rate_factor": one.chosen,
        "rate_at_edge": one.at_edge,
        "tuned": {f"{factor:.6g}": result.validation_loss for factor, result in one.tuned.items()},
        "validation": {str(seed): result.curve for seed, result in one.repeats.items()},
        "failed": one.failed,
    }


def write_results(found: Compared, out: Path) -> None:
    """results.json."""
    with aside(out / RESULTS) as file:
        file.write_text(json.dumps(plain(found), indent=1, ensure_ascii=False) + "\n", "utf-8")
