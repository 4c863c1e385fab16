"""A base and its adapters on the same rows: each composition's scores, and what can be said of the differences."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coadapt.core.base import fingerprint
from coadapt.core.composition import Node, Sum
from coadapt.evaluation.exam import Exam
from coadapt.evaluation.intervals import LEVEL
from coadapt.evaluation.journal import Journal, digest
from coadapt.evaluation.metrics import CLASSES, Response
from coadapt.evaluation.scoring import Score, figures, plain, scores
from coadapt.formats.files import aside
from coadapt.formats.provenance import versions
from coadapt.model import PeftModel
from coadapt.training.questions import Questions

BASE = "the base"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a composition came to."""

    who: str
    responses: Sequence[Response]
    """One for each row."""
    scores: Mapping[str, Score]


Step = Callable[[str, int, int], None]
"""Is told who is asked, how many batches of all are done, and how many there are."""


def compositions(view: PeftModel, given: Sequence[str]) -> dict[str, Any]:
    """What is asked, by name; the base first, as None: what was given, or each adapter by itself and what was saved.

    Raises:
        ValueError: one names an adapter that there is not, or stands there twice.
    """
    found: dict[str, Any] = {BASE: None}
    for text in given:
        view.checked(text)
        if text in found:
            raise ValueError(f"{text!r} is given twice.")
        found[text] = text
    if not given:
        found |= {name: name for name in view.peft_config}
        saved: Node = view.composition
        if not isinstance(saved, str) and not (isinstance(saved, Sum) and not saved.children):
            found[repr(saved)] = saved
    return found


def evaluate(view: PeftModel, exam: Exam, who: Mapping[str, Any], journal: Journal, step: Step) -> list[Result]:
    """Asks everybody everything that the journal does not know yet.

    Raises:
        ValueError: a loss is not finite.
    """
    total, done = len(who) * len(exam.batches), 0
    for name, composition in who.items():
        for batch in exam.batches:
            step(name, done, total)
            if not set(batch) <= journal.known.get(name, {}).keys():
                journal.write(name, exam.sit(view, composition, batch))
            done += 1
    step("", done, total)
    return [_result(name, exam, journal) for name in who]


def _result(name: str, exam: Exam, journal: Journal) -> Result:
    responses = [journal.known[name][row] for row in range(len(exam.rows))]
    return Result(who=name, responses=responses, scores=scores(exam, responses))


def question(view: PeftModel, exam: Exam) -> str:
    """The name of everything that a response depends on, but for the composition."""
    how = [exam.task, exam.batch_size, exam.max_new_tokens, exam.room, [metric.name for metric in exam.metrics]]
    weight = next(view.get_base_model().parameters())
    return digest(
        fingerprint(view.get_base_model()), weight.dtype, weight.device.type, state_of(view), how, list(exam.rows)
    )


def state_of(view: PeftModel) -> str:
    """Tells adapters apart: SHA-256 of all that a view saves."""
    state = hashlib.sha256()
    for name, value in sorted(view.state_dict().items()):
        state.update(name.encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


# ---- what is said of it ----------------------------------------------------------------------------------------------


def summary(questions: Questions, results: Sequence[Result]) -> dict[str, Any]:
    """Data, metrics and figures, less the single rows."""
    exam = questions.exam
    return {
        "data": {
            "name": questions.name,
            "sha256": questions.fingerprint,
            "format": questions.form.name,
            "rows": len(exam.rows),
            "told": list(questions.told),
        },
        "task": exam.task,
        "max_new_tokens": exam.max_new_tokens,
        **figures_of(results),
    }


def figures_of(results: Sequence[Result]) -> dict[str, Any]:
    """Every composition's scores, and their differences from the base, which is the first."""
    base = results[0].scores
    each = [
        {
            "composition": None if result.who == BASE else result.who,
            "scores": plain(result.scores),
            **({} if result.who == BASE else {"against_base": _against(result.scores, base)}),
        }
        for result in results
    ]
    return {"level": LEVEL, "results": each, "versions": versions()}


def _against(scores: Mapping[str, Score], base: Mapping[str, Score]) -> dict[str, Any]:
    return {
        name: {**figures(score.less(base[name])), "verdict": score.against(base[name])}
        for name, score in scores.items()
    }


def rows(exam: Exam, results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Each row, with what everybody made of it, for the file."""
    for row in range(len(exam.rows)):
        found = {result.who: _plain(exam, result.responses[row]) for result in results}
        yield {"asked": exam.asked(row), "wanted": exam.wanted[row], "found": found}


def _plain(exam: Exam, response: Response) -> dict[str, Any]:
    answer = {} if response.answer is None else {"answer": response.answer}
    loss = {"loss": response.loss, "tokens": response.tokens} if exam.needs_losses else {}
    return {**answer, **loss, **({"right": response.right} if exam.task in CLASSES else {})}


def write(file: Path, values: Mapping[str, Any]) -> None:
    """Writes the report, whole or not at all."""
    with aside(file) as part:
        part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
