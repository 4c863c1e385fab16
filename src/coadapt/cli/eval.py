"""`coadapt eval`: a base and its adapters side by side on the same rows, every figure with its interval."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coadapt.cli.completion import paths, words
from coadapt.cli.options import inputs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from coadapt.evaluation.scoring import Score
    from coadapt.training.evaluate import Result
    from coadapt.training.questions import Questions

KNOWN = ("exact_match", "accuracy", "perplexity", "loss", "rouge")
PERCENT = ("exact_match", "accuracy", "rouge1", "rouge2", "rougeL")
"""Metrics that are shares."""
SHOWN = 400
"""Characters of a prompt or an answer that are shown, at most."""


def _invoke(
    adapter: Path,
    model: str | None,
    adapters: tuple[str, ...],
    data: str | None,
    metric: tuple[str, ...],
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
    show: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    use_cpu: bool,
    **settings: Any,
) -> int:
    from coadapt.training.evaluate import EVALUATION, compositions, evaluate, question, report, summary, write

    if not adapter.is_dir():
        raise click.UsageError(f"There is no adapter folder {str(adapter)!r}.")
    file = adapter / EVALUATION if out is None else out
    if file.exists() and (file.is_dir() or not overwrite):
        raise click.UsageError(f"{file} is there already: choose another file with --out, or --overwrite it.")
    if not file.parent.is_dir():
        raise click.UsageError(f"--out {file}: there is no folder {file.parent}.")
    import torch

    from coadapt.cli.output import console, quiet
    from coadapt.evaluation.journal import Journal
    from coadapt.formats.files import PROVENANCE, read_json
    from coadapt.model import PeftModel
    from coadapt.training.load import load
    from coadapt.training.machine import chosen
    from coadapt.training.questions import find_rows, make_questions, run_of

    quiet()
    with inputs():
        run = run_of(adapter)
        rows = find_rows(data, run, settings)
        torch.manual_seed(42)  # a head that is new is the same one each time
        ready = load(model, adapter, device=chosen(use_cpu))
        view = ready.model
        assert isinstance(view, PeftModel)
        told = read_json(adapter / PROVENANCE) if (adapter / PROVENANCE).is_file() else {}
        questions = make_questions(
            ready,
            rows,
            run,
            settings,
            metrics=metric,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            trained_on=told.get("data", {}).get("sha256"),
        )
        who = compositions(view, adapters)
    screen = console()
    if not as_json:
        _introduce(screen, questions)
    try:
        with Journal(file, question(view, questions.exam)) as journal, _progress() as step:
            if journal.known:
                click.echo(f"Going on where an earlier try was cut off ({journal.count} answers are kept).", err=True)
            results = evaluate(view, questions.exam, who, journal, step)
            facts = {"adapter": str(adapter), "base": view.get_base_model().config.name_or_path}  # type: ignore[union-attr]
            write(file, report(questions, results, facts))
            journal.remove()
    except KeyboardInterrupt:
        click.echo("Stopped. What was answered is kept: the same command goes on from there.", err=True)
        return 1
    if as_json:
        click.echo(
            json.dumps({**facts, **summary(questions, results), "file": str(file)}, indent=2, ensure_ascii=False)
        )
        return 0
    _examples(screen, questions, results, show)
    for name in results[0].scores:
        screen.print("", _table(name, results))
    _close(screen, results, file)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, which goes when it is done; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = Console(stderr=True, highlight=False)
    if not screen.is_terminal or screen.is_dumb_terminal:
        yield lambda who, done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda who, done, total: bar.update(task, description=who, completed=done, total=total)


def _introduce(screen: "Console", questions: "Questions") -> None:
    from rich.text import Text

    many = f"{len(questions.exam.rows):,} rows of {questions.name} ({questions.form.name})"
    screen.print(Text(many, "bold"), soft_wrap=True)
    for line in questions.told:
        screen.print(Text(f"  {line}", "bold yellow" if line.isupper() else "dim"))


def _examples(screen: "Console", questions: "Questions", results: Sequence["Result"], show: int) -> None:
    """The first rows, with what everybody said; of plain text there is nothing to show."""
    from rich.table import Table
    from rich.text import Text

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
            table.add_row(result.who, Text(f"{'✓' if said == wanted else '✗'} {_short(said)}"))
        screen.print("", table)


def _short(text: str) -> str:
    plain = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.strip())
    return plain if len(plain) <= SHOWN else f"{plain[:SHOWN]} …"


def _table(name: str, results: Sequence["Result"]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    metric = results[0].scores[name].metric
    unit = " in %" if name in PERCENT else " per token" if name == "loss" else ""
    title = f"{name.replace('_', ' ')}{unit}, {'more' if metric.higher_is_better else 'less'} is better"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for head in ("", "95 % interval"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("against the base", no_wrap=True)
    for result in results:
        score = result.scores[name]
        found = score.estimate
        ends = f"{_number(found.low, name)} to {_number(found.high, name)}"
        against = "" if result is results[0] else _against(score, results[0].scores[name])
        table.add_row(Text(result.who), _number(found.mean, name), ends, Text(against))
    return table


def _against(score: "Score", base: "Score") -> str:
    """The difference where it can be told from chance, and otherwise only how large the chance is."""
    name, found, verdict = score.metric.name, score.less(base), score.against(base)
    ends = sorted([abs(found.low), abs(found.high)])
    if verdict == "within the spread":
        return f"{verdict} ({_signed(found.low, name)} to {_signed(found.high, name)})"
    return f"{verdict} by {_number(abs(found.mean), name)} ({' to '.join(_number(end, name) for end in ends)})"


def _number(value: float, name: str) -> str:
    if name in PERCENT:
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"


def _signed(value: float, name: str) -> str:
    text = _number(value, name)
    return text if value < 0 else f"+{text}"


def _close(screen: "Console", results: Sequence["Result"], file: Path) -> None:
    screen.print(f"\nEvery row, with its answers, is in {file}.", soft_wrap=True, highlight=False)


command = click.Command(
    "eval",
    callback=_invoke,
    help="""Score a base and its adapters side by side, on rows.

    \b
    coadapt eval --adapter DIR                     on the rows that its run held out
    coadapt eval --adapter DIR --data FILE --limit 200
    coadapt eval --adapter DIR --data FILE --adapters task --adapters "task + 0.5*style"
    coadapt eval --adapter DIR --data FILE --metric rouge --metric perplexity --json

    Rows are read, and put to the model, as in training. Answers are the likeliest token each time; perplexity, loss and
    accuracy are of what should have been said. Intervals are over rows; where a difference from the base is within its
    spread, nothing is claimed. An evaluation that was cut off goes on where it was. docs/evaluation.md has the rest.
    """,
    params=[
        click.Option(
            ["--adapter"],
            required=True,
            type=click.Path(path_type=Path),
            help="Folder of adapters, or of a composition.",
        ),
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder or a hub id; left out, the one that the adapter names.",
        ),
        click.Option(
            ["--adapters"],
            multiple=True,
            help="A composition to score, as in `task + 0.5*style`; may be repeated. Left out: each adapter by itself, "
            "and what was saved.",
        ),
        click.Option(
            ["--data"],
            shell_complete=paths,
            help="The rows, in any format that train reads; of a folder with a held-out part, that. Left out, the rows "
            "that the run held out.",
        ),
        click.Option(
            ["--metric"],
            multiple=True,
            shell_complete=words(KNOWN),
            help=f"{', '.join(KNOWN)}; may be repeated. Left out: exact_match and perplexity, or accuracy and loss.",
        ),
        click.Option(["--limit"], type=click.IntRange(1), help="So many rows at most, drawn (always the same ones)."),
        click.Option(["--batch-size"], type=click.IntRange(1), default=8, show_default=True, help="Rows at once."),
        click.Option(
            ["--max-new-tokens"], type=click.IntRange(1), default=128, show_default=True, help="Longest answer."
        ),
        click.Option(
            ["--max-length"], type=click.IntRange(2), help="Longest row, in tokens; left out, as in training."
        ),
        *(
            click.Option([f"--{role}-column"], help=f"Column of the {what}; left out, as in training, or found.")
            for role, what in (
                ("text", "text"),
                ("prompt", "prompts"),
                ("completion", "answers"),
                ("label", "classes"),
                ("image", "images' files"),
            )
        ),
        click.Option(["--dataset-config"], help="Configuration of a dataset of the hub."),
        click.Option(
            ["--show"], type=click.IntRange(0), default=2, show_default=True, help="So many rows with all answers."
        ),
        click.Option(
            ["--out"],
            type=click.Path(path_type=Path),
            help="File for all figures and answers (JSON); left out, evaluation.json in the adapter's folder.",
        ),
        click.Option(["--overwrite"], is_flag=True, help="Replace that file."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the figures as JSON, and nothing else."),
        click.Option(["--use-cpu"], is_flag=True, help="Do not use a GPU even if there is one."),
    ],
)
