"""What the dialogue example is about: facts of restaurants (E2E NLG) and replies in plays (tiny Shakespeare)."""

import csv
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

QUESTIONS = ("Tell me about {}.\n", "What is {} like?\n", "Do you know {}?\n")
SLOTS = ("eatType", "food", "near")
"""What an answer is checked for: values that the sentences give word for word."""


@dataclass(frozen=True)
class Restaurant:
    """One record of the data set, and what people wrote of it."""

    name: str
    facts: Mapping[str, str]
    sentences: Sequence[str]

    def known(self, answer: str) -> float:
        """The share of its facts that stand in an answer."""
        return sum(self.facts[slot].lower() in answer.lower() for slot in SLOTS) / len(SLOTS)


def on_stage(words: str) -> str:
    """The words as a speech in a play, up to where the other one answers."""
    return f"ROMEO:\n{words.strip()}\n\nJULIET:\n"


def record(text: str) -> dict[str, str]:
    """`name[Cotto], food[English]` as a dictionary."""
    return dict(re.findall(r"(\w[\w ]*)\[(.*?)\]", text))


def restaurants(folder: Path) -> list[Restaurant]:
    """For each name the record of which most was written, with all sentences that do not contradict it.

    The data set has many records of one name, which contradict each other; here a restaurant is one thing.
    """
    written: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in ("devset.csv", "testset_w_refs.csv"):
        with (folder / file).open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                written[record(row["mr"])["name"]][row["mr"]].append(row["ref"])
    return [one for name in sorted(written) if (one := chosen(name, written[name])) is not None]


def chosen(name: str, written: Mapping[str, Sequence[str]]) -> Restaurant | None:
    whole = {text: record(text) for text in written if set(SLOTS) <= set(record(text))}
    found: dict[str, list[str]] = {}
    for text, facts in whole.items():
        agreeing = [other for other in whole if whole[other].items() <= facts.items()]
        found[text] = [sentence for other in agreeing for sentence in written[other]]
    if not (enough := sorted(text for text in found if len(found[text]) >= 8)):
        return None
    text = random.Random(name).choice(enough)  # drawn: the records of which most was written are much alike
    return Restaurant(name, {slot: whole[text][slot] for slot in SLOTS}, found[text])


def replies(file: Path, longest: int = 160) -> list[dict[str, str]]:
    """A speech of a play, and the one that answers it, where neither is long; in the order of the file."""
    speeches = [speech.split("\n", 1) for speech in file.read_text("utf-8").strip().split("\n\n")]
    return [
        {"prompt": f"{said[0]}\n{said[1]}\n\n{answer[0]}\n", "completion": answer[1]}
        for said, answer in pairwise(speeches)
        if all(len(speech) == 2 and len(speech[1]) <= longest for speech in (said, answer))
    ]


def commonest(known: Sequence[Restaurant]) -> float:
    """The share of the facts that are right where each is said to be what it most often is."""
    most = (Counter(one.facts[slot] for one in known).most_common(1)[0][1] for slot in SLOTS)
    return sum(most) / len(known) / len(SLOTS)


def write(assets: Path, out: Path, rows: int | None = None) -> None:
    """Writes what the runs read: facts of restaurants, replies in plays, what is held out; at most `rows` of each."""
    plays = replies(assets / "tinyshakespeare" / "input.txt")
    end = len(plays) * 9 // 10  # held out is the end of the file, not lines whose neighbours were seen
    facts = [
        (number, {"prompt": QUESTIONS[number // 4 % len(QUESTIONS)].format(one.name), "completion": sentence})
        for one in restaurants(assets / "e2e_nlg")
        for number, sentence in enumerate(one.sentences)
    ]
    learnt, held_out = ([row for n, row in facts if (n % 4 == 3) is held] for held in (False, True))
    stage = [{**row, "prompt": on_stage(row["prompt"])} for row in held_out]
    held = {"facts-held-out": held_out, "stage-held-out": stage, "plays-held-out": plays[end::4]}
    out.mkdir(parents=True, exist_ok=True)
    for name, found in {"facts": learnt, "plays": plays[:end], **held}.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found[:rows])
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
