"""What an answer, or a probability, is worth: one row for each metric."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from coadapt.config import did_you_mean
from coadapt.evaluation.intervals import Reading

LANGUAGE = ("causal-lm", "seq2seq")
CLASSES = ("sequence-classification", "token-classification", "image-classification")
EXTRA = "pip install 'coadapt[eval]'"


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a model made of one row."""

    loss: float = 0.0
    """The sum of its trained tokens' cross entropies, or that of its class."""
    tokens: int = 1
    """How many tokens (tags, classes) that is the sum of."""
    right: int = 0
    """How many of them were the likeliest; of language models not counted."""
    answer: str | None = None
    """What it went on with, greedily; the class or the tags that it chose. None where it was not asked."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a response becomes a value with a weight, and many of them a figure."""

    name: str
    tasks: tuple[str, ...]
    value: Callable[[Response, str], float]
    """Response, wanted answer -> value."""
    weight: Callable[[Response], float] = lambda response: 1.0
    generates: bool = False
    """Whether answers are needed; otherwise losses are."""
    proportion: bool = False
    """Whether values are 0 or 1, as long as each row weighs the same."""
    higher_is_better: bool = True
    reading: Reading = np.asarray
    """What is made of the mean."""
    judges: Callable[[str], bool] = lambda wanted: True
    """Whether it can tell anything of answers where this one is wanted."""
    package: str | None = None
    """A library that it needs, which is not among coadapt's own."""


def exact_match(answer: str, wanted: str) -> float:
    """1 where both are the same, apart from white space around them; else 0."""
    return float(answer.strip() == wanted.strip())


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def _rouge_metric(name: str) -> Metric:
    def value(response: Response, wanted: str) -> float:
        return float(_rouge().score(wanted, response.answer or "")[name].fmeasure)

    def judges(wanted: str) -> bool:
        return re.search(r"[a-z0-9]", wanted.lower()) is not None  # its tokenizer drops everything else

    return Metric(name=name, tasks=LANGUAGE, value=value, generates=True, judges=judges, package="rouge_score")


_ALL = (
    Metric(
        name="exact_match",
        tasks=LANGUAGE,
        value=lambda response, wanted: exact_match(response.answer or "", wanted),
        generates=True,
        proportion=True,
    ),
    Metric(
        name="accuracy",
        tasks=CLASSES,
        value=lambda response, wanted: response.right / response.tokens,
        weight=lambda response: float(response.tokens),
        proportion=True,
    ),
    Metric(
        name="perplexity",
        tasks=LANGUAGE,
        value=lambda response, wanted: response.loss / response.tokens,
        weight=lambda response: float(response.tokens),
        higher_is_better=False,
        reading=np.exp,
    ),
    Metric(
        name="loss",
        tasks=(*LANGUAGE, *CLASSES),
        value=lambda response, wanted: response.loss / response.tokens,
        weight=lambda response: float(response.tokens),
        higher_is_better=False,
    ),
    *(_rouge_metric(name) for name in ("rouge1", "rouge2", "rougeL")),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}
GROUPS: Mapping[str, Sequence[str]] = {"rouge": ("rouge1", "rouge2", "rougeL")}
"""Names for several at once."""


def usual(task: str, asks: bool) -> list[Metric]:
    """The metrics of a task where none are named; `asks`: whether its rows have prompts that can be answered."""
    if task in CLASSES:
        return [METRICS["accuracy"], METRICS["loss"]]
    return [*([METRICS["exact_match"]] if asks else []), METRICS["perplexity"]]


def chosen(names: Iterable[str], task: str, asks: bool) -> list[Metric]:
    """The metrics of these names, or the usual ones.

    Raises:
        ValueError: there is none of that name, it has no meaning for the task or the rows, or its library is missing.
    """
    asked = [one for name in names for one in GROUPS.get(name, (name,))]
    if not asked:
        return usual(task, asks)
    for name in asked:
        _check(name, task, asks)
    return [METRICS[name] for name in dict.fromkeys(asked)]


def _check(name: str, task: str, asks: bool) -> None:
    known = [*METRICS, *GROUPS]
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}.")
    metric = METRICS[name]
    fitting = [m.name for m in _ALL if task in m.tasks and (asks or not m.generates)]
    if task not in metric.tasks:
        raise ValueError(f"{name} has no meaning for {task}; choose among {', '.join(fitting)}.")
    if metric.generates and not asks:
        raise ValueError(
            f"{name} compares answers, and these rows are texts without a prompt; choose among {', '.join(fitting)}."
        )
    if metric.package is not None and find_spec(metric.package) is None:
        raise ValueError(f"{name} needs the package {metric.package}: {EXTRA}")


Verdict = Literal["better", "worse", "within the spread"]
