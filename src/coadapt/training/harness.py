"""Tasks of lm-evaluation-harness (`lm_eval`), put to a base and its adapters; their values, row by row, as scores."""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from coadapt.core.base import fingerprint
from coadapt.evaluation.journal import Journal, digest
from coadapt.evaluation.metrics import Metric
from coadapt.evaluation.scoring import Score
from coadapt.model import PeftModel
from coadapt.training.evaluate import Result, Step, state_of
from coadapt.training.load import Ready

BACKENDS = {"causal-lm": "causal", "seq2seq": "seq2seq"}
Columns = dict[str, list[float]]
"""Metric -> the value of each row."""


class Harness:
    """The tasks, and the model as `lm_eval` asks it.

    Args:
        tasks: names of tasks or groups, or YAML files that describe one.
        limit: rows of each task, the first ones.

    Raises:
        ValueError: `lm_eval` is missing, there is no such task, or the model is a classifier.
        OSError: a task's data is not here, and cannot be reached.
    """

    def __init__(self, ready: Ready, tasks: Sequence[str], *, limit: int | None, batch_size: int) -> None:
        check_installed()
        if ready.task not in BACKENDS:
            raise ValueError(f"--lm-eval asks language models; this one is for {ready.task}.")
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it advises against passing a model, which it takes
        self.tasks, self.limit = list(tasks), limit
        self.chat = ready.trained and ready.framing.style == "chat"
        self.manager = TaskManager(verbosity="ERROR")
        try:
            self.manager.load(self.tasks)
        except KeyError as error:
            raise ValueError(f"lm_eval: {error.args[0]}") from error
        self.model = HFLM(
            pretrained=ready.model, tokenizer=ready.tokenizer, backend=BACKENDS[ready.task], batch_size=batch_size
        )

    def question(self, view: PeftModel) -> str:
        """The name of everything that the values depend on, but for the composition."""
        return digest(fingerprint(view.get_base_model()), state_of(view), self.tasks, self.limit, self.chat)

    def run(self, view: PeftModel, who: Mapping[str, Any], journal: Journal, step: Step) -> list[Result]:
        """Each composition on all tasks, by the metrics that are means over rows. What the journal knows is not asked.

        Raises:
            ValueError: the tasks have no such metric.
        """
        better: dict[str, bool] = {}
        for number, (name, composition) in enumerate(who.items()):
            step(name, number, len(who))
            if name not in journal.columns:
                with view.disable_adapter() if composition is None else view.using(composition):
                    journal.write_columns(name, self._asked())
            better |= dict(journal.columns[name]["higher_is_better"])
        step("", len(who), len(who))
        columns: dict[str, Columns] = {name: journal.columns[name]["values"] for name in who}
        return [Result(who=name, responses=(), scores=_scores(columns, name, better)) for name in who]

    def _asked(self) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

        tasks = self.manager.load(self.tasks)["tasks"]
        found: Any = evaluate(
            self.model,
            tasks,
            limit=self.limit,
            bootstrap_iters=0,
            apply_chat_template=self.chat,
            verbosity="ERROR",
        )
        values: Columns = {}
        better: dict[str, bool] = {}
        for task, samples in found["samples"].items():
            filters = {sample["filter"] for sample in samples}
            means = {metric for metric, how in tasks[task].aggregation().items() if how.__name__ == "mean"}
            for sample in samples:
                for metric in sorted(means & set(sample["metrics"])):
                    name = f"{task} {metric}" + (f" ({sample['filter']})" if len(filters) > 1 else "")
                    values.setdefault(name, []).append(float(sample[metric]))
                    better[name] = bool(found["higher_is_better"][task].get(metric, True))
        if not values:
            raise ValueError(f"No metric of {', '.join(self.tasks)} is a mean over rows, so none has an interval.")
        return {"values": values, "higher_is_better": better}


def check_installed() -> None:
    """Raises a ValueError with the command where `lm_eval` is missing."""
    if find_spec("lm_eval") is None:
        raise ValueError("--lm-eval needs the package lm_eval: pip install 'coadapt[lm-eval]'")


def _scores(columns: Mapping[str, Columns], who: str, better: Mapping[str, bool]) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for name, values in columns[who].items():
        binary = all(set(one[name]) <= {0.0, 1.0} for one in columns.values())
        metric = Metric(
            name=name, tasks=(), value=lambda *_: 0.0, proportion=binary, higher_is_better=better.get(name, True)
        )
        found[name] = Score(metric=metric, values=np.array(values), weights=np.ones(len(values)))
    return found
