"""`coadapt eval`: a base and its adapters side by side on the same rows, every figure with its interval."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from coadapt.cli.completion import paths, words
from coadapt.cli.options import inputs

if TYPE_CHECKING:
    from rich.console import Console

    from coadapt.evaluation.journal import Journal
    from coadapt.model import PeftModel
    from coadapt.training.evaluate import Result, Step
    from coadapt.training.load import Ready
    from coadapt.training.questions import Rows

KNOWN = ("exact_match", "accuracy", "perplexity", "loss", "rouge")
ABOUT_ROWS = (
    *("data", "metric", "max_new_tokens", "max_length", "dataset_config", "show"),
    *("text_column", "prompt_column", "completion_column", "label_column", "image_column", "task_column", "task"),
)
"""Options without a meaning for tasks of lm_eval."""


def _invoke(
    adapter: Path,
    model: str | None,
    adapters: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    use_cpu: bool,
    tasks: tuple[str, ...],
    **options: Any,
) -> int:
    if tasks:
        _refuse_beside_tasks()
    file = _place(adapter, out, overwrite)
    import torch

    from coadapt.cli.output import quiet
    from coadapt.model import PeftModel
    from coadapt.training.evaluate import compositions
    from coadapt.training.load import load
    from coadapt.training.machine import chosen
    from coadapt.training.questions import find_rows, run_of

    quiet()
    with inputs():
        run = run_of(adapter)
        rows = None if tasks else find_rows(options["data"], run, options)
        torch.manual_seed(42)  # a head that is new is the same one each time
        ready = load(model, adapter, device=chosen(use_cpu))
        view: Any = ready.model
        assert isinstance(view, PeftModel)
        who = compositions(view, adapters)
        facts = {"adapter": str(adapter), "base": getattr(view.get_base_model().config, "name_or_path", None)}
        work = _Tasks(ready, tasks, options) if rows is None else _Rows(ready, rows, run, adapter, options)
    try:
        done = _done(work, view, who, file, facts, quiet=as_json)
    except KeyboardInterrupt:
        click.echo("Stopped. What was answered is kept: the same command goes on from there.", err=True)
        return 1
    if as_json:
        click.echo(json.dumps({**done, "file": str(file)}, indent=2, ensure_ascii=False))
    return 0


def _refuse_beside_tasks() -> None:
    """Raises UsageError for options that are about rows, which tasks of lm_eval bring themselves."""
    context = click.get_current_context()
    options = [p for p in context.command.params if p.name in ABOUT_ROWS]
    if beside := [
        p.opts[0] for p in options if context.get_parameter_source(str(p.name)) is ParameterSource.COMMANDLINE
    ]:
        raise click.UsageError(
            f"{', '.join(beside)} has no effect beside --lm-eval, whose tasks have rows of their own."
        )


def _place(adapter: Path, out: Path | None, overwrite: bool) -> Path:
    """The file to write. Raises UsageError where it cannot be."""
    from coadapt.training.log import EVALUATION

    if not adapter.is_dir():
        raise click.UsageError(f"There is no adapter folder {str(adapter)!r}.")
    file = adapter / EVALUATION if out is None else out
    if file.exists() and (file.is_dir() or not overwrite):
        raise click.UsageError(f"{file} is there already: choose another file with --out, or --overwrite it.")
    if not file.parent.is_dir():
        raise click.UsageError(f"--out {file}: there is no folder {file.parent}.")
    return file


def _done(
    work: "_Rows | _Tasks", view: "PeftModel", who: Mapping[str, Any], file: Path, facts: Mapping[str, Any], quiet: bool
) -> dict[str, Any]:
    """Asks, writes the file, shows the tables; what was written, less the single rows."""
    from coadapt.cli.output import console
    from coadapt.evaluation.journal import Journal
    from coadapt.training.evaluate import SCHEMA, write
    from coadapt.training.score_tables import table

    screen = console()
    if not quiet:
        work.introduce(screen)
    with Journal(file, work.question(view)) as journal:
        if journal.count:
            click.echo(f"Going on where an earlier try was cut off ({journal.count} answers are kept).", err=True)
        with _progress() as step:
            results = work.run(view, who, journal, step)
        found = {**facts, **work.summary(results)}
        write(file, {"schema": SCHEMA, **found, **work.rows(results)})
        journal.remove()
    if not quiet:
        work.examples(screen, results)
        for name in results[0].scores:
            screen.print("", table(name, results))
        screen.print(f"\n{work.closing} {file}.", soft_wrap=True, highlight=False)
    return found


class _Rows:
    """Rows of the user's, or of the run."""

    closing = "Every row, with its answers, is in"

    def __init__(
        self, ready: "Ready", rows: "Rows", run: Mapping[str, Any], adapter: Path, options: Mapping[str, Any]
    ) -> None:
        from coadapt.formats.files import PROVENANCE, read_json
        from coadapt.training.questions import make_questions

        told = read_json(adapter / PROVENANCE) if (adapter / PROVENANCE).is_file() else {}
        self.show = options["show"]
        self.questions = make_questions(
            ready,
            rows,
            run,
            options,
            metrics=options["metric"],
            limit=options["limit"],
            batch_size=options["batch_size"],
            max_new_tokens=options["max_new_tokens"],
            trained_on=told.get("data", {}).get("sha256"),
        )

    def question(self, view: "PeftModel") -> str:
        from coadapt.training.evaluate import question

        return question(view, self.questions.exam)

    def run(self, view: "PeftModel", who: Mapping[str, Any], journal: "Journal", step: "Step") -> list["Result"]:
        from coadapt.training.evaluate import evaluate

        return evaluate(view, self.questions.exam, who, journal, step)

    def summary(self, results: Sequence["Result"]) -> dict[str, Any]:
        from coadapt.training.evaluate import summary

        return summary(self.questions, results)

    def rows(self, results: Sequence["Result"]) -> dict[str, Any]:
        from coadapt.training.evaluate import rows

        return {"rows": list(rows(self.questions.exam, results))}

    def introduce(self, screen: "Console") -> None:
        from coadapt.training.score_tables import introduction

        for line in introduction(self.questions):
            screen.print(line, soft_wrap=True)

    def examples(self, screen: "Console", results: Sequence["Result"]) -> None:
        from coadapt.training.score_tables import examples

        for table in examples(self.questions, results, self.show):
            screen.print("", table)


