"""Small pretrained models with something to learn: what benchmarks/learning_rates.py trains on."""

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from coadapt.data.tokens import IGNORED
from coadapt.demo import BASE
from coadapt.demo.task import examples
from coadapt.training.assemble import load_base, load_tokenizer
from coadapt.training.settings import Task

Rows = list[dict[str, list[int]]]
HELD_OUT = 64
"""Examples that a loss is measured on (fewer where there are no more)."""
LONGEST = 64
"""Tokens of an example."""


@dataclass(frozen=True)
class Problem:
    """A base, examples to train on, and examples to measure."""

    name: str
    model: Path
    task: Task
    make: Callable[["Problem"], tuple[Rows, Rows]]
    source: Path | None = None

    @cached_property
    def rows(self) -> tuple[Rows, Rows]:
        """(to train on, held out)"""
        train, held_out = self.make(self)
        return train, held_out[:HELD_OUT]

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.model))

    def base(self) -> nn.Module:
        return load_base(str(self.model), self.task, self.tokenizer, dtype="float32")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _example(ids: Sequence[int], labels: Sequence[int]) -> dict[str, list[int]]:
    return {"input_ids": list(ids), "labels": list(labels), "attention_mask": [1] * len(ids)}


def _answer(problem: Problem, prompt: str, answer: str) -> dict[str, list[int]]:
    """An example of a causal model, of which the answer is trained."""
    asked, given = problem.ids(prompt), [*problem.ids(answer), problem.tokenizer.eos_token_id]
    start = [] if problem.tokenizer.bos_token_id is None else [problem.tokenizer.bos_token_id]
    ids = [*start, *asked, *given]
    return _example(ids[:LONGEST], [*[IGNORED] * (len(ids) - len(given)), *given][:LONGEST])


def demo(problem: Problem) -> tuple[Rows, Rows]:
    """Records in place of English answers."""
    made = (examples("train", 2000, 0), examples("held-out", HELD_OUT, 0))
    train, held_out = ([_answer(problem, r["prompt"], r["completion"]) for r in rows] for rows in made)
    return train, held_out


def shakespeare(problem: Problem) -> tuple[Rows, Rows]:
    """Pieces of the text; the last tenth is held out."""
    assert problem.source is not None
    text = problem.source.read_text("utf-8")
    cut = len(text) * 9 // 10

    def pieces(part: str) -> Rows:
        ids = problem.ids(part[:300_000])
        starts = range(0, len(ids) - LONGEST, LONGEST)
        rows = [[problem.tokenizer.bos_token_id, *ids[s : s + LONGEST - 1]] for s in starts]
        random.Random(0).shuffle(rows)
        return [_example(row, row) for row in rows]

    return pieces(text[:cut]), pieces(text[cut:])


def instructions(problem: Problem) -> tuple[Rows, Rows]:
    """Who the model shall act as -> the text that says so."""
    assert problem.source is not None
    with problem.source.open(encoding="utf-8", newline="") as file:
        rows = [_answer(problem, f"{row['act']}\n", row["prompt"]) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    return rows[:120], rows[120:]


LETTERS = dict(zip("ابتدرزسشفقكلمنهويجحخعغطظصض", "abtdrzscfqklmnhwyjxoegiupv", strict=True))
"""A spelling that the model has not seen: one Latin letter for each Arabic one."""


def letters(problem: Problem) -> tuple[Rows, Rows]:
    """Invented Arabic words -> the spelling of `LETTERS`, written backwards."""
    words, draw = sorted(LETTERS), random.Random(0)
    made = ["".join(draw.choices(words, k=draw.randint(3, 8))) for _ in range(2000)]
    eos = problem.tokenizer.convert_tokens_to_ids("</s>")

    def example(word: str) -> dict[str, list[int]]:
        target = "".join(LETTERS[letter] for letter in reversed(word))
        return _example(problem.ids(word), [*problem.ids(target), eos])

    rows = [example(word) for word in dict.fromkeys(made)]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def problems(assets: Path | None) -> dict[str, Problem]:
    """Those that there are files for, by name."""
    found = [Problem("demo", BASE, "causal-lm", demo)]
    if assets is not None:
        stories, data = assets / "weights" / "stories260K-hf", assets / "data"
        pairs = Problem("letters", assets / "weights" / "aren-transliteration-hf", "seq2seq", letters)
        text, table = data / "tinyshakespeare" / "input.txt", data / "awesome-chatgpt-prompts" / "prompts_153.csv"
        found = [
            Problem("shakespeare", stories, "causal-lm", shakespeare, text),
            *found,
            Problem("instructions", stories, "causal-lm", instructions, table),
            pairs,
        ]
        needed = (path for p in found for path in (p.model, p.source) if path is not None)
        if missing := sorted({str(path) for path in needed if not path.exists()}):
            raise SystemExit(f"--assets {assets}: not there: {', '.join(missing)}. Without them: --tasks demo")
    return {problem.name: problem for problem in found}
