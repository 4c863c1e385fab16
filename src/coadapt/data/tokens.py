"""Segments, pairs, labelled texts and tagged words as token ids with labels."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from transformers import PreTrainedTokenizerBase

from coadapt.data.columns import Format
from coadapt.data.segments import Framing, Segment, as_prompt, segments

IGNORED = -100
"""The label of a token that is not trained on."""

Example = dict[str, Any]
"""`input_ids` [T], `attention_mask` [T] and `labels`: [T], [T of the target], or one class."""


class Encode(Protocol):
    """One row -> its examples; none where there is nothing to learn from it."""

    def __call__(self, row: Mapping[str, Any], tally: "Tally") -> Iterator[Example]: ...


@dataclass
class Tally:
    """What happened to the rows on their way."""

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    longest: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Counts a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


@dataclass(frozen=True, kw_only=True)
class _Encoder(ABC):
    """Rows of one format as tokens of one tokenizer, at most so many an example."""

    tokenizer: PreTrainedTokenizerBase
    form: Format
    max_length: int

    def __call__(self, row: Mapping[str, Any], tally: Tally) -> Iterator[Example]:
        tally.rows += 1
        yield from self.examples(row, tally)

    @abstractmethod
    def examples(self, row: Mapping[str, Any], tally: Tally) -> Iterator[Example]: ...

    def cells(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the row has for each role of the format."""
        return {role: row[column] for role, column in self.form.columns.items()}


@dataclass(frozen=True, kw_only=True)
class CausalEncoder(_Encoder):
    """Text for a language model: a text is cut into blocks, everything else into one example per row."""

    framing: Framing
    completion_only_loss: bool = True

    def examples(self, row: Mapping[str, Any], tally: Tally) -> Iterator[Example]:
        pieces = segments(row, self.form, self.framing, self.tokenizer)
        if not pieces:
            tally.drop("empty")
            return
        rendered = self.framing.style == "chat"
        start = [] if rendered else leading_tokens(self.tokenizer)
        ids, labels = join(pieces, self.tokenizer, start, self.completion_only_loss)
        tally.longest = max(tally.longest, len(ids))
        if self.form.kind == "text":
            yield from self._blocks(ids, start, tally)
            return
        if len(ids) > self.max_length:
            tally.truncated += 1
        yield from _keep(ids[: self.max_length], labels[: self.max_length], tally)

    def _blocks(self, ids: list[int], start: list[int], tally: Tally) -> Iterator[Example]:
        """The text without a token lost, in parts of equal length (a last one of a token or two teaches nothing).

        Each begins as a text does, which is what the model expects.
        """
        body = ids[len(start) :]
        parts = math.ceil(len(body) / (self.max_length - len(start)))
        size = math.ceil(len(body) / max(parts, 1))
        for at in range(0, len(body), max(size, 1)):
            block = body[at : at + size]
            yield from _keep(start + block, [IGNORED] * len(start) + block, tally)


@dataclass(frozen=True, kw_only=True)
class PairEncoder(_Encoder):
    """A source text for the encoder, a target text for the decoder."""

    def examples(self, row: Mapping[str, Any], tally: Tally) -> Iterator[Example]:
        cells = self.cells(row)
        source, target = as_prompt(cells), cells["completion"]
        if not source or not target:
            tally.drop("empty")
            return
        ids = self.tokenizer(source, verbose=False).input_ids
        labels = self.tokenizer(text_target=str(target), verbose=False).input_ids
        if not labels or labels[-1] != self.tokenizer.eos_token_id:
            labels = [*labels, self.tokenizer.eos_token_id]
        tally.longest = max(tally.longest, len(ids), len(labels))
        if max(len(ids), len(labels)) > self.max_length:
            tally.truncated += 1
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        tally.tokens += len(ids) + len(labels)
        tally.trained += len(labels)
        yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


@dataclass(frozen=True, kw_only=True)
class LabelEncoder(_Encoder):
    """A text, or two, and its class."""

    classes: Sequence[str]

    def examples(self, row: Mapping[str, Any], tally: Tally) -> Iterator[Example]:
        cells = self.cells(row)
        if not cells["text"] or cells["label"] is None or cells["label"] == "":
            tally.drop("empty")
            return
        label = class_name(cells["label"], self.classes)
        if label not in self.classes:
            tally.drop("a class that no training row has")
            return
        texts = [cells["text"], cells["second"]] if cells.get("second") else [cells["text"]]
        full = len(self.tokenizer(*texts, verbose=False).input_ids)
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        tally.longest = max(tally.longest, full)
        tally.truncated += full > self.max_length
        tally.tokens += len(encoded["input_ids"])
        tally.trained += 1
        yield {**encoded, "labels": self.classes.index(label)}