class _Tasks:
    """Tasks of lm_eval."""

    closing = "The value of every row is in"

    def __init__(self, ready: "Ready", tasks: Sequence[str], options: Mapping[str, Any]) -> None:
        from coadapt.training.harness import Harness

        self.tasks = list(tasks)
        self.harness = Harness(ready, tasks, limit=options["limit"], batch_size=options["batch_size"])

    def question(self, view: "PeftModel") -> str:
        return self.harness.question(view)

    def run(self, view: "PeftModel", who: Mapping[str, Any], journal: "Journal", step: "Step") -> list["Result"]:
        return self.harness.run(view, who, journal, step)

    def summary(self, results: Sequence["Result"]) -> dict[str, Any]:
        from coadapt.training.evaluate import figures_of

        return {"lm_eval": {"tasks": self.tasks, "limit": self.harness.limit}, **figures_of(results)}

    def rows(self, results: Sequence["Result"]) -> dict[str, Any]:
        return {
            "values": {one.who: {name: score.values.tolist() for name, score in one.scores.items()} for one in results}
        }

    def introduce(self, screen: "Console") -> None:
        screen.print(f"lm_eval: {', '.join(self.tasks)}", markup=False)

    def examples(self, screen: "Console", results: Sequence["Result"]) -> None:
        """There are none: the tasks' own files are what tells of their rows."""


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


command = click.Command(
    "eval",
    callback=_invoke,
    help="""Score a base and its adapters side by side, on rows.

    \b
    coadapt eval --adapter DIR                on the rows that its run held out
    coadapt eval --adapter DIR --data FILE --limit 200
    coadapt eval --adapter DIR --adapters task --adapters "task + 0.5*style"
    coadapt eval --adapter DIR --data FILE --metric rouge --metric loss --json
    coadapt eval --adapter DIR --lm-eval hellaswag --limit 200

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
        click.Option(
            ["--lm-eval", "tasks"],
            multiple=True,
            metavar="TASK",
            help="Instead of rows, a task of lm-evaluation-harness, or the YAML file of one; may be repeated.",
        ),
        click.Option(
            ["--limit"],
            type=click.IntRange(1),
            help="So many rows at most, drawn, and always the same ones (of a task the first ones).",
        ),
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
        click.Option(
            ["--task-column"],
            help="Column of each row's task, where adapters tell tasks apart; left out, as in training, or `task_ids`.",
        ),
        click.Option(["--task"], metavar="TASK", help="The task of all rows, by its name or number, in its place."),
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
