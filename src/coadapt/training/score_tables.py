"""An evaluation as a person sees it: where the rows come from, a few of them with all answers, a table a metric."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from coadapt.evaluation.scoring import Score
from coadapt.training.evaluate import Result
from coadapt.training.questions import Questions

PERCENT = ("exact_match", "accuracy", "rouge1", "rouge2", "rougeL")
"""Metrics that are shares."""
SHOWN = 400
"""Characters of a prompt or an answer that are shown, at most."""


def introduction(questions: Questions) -> Iterator[Text]:
    """How many rows there are, and what is to be known of them."""
    yield Text(f"{len(questions.exam.rows):,} rows of {questions.name} ({questions.form.name})", "bold")
    for line in questions.told:
        yield Text(f"  {line}", "bold yellow" if "THESE ARE" in line else "dim")


def examples(questions: Questions, results: Sequence[Result], show: int) -> Iterator[Table]:
    """The first rows, with what everybody said; of plain text there is nothing to show."""
    exam = questions.exam
    for row in range(min(show, len(exam.rows)) if results[0].responses[0].answer is not None else 0):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", max_width=24, overflow="fold")
        table.add_column(overflow="fold")
        wanted = exam.wanted[row].strip()
        table.add_row("asked", Text(_short(exam.asked(row)), "italic"))
        table.add_row("wanted", Text(_short(wanted)))
        for result in results:
            said = (result.responses[row].answer or "").strip()
            table.add_row(Text(result.who), Text(f"{'✓' if said == wanted else '✗'} {_short(said)}"))
        yield table


def _short(text: str) -> str:
    plain = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.strip())
    return plain if len(plain) <= SHOWN else f"{plain[:SHOWN]} …"


def table(name: str, results: Sequence[Result]) -> Table:
    """The figures of one metric, each with its interval, and what can be said against the base."""
    metric = results[0].scores[name].metric
    unit = " in %" if name in PERCENT else " per token" if name == "loss" else ""
    said = name.replace("_", " ") if name in PERCENT else name
    title = f"{said}{unit}, {'more' if metric.higher_is_better else 'less'} is better"
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    shown.add_column("", overflow="fold")
    for head in ("", "95 % interval"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("against the base", no_wrap=True)
    for result in results:
        score = result.scores[name]
        found = score.estimate
        ends = f"{_number(found.low, name)} to {_number(found.high, name)}"
        against = "" if result is results[0] else _against(score, results[0].scores[name])
        shown.add_row(Text(result.who), _number(found.mean, name), ends, Text(against))
    return shown


def _against(score: Score, base: Score) -> str:
    """The difference where it can be told from chance, and otherwise only how large the chance is."""
    name, found, verdict = score.metric.name, score.less(base), score.against(base)
    ends = sorted([abs(found.low), abs(found.high)])
    if verdict == "within the spread":
        return f"{verdict} ({_signed(found.low, name)} to {_signed(found.high, name)})"
    return f"{verdict} by {_number(abs(found.mean), name)} ({' to '.join(_number(end, name) for end in ends)})"


def _number(value: float, name: str) -> str:
    """A share in per cent; anything else with four digits, the same number behind the point for like sizes."""
    if name in PERCENT:
        return f"{100 * value:.1f}"
    size = abs(value)
    if size >= 1e7:
        return f"{value:.3e}"
    return f"{value:,.{0 if size >= 1e3 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"


def _signed(value: float, name: str) -> str:
    text = _number(value, name)
    return text if value < 0 else f"+{text}"