@dataclass(frozen=True, kw_only=True)
class TagEncoder(_Encoder):
    """Words and the tag of each: a word's first token has its tag, all others are ignored."""

    classes: Sequence[str]

    def examples(self, row: Mapping[str, Any], tally: Tally) -> Iterator[Example]:
        cells = self.cells(row)
        words, tags = cells["tokens"] or [], cells["tags"] or []
        if not words:
            tally.drop("empty")
            return
        if len(words) != len(tags):
            tally.drop("not as many tags as tokens")
            return
        names = [class_name(tag, self.classes) for tag in tags]
        if not set(names) <= set(self.classes):
            tally.drop("a tag that no training row has")
            return
        full, _ = words_as_tokens(words, self.tokenizer)
        ids, firsts = words_as_tokens(words, self.tokenizer, self.max_length)
        tally.longest = max(tally.longest, len(full))
        tally.truncated += len(full) > self.max_length
        labels = [IGNORED] * len(ids)
        for word, at in firsts.items():
            labels[at] = self.classes.index(names[word])
        tally.tokens += len(ids)
        tally.trained += len(firsts)
        yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def words_as_tokens(
    words: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> tuple[list[int], dict[int, int]]:
    """Token ids [T] of `words`, as one text, and the place of each word's first token (words that were cut have none).

    Raises:
        ValueError: the tokenizer does not tell which word a token is of.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell words apart; token classification needs a fast one."
        )
    cut = {"truncation": True, "max_length": max_length} if max_length else {}
    encoded = tokenizer([str(word) for word in words], is_split_into_words=True, verbose=False, **cut)
    firsts: dict[int, int] = {}
    for at, word in enumerate(encoded.word_ids()):
        if word is not None:
            firsts.setdefault(word, at)
    return list(encoded["input_ids"]), firsts


def class_name(label: Any, classes: Sequence[str]) -> str:
    """The class of a cell: its text, or the name at its number where the table stores numbers of known names."""
    if isinstance(label, int) and not isinstance(label, bool) and str(label) not in classes and label < len(classes):
        return classes[label]
    return str(label)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill up with; what it is does not matter, as it is neither attended to nor trained on."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else cast(int, found)


def end_tokens(known: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The ends that the base knows, and the one that was trained."""
    ends = {known} if isinstance(known, int) else set(known or [])
    trained = cast(int | None, tokenizer.eos_token_id)
    return sorted(ends | {trained} if trained is not None else ends) or None


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer itself puts before a text, `<s>` for many."""
    plain = _ids("a", tokenizer)
    full = tokenizer("a").input_ids
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return full[:at]


def join(
    pieces: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
    start: Sequence[int],
    completion_only: bool = True,
) -> tuple[list[int], list[int]]:
    """Token ids [T] and labels [T] of segments one after another.

    A piece is tokenised together with what stands before it wherever that leaves the earlier tokens as they are (as
    they will be when the model is asked), and by itself where it does not.
    """
    ids, labels = list(start), [IGNORED] * len(start)
    text, since = "", len(ids)
    for piece in pieces:
        earlier = ids[since:]
        whole = _ids(text + piece.text, tokenizer)
        fits = whole[: len(earlier)] == earlier
        new = whole[len(earlier) :] if fits else _ids(piece.text, tokenizer)
        text = text + piece.text if fits else piece.text
        since = since if fits else len(ids)
        if piece.ends:
            assert tokenizer.eos_token_id is not None
            new = [*new, tokenizer.eos_token_id]
            text, since = "", len(ids) + len(new)
        ids += new
        labels += new if piece.trained or not completion_only else [IGNORED] * len(new)
    return ids, labels


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Not verbose: it would warn of texts longer than the model takes, which are cut afterwards.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _keep(ids: list[int], labels: list[int], tally: Tally) -> Iterator[Example]:
    # The first label is never predicted: there is no token before it.
    trained = sum(label != IGNORED for label in labels[1:])
    if trained == 0:
        tally.drop("no trained token within max_length")
        return
    tally.tokens += len(ids)
    tally.trained += trained
    yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
