"""The rows that an adapter is evaluated on, made as those that it was trained on."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from coadapt.data.by_task import TASK, Tasks, number_of
from coadapt.data.columns import Format
from coadapt.data.images import ImageCollator, prepare_images
from coadapt.data.prepare import CLASSIFYING, Plan, Prepared, column_kinds, dropped, plan, prepare, split_rows
from coadapt.data.source import Source, fingerprint, read
from coadapt.data.tokens import Example
from coadapt.evaluation.exam import Exam, virtual_tokens
from coadapt.evaluation.metrics import chosen
from coadapt.model import PeftModel
from coadapt.training.assemble import USUAL_LENGTH, load_config, positions
from coadapt.training.datasets import DatasetSettings
from coadapt.training.load import Ready, tasks_told
from coadapt.training.log import RUN
from coadapt.training.material import columns

COLUMNS = ("text_column", "prompt_column", "completion_column", "label_column", "image_column")
DRAW = 42
"""The seed of the rows that a limit leaves."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """An exam, and what is to be said about its rows."""

    exam: Exam
    name: str
    """Of the data."""
    fingerprint: str
    """SHA-256 of the rows that were read."""
    form: Format
    told: Sequence[str]
    """Where the rows come from, what was left out, and what makes the scores mean less than they seem to."""


def run_of(adapter: Path) -> Mapping[str, Any]:
    """The settings of the run that wrote an adapter folder, or a checkpoint or an adapter inside of one; none: {}."""
    for file in (adapter / RUN, adapter.resolve().parent / RUN):
        if file.is_file():
            found = yaml.safe_load(file.read_text("utf-8"))
            return found if isinstance(found, dict) else {}
    return {}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as they were read, before they are recognised."""

    source: Source
    held_out: Source | None = None
    share: float = 0.0
    """Of them, as the run held it out; 0: all of them are asked."""
    own: bool = False
    """Whether they are the run's, of which the held-out ones are asked."""


def find_rows(data: str | None, run: Mapping[str, Any], settings: Mapping[str, Any]) -> Rows:
    """The rows of `data`, or those that the run held out.

    Raises:
        ValueError: there is nothing to ask.
        FileNotFoundError: a file is not there.
    """
    if data is not None:
        return Rows(source=read(data, settings.get("dataset_config")))
    if not run.get("data"):
        several = ", ".join(str(one.get("data")) for one in (run.get("datasets") or {}).values())
        why = f"the run had several data sets ({several})" if several else "the folder names no data of its own"
        raise ValueError(f"Which rows? Give --data FILE: {why}.")
    config = run.get("dataset_config")
    held_out = read(str(run["eval_data"]), config) if run.get("eval_data") else None
    return Rows(
        source=read(str(run["data"]), config), held_out=held_out, share=float(run.get("eval_split") or 0.0), own=True
    )


def make_questions(
    ready: Ready,
    rows: Rows,
    run: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    metrics: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    trained_on: str | None = None,
) -> Questions:
    """The rows as the model of `ready` is asked them: with the prompts and the masks of its training.

    Args:
        settings: columns and `max_length`, where they are said; otherwise the run's hold, or they are found.
        limit: so many rows at most, drawn.
        trained_on: the fingerprint of the rows of the training, if it is known.

    Raises:
        ValueError: the rows fit the model's task in no known way, or none of them can be asked.
    """
    view, task = ready.model, ready.task
    assert isinstance(view, PeftModel)
    made, found, notes = _prepared(ready, rows, run, settings, limit)
    examples: Sequence[Example] = [dict(row) for row in made.train]  # type: ignore[arg-type]
    asks = task == "seq2seq" or (found.form.kind != "text" and run.get("completion_only_loss") is not False)
    text = isinstance(ready.processor, PreTrainedTokenizerBase)
    exam = Exam(
        rows=examples,
        task=task,
        metrics=chosen(metrics, task, asks),
        tokenizer=ready.tokenizer if text else None,
        collate=None if text else ImageCollator(processor=ready.image_processor),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        room=_room(ready, view) if text else None,
        classes=_classes(ready) if task in CLASSIFYING else (),
    )
    told = [*notes, *_told(ready, rows, made, found, trained_on)]
    source = rows.held_out or rows.source
    return Questions(exam=exam, name=source.name, fingerprint=made.fingerprint, form=found.form, told=told)


def _prepared(
    ready: Ready, rows: Rows, run: Mapping[str, Any], settings: Mapping[str, Any], limit: int | None
) -> tuple[Prepared, Plan, list[str]]:
    """All that is asked as `train`; the plan; what was left out."""
    classes = _classes(ready) if ready.task in CLASSIFYING else None
    named = DatasetSettings.model_construct(data=rows.source.name, **_columns(rows.source, run, settings))
    found = plan(rows.source, rows.held_out, columns(named), ready.task, classes)
    tail = found.source.document and rows.held_out is None and rows.own
    asked, notes = _asked(found, rows, int(run.get("seed", DRAW)), tail)
    if limit is not None and not found.source.document and limit < len(asked.source.rows):
        notes.append(f"{limit} of them, drawn (seed {DRAW})")
        drawn = sorted(random.Random(DRAW).sample(range(len(asked.source.rows)), limit))
        asked = replace(asked, source=replace(asked.source, rows=asked.source.rows.select(drawn)))
    tasks = _tasks(ready, rows.source, run, settings)
    if tasks is not None and tasks.column is not None:
        found = replace(found, form=found.form.beside(tasks.column, list(found.features)))
    if ready.task == "image-classification":
        return prepare_images(asked, eval_split=0, seed=0, tasks=tasks), found, notes
    made = prepare(
        asked,
        ready.tokenizer,
        task=ready.task,
        max_length=_max_length(ready, run, settings),
        eval_split=rows.share if tail else 0,
        seed=0,
        completion_only_loss=run.get("completion_only_loss") is not False,
        separator=ready.framing.separator if ready.trained and ready.framing.style == "plain" else "\n",
        tasks=tasks,
    )
    if tail:
        if made.held_out is None:
            raise ValueError(f"The run held out nothing of {rows.source.name}: give --data FILE.")
        made = replace(made, train=made.held_out)
    if limit is not None and found.source.document and limit < len(made.train):
        notes.append(f"the first {limit} of {len(made.train)} blocks")
        made = replace(made, train=made.train.select(range(limit)))
    return made, found, notes


