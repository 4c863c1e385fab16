"""The whole way: a source, its format, its split, its examples, and what is to be said about all that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from coadapt.data.by_task import TASK, Tasks
from coadapt.data.columns import PATTERNS, Format, Told, find_format
from coadapt.data.segments import Framing, find_framing
from coadapt.data.source import Source, fingerprint
from coadapt.data.tokens import CausalEncoder, Encode, LabelEncoder, PairEncoder, TagEncoder, Tally, leading_tokens

BATCH = 256
"""Rows that are tokenised between two writes."""


CLASSIFYING = ("sequence-classification", "token-classification", "image-classification")
"""Tasks whose labels are classes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the rows are, known before any model is loaded."""

    source: Source
    held_out: Source | None
    form: Format
    classes: tuple[str, ...] = ()

    @property
    def features(self) -> dict[str, str]:
        """Column -> "text", "list", "number" or "other"."""
        return column_kinds(self.source.rows)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Examples to train on and to hold out, and how they came about."""

    train: Dataset
    held_out: Dataset | None
    framing: Framing | None
    """None where nothing is put to the model as text: images."""
    max_length: int | None
    tally: Tally
    held_out_tally: Tally
    fingerprint: str
    """SHA-256 of the rows that were read."""
    notes: tuple[str, ...] = field(default=())


def column_kinds(rows: Dataset) -> dict[str, str]:
    """Column -> "text", "list", "number" or "other"."""
    return {name: _kind(feature) for name, feature in rows.features.items()}


def _kind(feature: Any) -> str:
    match feature:
        case datasets.ClassLabel():
            return "number"
        case datasets.Value():
            return "text" if "string" in feature.dtype else "number"
        case list() | datasets.List() | datasets.LargeList():
            return "list"
        case _:
            # datasets' own type for lists whose elements differ in their fields
            return "list" if type(feature).__name__ == "Json" else "other"


def plan(
    source: Source, held_out: Source | None, told: Told, task: str | None, classes: Sequence[str] | None = None
) -> Plan:
    """Recognises the format, and for a classification its classes, unless they are known.

    Raises:
        ValueError: from `find_format`, or a held-out file of other columns.
    """
    form = find_format(column_kinds(source.rows), told, task)
    for role, column in form.columns.items():
        if held_out is not None and column not in held_out.rows.column_names:
            raise ValueError(
                f"{held_out.name} has no column {column!r} ({role} in {source.name}); it has "
                f"{', '.join(held_out.rows.column_names)}."
            )
    if form.kind == "pictured" and column_kinds(source.rows)[column := form.columns["image"]] != "text":
        raise ValueError(f"The column {column!r} must hold paths of image files, relative to {source.root}.")
    known = _classes(source.rows, form) if classes is None else tuple(classes)
    return Plan(source=source, held_out=held_out, form=form, classes=known)


def has_tags(source: Source) -> bool:
    """Whether the rows are words with their tags, and no labelled texts."""
    matching = (pattern.kind for pattern in PATTERNS if pattern.match(source.rows.column_names) is not None)
    return next((kind for kind in matching if kind in ("labelled", "tagged")), None) == "tagged"


def _classes(rows: Dataset, form: Format) -> tuple[str, ...]:
    column = form.columns.get("label") or form.columns.get("tags")
    if column is None:
        return ()
    feature: Any = rows.features[column]
    if form.kind == "tagged":
        if any(_kind(rows.features[c]) != "list" for c in form.columns.values()):
            raise ValueError(f"{' and '.join(form.columns.values())} must hold lists, a tag for each token.")
        feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    found = (tag for tags in rows[column] for tag in tags or ()) if form.kind == "tagged" else rows.unique(column)
    names = {str(v) for v in found if v is not None and v != ""}
    if len(names) < 2:
        raise ValueError(f"The label column {column!r} has fewer than two classes: {sorted(names)}.")
    if len(names) > 1000:
        raise ValueError(
            f"The label column {column!r} has {len(names)} different values; classes are meant here. "
            "To train on the text alone: task=causal-lm."
        )
    return tuple(sorted(names, key=lambda name: (0, int(name), name) if name.lstrip("-").isdigit() else (1, 0, name)))


