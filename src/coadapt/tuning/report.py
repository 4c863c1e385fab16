"""The report of a comparison: one HTML file that needs no network and no other file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from coadapt.formats.files import aside
from coadapt.formats.provenance import versions
from coadapt.tuning.outcome import (
    COSTS,
    WRITE,
    Compared,
    Entrant,
    duration,
    pm,
    sentences,
    verdict_word,
    write_results,
)
from coadapt.tuning.pictures import against_costs, learning_curves, rates_tried, svg
from coadapt.tuning.spread import LEVEL

REPORT = "report.html"


def write(found: Compared, out: Path) -> None:
    """results.json and report.html.

    Raises:
        RuntimeError: every training failed; says why. The first of the two files is written all the same.
    """
    write_results(found, out)
    if not found.scored:
        why = "\n".join(
            f"  {one.name}, {what}: {reason}" for one in found.entrants for what, reason in one.failed.items()
        )
        raise RuntimeError(f"Every training failed, so that there is nothing to compare:\n{why}")
    with aside(out / REPORT) as file:
        file.write_text(page(found), "utf-8")


def page(found: Compared) -> str:
    """The whole page."""
    run = found.entrants[0].run
    data = found.config.settings.get("data", run.data)
    parts = [
        f"<h1>{escape(Path(run.model).name)} on {escape(Path(str(data)).name)}</h1>",
        f'<p class="lead">{_lead(found)}</p>',
        *(f"<p>{escape(line)}</p>" for line in sentences(found)),
        _methods(found),
        f'<p class="note">{_note(found)}</p>',
        *_pictures(found),
        _trainings(found),
        _settings(found),
    ]
    title = f"{Path(run.model).name}: methods compared"
    return _PAGE.format(title=escape(title), body="\n".join(parts))


def _lead(found: Compared) -> str:
    each = {one.steps for one in found.entrants}
    budget = (
        f"{next(iter(each)):,} steps" if len(each) == 1 else f"{found.config.limit} ({min(each):,} to {max(each):,})"
    )
    rates = f"{found.config.rates} rates tried for each, " if found.config.rates > 1 else ""
    return (
        f"{len(found.entrants)} methods and mixes, {budget} for each training, {rates}then {found.seeds} seeds. "
        f"{found.rows['train']:,} rows to train on, {found.rows['validation']:,} to choose by, "
        f"{found.rows['held-out']:,} scored once at the end."
    )


def _note(found: Compared) -> str:
    better = "more is better" if found.metric.higher_is_better else "less is better"
    unit = "in nats per trained token, " if found.metric.name == "loss" else ""
    what = f"The score is the held-out rows' {found.score} ({unit}{better})"
    return (
        f"{what}, with {LEVEL:.0%} intervals over seeds and rows. "
        "How much a method is behind the best mean is measured row by row and seed by seed; these intervals hold all "
        "together. "
        "Memory is the most that one step holds, base and optimiser among it; time is of a step, without evaluations; "
        "an answer is a batch through the adapted model, in times of the base's. ± behind a cost is the standard "
        "deviation over seeds."
    )


def _methods(found: Compared) -> str:
    best, told = found.judged
    head = ["method", found.score, "behind the best", "", *COSTS.values(), "rates"]
    rows: list[Sequence[str]] = []
    for name, one in told.items():
        entrant = found.entrant(name)
        costs = [(figure, entrant.cost(figure)) for figure in COSTS]
        rates = ", ".join(f"{adapter} {rate:.2g}" for adapter, rate in entrant.rates.items())
        shown = [c.shown(WRITE[figure]) if c else "-" for figure, c in costs]
        shown[0] += f" ({entrant.parameters / entrant.total:.2%})"
        gap = "" if one.behind is None else pm(one.behind)
        edge = " (at the edge)" if entrant.at_edge else ""
        rows.append(
            [name, pm(one.score), gap, "best mean" if name == best else verdict_word(one), *shown, rates + edge]
        )
    return _table(head, rows)


def _pictures(found: Compared) -> Iterable[str]:
    curves, tried = learning_curves(found), rates_tried(found)
    yield "<h2>What the score costs</h2>"
    yield _picture(against_costs(found), "score against each cost")
    yield (
        '<p class="note">Bars are the intervals of the table. The grey line joins the means that no other mean beats '
        "at the same cost or less (Pareto's front). Hollow: clearly behind another method that costs no more.</p>"
    )
    yield "<h2>How they learn</h2>"
    yield _picture(curves, "validation loss over steps")
    yield f'<p class="note">Mean of {found.seeds} seeds; the band goes from the least to the most of them.</p>'
    if tried is not None:
        yield "<h2>The rates that were tried</h2>"
        yield _picture(tried, "validation loss of each rate")
        yield (
            '<p class="note">One training for each, with a seed that is scored nowhere; filled: the one that was kept. '
            "Of a mix all rates are multiplied alike.</p>"
        )


def _picture(figure: Figure, what: str) -> str:
    data = base64.b64encode(svg(figure).encode()).decode()
    return f'<img alt="{escape(what)}" src="data:image/svg+xml;base64,{data}">'


def _trainings(found: Compared) -> str:
    head = ["method", "rates", "seed", "steps", "validation loss", found.score, "time of a step", "memory"]
    rows = [row for one in found.entrants for row in _trainings_of(one)]
    return f"<details><summary>All {len(rows)} trainings</summary>{_table(head, rows)}</details>"


def _trainings_of(one: Entrant) -> Iterable[Sequence[str]]:
    scored = one.scored()
    tuned = [(f"x {factor:.3g}", str(one.run.seed), result) for factor, result in one.tuned.items()]
    repeats = [(f"x {one.chosen:.3g}", str(seed), result) for seed, result in one.repeats.items()]
    for factor, seed, result in (*tuned, *repeats):
        if result.failed:
            yield [one.name, factor, seed, "failed", result.failed, "", "", ""]
            continue
        score = "-"
        if scored is not None and result.values and int(seed) in scored.seeds:
            values = scored.values[scored.seeds.index(int(seed))]
            score = f"{float((values * scored.weights).sum() / scored.weights.sum()):.4f}"
        loss = "-" if result.validation_loss is None else f"{result.validation_loss:.4f}"
        time = "-" if result.seconds_per_step is None else duration(result.seconds_per_step)
        memory = "-" if result.peak_bytes is None else WRITE["peak_bytes"](result.peak_bytes)
        yield [one.name, factor, seed, f"{result.steps:,}", loss, score, time, memory]


def _settings(found: Compared) -> str:
    options = [
        (one.name, f"{name}: {a.method}", ", ".join(f"{k}={v}" for k, v in a.options.items()))
        for one in found.entrants
        for name, a in one.run.adapters.items()
    ]
    told = {**found.config.plain(), **found.config.settings}
    rows = [(name, str(value)) for name, value in told.items() if name != "settings" and value not in (None, {}, [])]
    rows += [
        (f"version of {name}", str(value)) for name, value in versions("accelerate", "datasets", "tokenizers").items()
    ]
    return (
        "<details><summary>Settings and versions</summary>"
        f"{_table(['setting', 'value'], rows)}{_table(['method', 'adapter', 'options'], options)}</details>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(word)}</th>" for word in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0.3rem; }}
h2 {{ font-size: 1.1rem; margin-top: 2.2rem; }}
p {{ margin: 0.4rem 0; }}
.lead, .note {{ color: #666; }}
.note {{ font-size: 0.86rem; }}
.wide {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; width: 100%; }}
th {{ text-align: left; font-weight: 600; color: #666; border-bottom: 1px solid #bbb; vertical-align: bottom; }}
th, td {{ padding: 0.3rem 0.7rem 0.3rem 0; }}
td {{ border-bottom: 1px solid #eee; vertical-align: top; }}
td:first-child {{ font-weight: 600; }}
img {{ width: 100%; height: auto; }}
details {{ margin: 1.5rem 0; }}
summary {{ cursor: pointer; }}
</style>
{body}
</html>
"""
