"""What a search found, in tables and as plain values."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.table import Table
from rich.text import Text

from coadapt.formats.files import aside
from coadapt.formats.provenance import versions
from coadapt.tuning.outcome import count, pm
from coadapt.tuning.search import BEST, Search
from coadapt.tuning.spread import Spread, spread
from coadapt.tuning.studies import described, importance

FOUND = "search.json"
SHOWN = 5
"""Candidates in the table."""


def held_out(found: Search) -> Spread | None:
    """The score of the best on the held-out rows; None where that training failed."""
    result = found.held_out
    return None if result is None or not result.values else spread(result.values, result.weights)


def ranked(found: Search) -> list[FrozenTrial]:
    """All that came to their end, the best score first."""
    sign = -1 if found.ground.metric.higher_is_better else 1
    at = found.config.objectives.index(found.config.score)
    return sorted(found.trials(TrialState.COMPLETE), key=lambda t: (sign * t.values[at], t.number))


def tell(found: Search) -> Iterable[Table | Text]:
    """What is printed at the end."""
    several = len(found.config.objectives) > 1
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in found.config.objectives:
        shown.add_column(name, justify="right", no_wrap=True)
    if "parameters" not in found.config.objectives:
        shown.add_column("trains", justify="right", no_wrap=True)
    shown.add_column("best compromises" if several else "best candidates", overflow="fold")
    for trial in (found.front if several else ranked(found))[:SHOWN]:
        values = [f"{value:.5g}" for value in trial.values]
        size = [] if "parameters" in found.config.objectives else [count(trial.user_attrs["parameters"])]
        shown.add_row(*values, *size, described(trial.params))
    yield Text("")
    yield shown
    states = [t.state for t in found.trained]
    given_up = states.count(TrialState.PRUNED)
    refused = sum("refused" in t.user_attrs for t in found.trials())
    yield Text(
        f"{len(states)} candidates trained for {found.ground.steps} steps, {given_up} of them given up before; "
        f"{refused} not trained (too large, or impossible). Judged by {found.ground.rows['validation']} rows.",
        "dim",
    )
    if weighed := importance(found.study, found.config):
        yield Text("\nwhat mattered, within its group:", "bold")
        for name, share in sorted(weighed.items(), key=lambda item: (item[0].partition(".")[0], -item[1])):
            yield Text(f"  {name:<28}{share:>5.0%}  {'█' * round(share * 30)}")
    yield Text("")
    yield Text(_scored(found))
    yield Text(f"\nTrain the best: coadapt train --config {found.config.out / BEST} --output-dir DIR")


def _scored(found: Search) -> str:
    best = found.front[0]
    score = held_out(found)
    name, rows = found.ground.metric.name.replace("_", " "), found.ground.rows["held-out"]
    if score is None:
        why = found.held_out.failed if found.held_out else None
        return f"The best (trial {best.number}) failed with another seed: {why}"
    return (
        f"The best (trial {best.number}), trained with another seed: {name} {pm(score)} on {rows} held-out rows that "
        "no candidate was judged by (one seed: the interval is that of the rows)."
    )


def plain(found: Search) -> dict[str, Any]:
    """All of it as plain values."""
    score = held_out(found)
    return {
        "objectives": found.config.objectives,
        "steps": found.ground.steps,
        "rows": dict(found.ground.rows),
        "best": found.front[0].number,
        "front": [trial.number for trial in found.front],
        "held_out": None if score is None else {"mean": score.mean, "low": score.low, "high": score.high},
        "importance": importance(found.study, found.config),
        "trials": [
            {
                "number": t.number,
                "state": t.state.name.lower(),
                "values": None if t.values is None else list(t.values),
                "params": dict(t.params),
                **{
                    k: v
                    for k, v in t.user_attrs.items()
                    if k in ("parameters", "seconds", "refused", "failed", "group")
                },
            }
            for t in found.trials()
        ],
        "settings": found.config.plain(),
        "versions": versions("optuna", "accelerate", "datasets", "tokenizers"),
    }


def write(found: Search, out: Path) -> None:
    """search.json."""
    with aside(out / FOUND) as file:
        file.write_text(json.dumps(plain(found), indent=1, ensure_ascii=False) + "\n", "utf-8")