def prepare(
    found: Plan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    max_length: int,
    eval_split: float,
    seed: int,
    completion_only_loss: bool = True,
    separator: str = "\n",
    tasks: Tasks | None = None,
) -> Prepared:
    """Tokenises and splits; with `tasks` each example says its own.

    `eval_split` is the share of rows to hold out (0: none), drawn by `seed`, where the source has no held-out part.

    Raises:
        ValueError: no row has a trained token, or the tokenizer has no end-of-sequence token.
    """
    if task not in CLASSIFYING and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the model could not learn to stop. Set its eos_token."
        )
    framing = find_framing(found.form, found.features, tokenizer, separator)
    encode = encoder(found, tokenizer, task, framing, max_length, completion_only_loss)
    rows, held_rows = split_rows(found, eval_split, seed)
    tally, held_tally = Tally(), Tally()
    train = _encode(rows, encode, tally, tasks)
    held_out = None if held_rows is None else _encode(held_rows, encode, held_tally, tasks)
    if found.source.document and held_out is None and eval_split:
        train, held_out = _split_tail(train, eval_split)
    if held_out is not None and len(held_out) == 0:
        raise ValueError(f"None of the {held_tally.rows} held-out rows has a trained token ({held_tally.dropped}).")
    return Prepared(
        train=train,
        held_out=held_out,
        framing=framing,
        max_length=max_length,
        tally=tally,
        held_out_tally=held_tally,
        fingerprint=fingerprint(found.source.rows),
        notes=_notes(tally, held_tally, max_length, framing, found, tokenizer),
    )


def encoder(
    found: Plan, tokenizer: PreTrainedTokenizerBase, task: str, framing: Framing, max_length: int, completion_only: bool
) -> Encode:
    """What makes examples of rows, for a task.

    Raises:
        ValueError: `max_length` has no room for text, or the task is unknown.
    """
    least = len(leading_tokens(tokenizer)) + 2
    if max_length < least:
        raise ValueError(f"max_length={max_length} leaves no room for text; it must be at least {least}.")
    match task:
        case "causal-lm":
            return CausalEncoder(
                tokenizer=tokenizer,
                form=found.form,
                framing=framing,
                max_length=max_length,
                completion_only_loss=completion_only,
            )
        case "seq2seq":
            return PairEncoder(tokenizer=tokenizer, form=found.form, max_length=max_length)
        case "sequence-classification":
            return LabelEncoder(tokenizer=tokenizer, form=found.form, classes=found.classes, max_length=max_length)
        case "token-classification":
            return TagEncoder(tokenizer=tokenizer, form=found.form, classes=found.classes, max_length=max_length)
        case _:
            raise ValueError(f"task={task!r} is unknown. Known: causal-lm, seq2seq, {', '.join(CLASSIFYING)}.")


def split_rows(found: Plan, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows to train on and to hold out: those that are there to be held out, else a share of all, drawn by `seed`."""
    rows = found.source.rows
    given = found.held_out.rows if found.held_out is not None else found.source.held_out
    if given is not None or not share or found.source.document or len(rows) < 2:
        return rows, given
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _split_tail(examples: Dataset, share: float) -> tuple[Dataset, Dataset | None]:
    """The end of a long text is held out: blocks drawn from its middle would be known by their neighbours."""
    count = round(len(examples) * share)
    if not 0 < count < len(examples):
        return examples, None
    at = len(examples) - count
    return examples.select(range(at)), examples.select(range(at, len(examples)))


def _encode(rows: Dataset, encode: Encode, tally: Tally, tasks: Tasks | None) -> Dataset:
    def batch(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {}
        for number in range(len(next(iter(columns.values())))):
            row = {name: values[number] for name, values in columns.items()}
            own = {} if tasks is None else {TASK: tasks.of(row)}
            for example in encode(row, tally):
                for key, value in (example | own).items():
                    made.setdefault(key, []).append(value)
        empty = {} if tasks is None else {TASK: []}
        return made or {"input_ids": [], "attention_mask": [], "labels": [], **empty}

    made = rows.map(
        batch,
        batched=True,
        batch_size=BATCH,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
        keep_in_memory=True,
    )
    if len(made) == 0:
        raise ValueError(
            f"None of the {tally.rows} rows has a trained token: {dropped(tally)}. Look at columns and max_length."
        )
    return made


def _notes(
    tally: Tally, held: Tally, max_length: int, framing: Framing, found: Plan, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    notes = [*found.source.notes, *([found.form.note] if found.form.note else [])]
    if found.form.kind == "messages" and tokenizer.chat_template is None:
        notes.append("the tokenizer has no chat template: turns are written as `user: …` and `assistant: …`")
    if framing.separator and framing.style == "plain" and found.form.kind in ("pair", "instruction"):
        notes.append(
            f"prompt and completion are joined by {framing.separator!r} where no white space is (prompt_separator)"
        )
    for name, counts in (("train", tally), ("held out", held)):
        if counts.dropped:
            notes.append(f"{name}: dropped {dropped(counts)}")
        if counts.truncated:
            notes.append(
                f"{name}: {counts.truncated} of {counts.rows} rows were cut to max_length={max_length}; "
                f"the longest has {counts.longest} tokens"
            )
    return tuple(notes)


def dropped(tally: Tally) -> str:
    """How many rows were left out, and why."""
    return ", ".join(f"{count} rows ({reason})" for reason, count in tally.dropped.items()) or "no rows"
