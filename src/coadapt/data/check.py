"""What is wrong with the rows of a data set, row by row, and what to do about it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from coadapt.data.columns import Format
from coadapt.data.prepare import Plan
from coadapt.data.tokens import Encode, Example, Tally, class_name

ANSWERS = ("completion", "label", "tags")
"""Roles of what a row teaches; the others are what it asks."""
UNEVEN = 10
"""So many times as many rows of one class as of another are told."""
NAMED = 5
"""Rows that a finding names."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about the rows that a person should know."""

    what: str
    """duplicates, contradictions, empty, masked, cut, unknown, leakage, asked before, classes."""
    split: str
    """`train` or `held out`."""
    count: int
    said: str
    mend: str
    rows: tuple[int, ...]
    """The first of them, counted from 0 within the split."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of the rows, in tokens or characters."""

    unit: str
    least: int
    median: int
    p95: int
    """95 % of the rows are no longer."""
    most: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of one part."""

    name: str
    rows: int
    lengths: Lengths | None
    """None: images, or nothing that could be measured."""
    classes: Mapping[str, int]
    """Class -> its rows; of tags -> its words."""


@dataclass(kw_only=True)
class Looked:
    """What was seen of each row of one split."""

    name: str
    keys: list[str] = field(default_factory=list[str])
    """All that a row has."""
    asked: list[str] = field(default_factory=list[str])
    """What a row asks, without its answer."""
    lengths: list[int] = field(default_factory=list[int])
    reasons: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Why it is dropped -> the rows."""
    cut: list[int] = field(default_factory=list[int])
    unknown: list[int] = field(default_factory=list[int])
    """Rows with text that the tokenizer has no tokens for."""
    classes: Counter[str] = field(default_factory=Counter[str])
    sample: Example | None = None
    first: Row | None = None

    def split(self, unit: str) -> Split:
        """The figures of all rows together."""
        return Split(name=self.name, rows=len(self.keys), lengths=spread(self.lengths, unit), classes=self.classes)


def look(
    rows: Dataset,
    found: Plan,
    name: str,
    encode: Encode | None,
    unknown: int | None = None,
    content: Callable[[Any], str] | None = None,
) -> Looked:
    """Each row by itself.

    Args:
        encode: makes examples of a row; None: lengths are in characters, and only empty rows are dropped.
        unknown: the token that stands for what the tokenizer does not know.
        content: path of an image -> a digest of it, or "" where it cannot be read.
    """
    looked, form = Looked(name=name), found.form
    for number, row in enumerate(rows):
        assert isinstance(row, dict)
        cells = {role: row.get(column) for role, column in form.columns.items()}
        if content is not None:
            cells["image"] = content(cells["image"])
        answers = {role: cell for role, cell in cells.items() if role in ANSWERS}
        asks = {role: cell for role, cell in cells.items() if role not in ANSWERS}
        looked.keys.append(_key(cells))
        looked.asked.append(_key(asks) if answers else _asked_of(form, cells))
        _count_classes(looked, answers, found.classes)
        reason = _empty(cells) if encode is None else _encoded(looked, number, row, encode, unknown)
        if reason is not None:
            looked.reasons.setdefault(reason, []).append(number)
        elif encode is None and content is None:
            looked.lengths.append(sum(len(text) for text in _texts(cells)))
        if looked.first is None and reason is None:
            looked.first = row
    return looked


def _encoded(looked: Looked, number: int, row: Row, encode: Encode, unknown: int | None) -> str | None:
    """Why the row is dropped; None: it is not."""
    tally = Tally()
    examples = list(encode(row, tally))
    if tally.longest:
        looked.lengths.append(tally.longest)
    if tally.truncated:
        looked.cut.append(number)
    if unknown is not None and any(unknown in example["input_ids"] for example in examples):
        looked.unknown.append(number)
    if looked.sample is None and examples:
        looked.sample = examples[0]
    return None if examples else next(iter(tally.dropped), "empty")


def _key(cells: Mapping[str, Any]) -> str:
    """The same for cells that differ in white space alone."""
    return " ".join(json.dumps(cells, sort_keys=True, default=str, ensure_ascii=False).split())


def _asked_of(form: Format, cells: Mapping[str, Any]) -> str:
    """Of a conversation, the turns up to its last answer; of a plain text, nothing."""
    if form.kind != "messages" or not cells["messages"]:
        return ""
    return _key({"messages": list(cells["messages"])[:-1]})


def _count_classes(looked: Looked, answers: Mapping[str, Any], classes: Sequence[str]) -> None:
    if "label" in answers and answers["label"] not in (None, ""):
        looked.classes[class_name(answers["label"], classes)] += 1
    looked.classes.update(class_name(tag, classes) for tag in answers.get("tags") or ())


