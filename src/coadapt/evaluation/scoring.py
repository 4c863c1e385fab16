"""From responses to scores: each metric's values, row by row, their mean, and the difference from another model's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from coadapt.evaluation import intervals
from coadapt.evaluation.exam import Exam
from coadapt.evaluation.intervals import Estimate, Values
from coadapt.evaluation.metrics import Metric, Response, Verdict
from coadapt.model import PeftModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """One metric of one composition."""

    metric: Metric
    values: Values
    """(n,) of each row."""
    weights: Values
    """(n,) how much each row counts: by its tokens, or all alike."""

    @property
    def _alike(self) -> bool:
        """Whether it is a share of rows that are right."""
        return self.metric.proportion and bool((self.weights == 1).all())

    @cached_property
    def estimate(self) -> Estimate:
        """The figure: Wilson's interval of a share, otherwise the bootstrap's."""
        if self._alike:
            return intervals.share(self.values)
        return intervals.mean(self.values, self.weights, reading=self.metric.reading)

    def less(self, base: "Score") -> Estimate:
        """This figure less that of another model on the same rows, row by row.

        Raises:
            ValueError: it is of another metric, or of other rows.
        """
        if base.metric.name != self.metric.name or not np.array_equal(base.weights, self.weights):
            raise ValueError(
                f"{self.metric.name} and {base.metric.name}: a difference is of one metric and the same rows."
            )
        if self._alike:
            return intervals.share_difference(self.values, base.values)
        return intervals.difference(self.values, base.values, self.weights, reading=self.metric.reading)

    def against(self, base: "Score") -> Verdict:
        """What can be said: better or worse only where the interval of the difference leaves out 0."""
        found = self.less(base)
        if not found.clear:
            return "within the spread"
        return "better" if (found.mean > 0) == self.metric.higher_is_better else "worse"


def score(view: PeftModel, exam: Exam, composition: Any = None) -> dict[str, Score]:
    """The scores of a composition, by metric; None: of the base alone.

    Raises:
        ValueError: the view has no such adapter, or a loss is not finite.
    """
    found: dict[int, Response] = {}
    for batch in exam.batches:
        found |= exam.sit(view, composition, batch)
    return scores(exam, [found[row] for row in range(len(exam.rows))])


def scores(exam: Exam, responses: Sequence[Response]) -> dict[str, Score]:
    """The scores of responses, one for each row of the exam, in its order."""
    return {metric.name: _score(metric, responses, exam.wanted) for metric in exam.metrics}


def _score(metric: Metric, responses: Sequence[Response], wanted: Sequence[str]) -> Score:
    values = np.array([metric.value(response, text) for response, text in zip(responses, wanted, strict=True)])
    if lost := [row for row, value in enumerate(values.tolist()) if not np.isfinite(value)]:
        raise ValueError(
            f"{metric.name} is not finite in {len(lost)} of {len(values)} rows (the first: {lost[0]}). A base in "
            "float16 overflows so; load it in float32 or bfloat16."
        )
    return Score(metric=metric, values=values, weights=np.array([metric.weight(response) for response in responses]))


def plain(of: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """Figures for JSON."""
    return {name: figures(score.estimate) for name, score in of.items()}


def figures(estimate: Estimate) -> dict[str, float]:
    """An estimate for JSON."""
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n}
