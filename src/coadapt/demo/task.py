"""The demo's task: answer a question about a scene with a record of two lines.

The base answers such questions in English ("The kite is on the roof."). It has never seen an answer written as
"thing: kite" and "place: on the roof", so its exact match on this task is 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from coadapt.demo.text import turn
from coadapt.demo.world import COLORS, PEOPLE, PLACES, THINGS, Placement, question, scene
from coadapt.evaluation import intervals, metrics
from coadapt.evaluation.intervals import Estimate

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "held-out"]


def examples(split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows of `prompt` and `completion`, the same for the same seed.

    A scene (name, thing, color, place) that is asked about in one split never is in the other. A prompt ends
    with "A:", a completion begins with a new line; the end token is the caller's to add.
    """
    rng = random.Random(f"{split} {seed}")
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        (placement,) = scene(rng, 1)
        asked, _ = question(rng, placement)
        if _split_of(placement) == split:
            prompt = f"{placement.sentence(rng)}\n{turn(asked)}"
            rows.append({"prompt": prompt, "completion": f"\n{_record(placement, asked)}"})
    return rows


def batch_of(tokenizer: Any, rows: Sequence[dict[str, str]]) -> dict[str, Tensor]:
    """Prompts with their completions and the end token, as a model takes them; the loss is over the completions."""
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, label in zip(rows, labels, strict=True):
        label[: len(tokenizer(row["prompt"])["input_ids"])] = -100
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def exact_match(generated: Sequence[str], rows: Sequence[dict[str, str]]) -> Estimate:
    """The share of generated answers, without prompt and end token, that equal the completion (stripped)."""
    pairs = zip(generated, rows, strict=True)
    return intervals.share([metrics.exact_match(text, row["completion"]) for text, row in pairs])


def _split_of(placement: Placement) -> Split:
    """One scene in five is held out."""
    names = [person.name for person in PEOPLE]
    index = names.index(placement.who) + THINGS.index(placement.what) + COLORS.index(placement.color)
    return "held-out" if (index + list(PLACES).index(placement.place)) % 5 == 0 else "train"


def _record(placement: Placement, asked: str) -> str:
    known = {"Where": ("place", placement.where), "Who": ("name", placement.who), "What": ("color", placement.color)}
    field, value = known[asked.split()[0]]
    return f"thing: {placement.what}\n{field}: {value}"