def _texts(value: Any) -> Iterable[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, inner in value.items():
                if key not in ("role", "from", "label", "tags"):
                    yield from _texts(inner)
        case list() | tuple():
            for inner in value:
                yield from _texts(inner)
        case _:
            return


def _empty(cells: Mapping[str, Any]) -> str | None:
    """ "empty" where a cell that is taught or read is."""
    needed = [role for role in (*ANSWERS, "text", "tokens", "messages", "image") if role in cells]
    return "empty" if any(cells[role] in (None, "", []) for role in needed) else None


def spread(lengths: Sequence[int], unit: str) -> Lengths | None:
    """How long rows are."""
    if not lengths:
        return None
    by_size = sorted(lengths)

    def at(share: float) -> int:
        return by_size[min(int(share * len(by_size)), len(by_size) - 1)]

    return Lengths(unit=unit, least=by_size[0], median=at(0.5), p95=at(0.95), most=by_size[-1])


# ---- what is said of it ----------------------------------------------------------------------------------------------


def findings(train: Looked, held_out: Looked | None, max_length: int | None, limit: int | None) -> list[Finding]:
    """All that should be changed, or known.

    Args:
        limit: the most tokens that the model takes, where it is known.
    """
    parts = [train] if held_out is None else [train, held_out]
    found = [*_repeated(train), *_contradictions(train), *_classes(train)]
    if held_out is not None:
        found += [*_repeated(held_out), *_leakage(train, held_out)]
    longest = max((length for part in parts for length in part.lengths), default=0)
    return [*(one for part in parts for one in _lost(part, max_length, limit, longest)), *found]


def _finding(what: str, looked: Looked, rows: Sequence[int], said: str, mend: str) -> Finding:
    return Finding(what=what, split=looked.name, count=len(rows), said=said, mend=mend, rows=tuple(rows[:NAMED]))


def _lost(looked: Looked, max_length: int | None, limit: int | None, longest: int) -> Iterable[Finding]:
    """What does not reach the model as it stands in the data."""
    total = len(looked.keys)
    for reason, rows in looked.reasons.items():
        masked = reason.startswith("no trained token")
        mend = "put the missing cells in, or delete the rows: training leaves them out"
        if masked:
            mend = "a larger max_length, a shorter prompt, or completion_only_loss=false: training leaves them out"
        yield _finding("masked" if masked else "empty", looked, rows, f"{_of(rows, total)}: {reason}", mend)
    if looked.cut and max_length is not None:
        fits = longest if limit is None else min(longest, limit)
        mend = f"max_length={fits} cuts {'none' if fits == longest else 'less'}"
        if fits <= max_length:
            mend = f"shorter rows, or a base that takes more than {max_length} tokens"
        said = f"{_of(looked.cut, total)} are longer than max_length={max_length}, and lose their end"
        yield _finding("cut", looked, looked.cut, f"{said}; the longest has {max(looked.lengths)}", mend)
    if looked.unknown:
        said = (
            f"{_of(looked.unknown, total)} have text that the tokenizer does not know, and reads as one token for all"
        )
        mend = "a base whose tokenizer knows it, or other spellings (case, quotes, white space)"
        yield _finding("unknown", looked, looked.unknown, said, mend)


def _repeated(looked: Looked) -> Iterable[Finding]:
    dropped = {number for numbers in looked.reasons.values() for number in numbers}
    seen: dict[str, int] = {}
    copies = [n for n, key in enumerate(looked.keys) if n not in dropped and seen.setdefault(key, n) != n]
    if copies:
        mend = "delete them: they count more than the others" if looked.name == "train" else "delete them"
        said = f"{_of(copies, len(looked.keys))} are copies of earlier ones"
        yield _finding("duplicates", looked, copies, said, mend)


def _contradictions(train: Looked) -> Iterable[Finding]:
    """Rows of one text and several classes."""
    if not train.classes:
        return
    answers: dict[str, set[str]] = {}
    for asked, key in zip(train.asked, train.keys, strict=True):
        answers.setdefault(asked, set()).add(key)
    rows = [n for n, asked in enumerate(train.asked) if len(answers[asked]) > 1]
    if rows:
        said = f"{_of(rows, len(train.keys))} have the text of another row, and another label"
        yield _finding("contradictions", train, rows, said, "decide for one label")


def _classes(train: Looked) -> Iterable[Finding]:
    if len(train.classes) < 2:
        return
    (most, many), *_, (least, few) = train.classes.most_common()
    if many >= UNEVEN * few:
        said = f"{most!r} stands {many:,} times, {least!r} {few:,}: accuracy says little of the rare ones"
        mend = "more rows of the rare classes, and a score for each class"
        yield Finding(what="classes", split=train.name, count=few, said=said, mend=mend, rows=())


def _leakage(train: Looked, held_out: Looked) -> Iterable[Finding]:
    total, keys, asked = len(held_out.keys), set(train.keys), set(train.asked)
    same = [n for n, key in enumerate(held_out.keys) if key in keys]
    again = [n for n, ask in enumerate(held_out.asked) if ask and ask in asked and held_out.keys[n] not in keys]
    if same:
        said = f"{_of(same, total)} stand in train, too: their score is no score of new rows"
        yield _finding("leakage", held_out, same, said, "delete them from one of the two, duplicates before a split")
    if again:
        said = f"{_of(again, total)} ask what a row of train asks, with another answer"
        mend = "hold out whole questions: eval_data=FILE with rows that ask something else"
        yield _finding("asked before", held_out, again, said, mend)


def _of(rows: Sequence[int], total: int) -> str:
    return f"{len(rows):,} of {total:,} rows ({len(rows) / total:.1%})"
