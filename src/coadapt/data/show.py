"""What is said about the data before training: a description, and one example with its trained tokens marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from coadapt.data.columns import Format
from coadapt.data.prepare import Plan, Prepared
from coadapt.data.segments import read_messages
from coadapt.data.tokens import IGNORED, Example

OPEN, CLOSE = "⟦", "⟧"
"""Around trained tokens, so that they are told apart without colours too."""


def describe(found: Plan, made: Prepared) -> Table:
    """A table of two columns: format, rows, tokens, what was dropped or cut and why."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    roles = ", ".join(c if role == c else f"{c} → {role}" for role, c in found.form.columns.items())
    table.add_row("data", Text(found.source.name))
    table.add_row("format", Text(f"{found.form.name} ({roles})"))
    if found.classes:
        table.add_row("classes", Text(", ".join(found.classes)))
    table.add_row("train", _counts(len(made.train), made.tally.rows, found.source.document))
    if made.held_out is not None:
        table.add_row("held out", _counts(len(made.held_out), made.held_out_tally.rows, found.source.document))
    if made.max_length is not None:
        share = made.tally.trained / max(made.tally.tokens, 1)
        table.add_row("tokens", f"{made.tally.tokens:,}, {share:.0%} of them trained on; max_length {made.max_length}")
    for note in made.notes:
        table.add_row("note", Text(note))
    return table


def _counts(examples: int, rows: int, document: bool) -> str:
    if document or not rows:
        return f"{examples:,} blocks of text"
    return f"{rows:,} rows" if examples == rows else f"{rows:,} rows, {examples:,} examples"


def one_image(example: Example, classes: Sequence[str]) -> Text:
    """The file of an image, and its class between ⟦ and ⟧."""
    label: int = example["labels"]
    return _shorten([(str(example["image"]), False), (" → ", False), (classes[label], True)], 600)


def one_sample(
    example: Example, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str] = (), most: int = 600
) -> Text:
    """The text of an example, its trained tokens between ⟦ and ⟧ (and bold), at most about `most` characters.

    An example of another shape (a target of its own, a class) is shown as `source → ⟦target⟧`, tagged words as
    `word⟦tag⟧`.
    """
    ids, labels = example["input_ids"], example["labels"]
    if classes and isinstance(labels, Sequence):
        parts = _tagged(ids, labels, classes, tokenizer)
        return _shorten(parts[: most // 20], most)
    if isinstance(labels, Sequence) and len(labels) == len(ids) and _same(ids, labels):
        runs = _runs(ids, [label != IGNORED for label in labels])
        parts = [(_text(run, tokenizer), trained) for run, trained in runs]
    else:
        target = _text(labels, tokenizer) if isinstance(labels, Sequence) else classes[labels]
        parts = [(_text(ids, tokenizer), False), (" → ", False), (target, True)]
    return _shorten(parts, most)


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids)))


def _tagged(
    ids: Sequence[int], labels: Sequence[int], classes: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Each word (the tokens from one label to the next), then its tag."""
    starts = [at for at, label in enumerate(labels) if label != IGNORED]
    parts = [(_text(ids[: starts[0]], tokenizer), False)] if starts and starts[0] else []
    for at, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        parts += [(f" {_text(ids[at:end], tokenizer).strip()}", False), (classes[labels[at]], True)]
    return parts


def _same(ids: Sequence[int], labels: Sequence[int]) -> bool:
    return all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))


def _runs(ids: Sequence[int], trained: Sequence[bool]) -> list[tuple[list[int], bool]]:
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(ids, trained, strict=True):
        if runs and runs[-1][1] == flag:
            runs[-1][0].append(token)
        else:
            runs.append(([token], flag))
    return runs


def _shorten(parts: Sequence[tuple[str, bool]], most: int) -> Text:
    """Cuts the middle of long parts, so that every border between trained and untrained stays in sight."""
    room = max(most // max(len(parts), 1), 40)
    shown = Text()
    for text, trained in parts:
        short = text if len(text) <= room else f"{text[: room // 2]} … {text[-(room // 2) :]}"
        if trained:
            shown.append(OPEN, "bold green").append(short, "bold green").append(CLOSE, "bold green")
        else:
            shown.append(short, "dim")
    return shown


def one_cells(row: Mapping[str, Any], form: Format, most: int = 600) -> Text:
    """A row whose tokens are not known, role by role: what is trained on between ⟦ and ⟧, as its format has it."""
    cells = {role: row[column] for role, column in form.columns.items()}
    if form.kind == "messages":
        turns = [(m["role"], str(m["content"])) for m in read_messages(cells["messages"])]
        named = [(f"{role}: ", text, role == "assistant") for role, text in turns]
    else:
        taught = {"completion", "label", "tags"} if form.kind != "text" else {"text"}
        named = [(f"{role}: ", str(cell), role in taught) for role, cell in cells.items() if cell not in (None, "", [])]
    parts = [part for name, text, trained in named for part in ((f"\n{name}", False), (text, trained))]
    return _shorten([(parts[0][0].lstrip(), False), *parts[1:]], most)
