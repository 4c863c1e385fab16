"""How sure a score is: means over seeds and rows, and differences of two methods on the same seeds and rows.

Two things are drawn at random and could have been drawn otherwise: the seed of a training, and the rows that it is
scored on. With v[s, r] the score of row r after the training of seed s, S seeds and R rows, half of the interval is

    sqrt( t(S - 1)^2 Var_s(mean_r v) / S  +  t(R - 1)^2 Var_r(mean_s v) / R )

with Student's t of each part's own degrees of freedom (the intervals of both parts, put together as in Zou and Donner
2008). What depends on both is counted twice, so it is too wide rather than too narrow. A difference is taken row by row
and seed by seed first, so that what both methods share (a hard row, a bad order of the rows) is not in it. One seed
tells nothing of others, so nothing is told from it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean, and the interval that holds it with the probability `level`."""

    mean: float
    low: float
    high: float
    seeds: int
    rows: int
    level: float = LEVEL

    @property
    def clear(self) -> bool:
        """Of a difference: whether the interval, from several seeds, leaves out 0."""
        return self.seeds > 1 and not self.low <= 0 <= self.high


def spread(values: ArrayLike, weights: ArrayLike | None = None, level: float = LEVEL) -> Spread:
    """The mean over seeds and rows of `values`, (S, R), rows weighed by `weights`, (R,).

    Of one seed the interval is that of the rows alone.
    """
    v = np.atleast_2d(np.asarray(values, dtype=np.float64))
    seeds, rows = v.shape
    w = np.ones(rows) if weights is None else np.asarray(weights, dtype=np.float64)
    w = w / w.mean()
    by_seed = (v * w).mean(1)
    mean = float(by_seed.mean())
    residual = w * (v.mean(0) - mean)  # of a mean of ratios, to first order
    parts = [(_square(by_seed), seeds - 1), (_square(residual), rows - 1)]
    half = math.sqrt(sum((quantile((1 + level) / 2, freedom) ** 2) * error for error, freedom in parts if error))
    return Spread(mean=mean, low=mean - half, high=mean + half, seeds=seeds, rows=rows, level=level)


def difference(one: ArrayLike, other: ArrayLike, weights: ArrayLike | None = None, level: float = LEVEL) -> Spread:
    """`one` less `other`, both (S, R) with the same seeds and rows."""
    return spread(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64), weights, level)


def _square(values: NDArray[np.float64]) -> float:
    """The squared error of a mean of independent values."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


@cache
def quantile(probability: float, freedom: float) -> float:
    """Of Student's t distribution, whose density in x = sqrt(n) tan(a) is as cos(a)^(n - 1)."""
    angles = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    freedom = min(freedom, 1e5)  # a normal distribution, to five digits
    density = np.cos(angles).clip(0) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(probability * below[-1], below, angles)))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the trainings of one method came to on the held-out rows."""

    values: NDArray[np.float64]
    """(S, R)"""
    weights: NDArray[np.float64]
    """(R,)"""
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A method beside the best one."""

    score: Spread
    behind: Spread | None
    """How much it is behind the best (above 0: worse); None of the best itself, and where they have no seed in
    common."""


def verdicts(found: Mapping[str, Scored], higher_is_better: bool) -> tuple[str, dict[str, Verdict]]:
    """(the best mean, method -> its verdict), the best first.

    All differences from the best hold together with the probability `LEVEL` (Bonferroni 1936): there are as many of
    them as methods less one, and one of twenty would else be claimed of nothing.
    """
    scores = {name: spread(one.values, one.weights) for name, one in found.items()}
    order = sorted(scores, key=lambda name: scores[name].mean, reverse=higher_is_better)
    best = order[0]
    level = 1 - (1 - LEVEL) / max(len(order) - 1, 1)
    told = {
        name: Verdict(
            score=scores[name],
            behind=None if name == best else behind(found[name], found[best], higher_is_better, level),
        )
        for name in order
    }
    return best, told


def behind(one: Scored, other: Scored, higher_is_better: bool, level: float = LEVEL) -> Spread | None:
    """How much `one` is worse than `other`, on the seeds that both have."""
    common = [seed for seed in one.seeds if seed in other.seeds]
    if not common:
        return None
    mine, its = (each.values[[each.seeds.index(seed) for seed in common]] for each in (one, other))
    return difference(its, mine, one.weights, level) if higher_is_better else difference(mine, its, one.weights, level)


def front(costs: Mapping[str, float], means: Mapping[str, float], higher_is_better: bool) -> list[str]:
    """The methods whose mean no other reaches at the same cost or less, the cheapest first (Pareto's front)."""
    sign = -1.0 if higher_is_better else 1.0
    kept: list[str] = []
    for name in sorted(costs, key=lambda name: (costs[name], sign * means[name])):
        if not kept or sign * means[name] < sign * means[kept[-1]]:
            kept.append(name)
    return kept


def surely_beaten(costs: Mapping[str, float], found: Mapping[str, Scored], higher_is_better: bool) -> set[str]:
    """The methods for which there is a clearly better one at the same cost or less. All pairs hold together."""
    pairs = max(len(found) * (len(found) - 1) // 2, 1)
    level = 1 - (1 - LEVEL) / pairs
    return {
        name
        for name in found
        for other in found
        if other != name and costs[other] <= costs[name]
        if (gap := behind(found[name], found[other], higher_is_better, level)) and gap.clear and gap.mean > 0
    }