def _tasks(ready: Ready, source: Source, run: Mapping[str, Any], settings: Mapping[str, Any]) -> Tasks | None:
    """Which task the rows are of, where what is active tells tasks apart.

    Raises:
        ValueError: nothing says it, or it is said and nothing tells tasks apart.
    """
    count, names = tasks_told(ready.model), tuple(ready.task_names)
    column, task = settings.get("task_column"), settings.get("task")
    if count <= 1:
        if column is not None or task is not None:
            said = f"--task-column {column}" if task is None else f"--task {task}"
            raise ValueError(f"{said} has no effect: nothing that is active tells tasks apart. Leave it out.")
        return None
    if task is not None:
        return Tasks(number=number_of(task, names, count, "--task"), names=names, count=count)
    there = source.rows.column_names
    if column is not None and column not in there:
        raise ValueError(f"There is no column {column!r} (--task-column); there are {', '.join(there)}.")
    column = column or next((c for c in (run.get("task_column"), TASK) if c in there), None)
    if column is None:
        raise ValueError(
            f"What is active tells {count} tasks apart: say with --task-column which column has the task of each row, "
            "or with --task which one all rows are of."
        )
    return Tasks(column=column, names=names, count=count)


def _asked(found: Plan, rows: Rows, seed: int, tail: bool) -> tuple[Plan, list[str]]:
    """The plan with just the rows that are asked, and where they come from."""
    if tail:
        return found, [f"the end of {found.source.name}, which the run held out"]
    if not rows.own:
        if found.source.held_out is None:
            return found, []
        part = next((note for note in found.source.notes if note.startswith("held-out")), "held-out rows")
        return replace(found, source=replace(found.source, rows=found.source.held_out, held_out=None)), [part]
    _, held = split_rows(found, rows.share, seed)
    if held is None:
        raise ValueError(f"The run held out nothing of {found.source.name}: give --data FILE.")
    root = found.source.root if rows.held_out is None else rows.held_out.root
    source = replace(found.source, rows=held, held_out=None, root=root, document=False)
    return replace(found, source=source, held_out=None), ["the rows that the run held out"]


def _columns(source: Source, run: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are named now; else those of the run, where the data has them."""
    now = {name: settings[name] for name in COLUMNS if settings.get(name)}
    then = {name: run[name] for name in COLUMNS if run.get(name)}
    there = column_kinds(source.rows)
    return now or (then if all(column in there for column in then.values()) else {})


def _classes(ready: Ready) -> list[str]:
    names: Mapping[int, str] = ready.model.config.id2label  # type: ignore[assignment, union-attr]
    return [str(names[number]) for number in sorted(names)]


def _max_length(ready: Ready, run: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    if told := settings.get("max_length") or run.get("max_length"):
        return int(told)
    view = ready.model
    assert isinstance(view, PeftModel)
    limits = [USUAL_LENGTH, *positions(view.config, ready.tokenizer)]  # type: ignore[arg-type]
    return max(min(limits) - virtual_tokens(view, list(view.peft_config)), 2)


def _room(ready: Ready, view: PeftModel) -> int | None:
    known = positions(view.config, ready.tokenizer)  # type: ignore[arg-type]
    return min(known) - virtual_tokens(view, list(view.peft_config)) if known else None


def _head_is_new(ready: Ready) -> bool:
    """Whether the base has no head for these classes, so that its own classes are guesses."""
    config: Any = load_config(ready.model.get_base_model().config.name_or_path)  # type: ignore[operator, union-attr]
    fitting = any("Classification" in architecture for architecture in config.architectures or [])
    return not (fitting and [str(name) for name in config.id2label.values()] == _classes(ready))


def _told(ready: Ready, rows: Rows, made: Prepared, found: Plan, trained_on: str | None) -> list[str]:
    told = [found.form.note] if found.form.note else []
    tally = made.tally
    if tally.dropped:
        told.append(f"left out: {dropped(tally)}")
    if tally.truncated:
        told.append(
            f"{tally.truncated} of {tally.rows} rows were cut to max_length={made.max_length}, the longest has "
            f"{tally.longest} tokens: their answers are compared as far as they go"
        )
    framing = ready.framing
    if ready.trained and made.framing is not None and found.form.kind != "text" and made.framing != framing:
        told.append(
            f"asked in the style {made.framing.style} (separator {made.framing.separator!r}), and trained in the style "
            f"{framing.style} (separator {framing.separator!r})"
        )
    if ready.task in CLASSIFYING and _head_is_new(ready):
        told.append("the base's head is new and untrained: its own figures are those of guessing")
    whole = not rows.own and rows.source.held_out is None
    if whole and trained_on is not None and fingerprint(rows.source.rows) == trained_on:
        told.append(
            "THESE ARE THE ROWS THAT IT WAS TRAINED ON: the scores say how well it remembers them. Leave --data out to "
            "take those that the run held out"
        )
    return told
