"""How well a figure is known: a mean over examples, the share of them that is right, the difference of two models.

The examples are what is drawn at random, so they are what is resampled; a model's own luck (its seed) is in none of
these intervals.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
Reading = Callable[[Values], Values]
"""What is made of a mean, as exp for perplexity."""

LEVEL = 0.95
RESAMPLES = 2000
FEWEST = 6
"""Examples below which no difference is claimed: in a sign test of 5 pairs even 5 of 5 has p = 0.06."""
CELLS = 2**22
"""Numbers drawn at once, so that many rows need no more memory."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its interval."""

    mean: float
    low: float
    high: float
    n: int
    """Examples that it was found on."""
    level: float = LEVEL

    @property
    def clear(self) -> bool:
        """Of a difference: whether 0 is outside of the interval, on enough examples to say so."""
        return self.n >= FEWEST and not self.low <= 0 <= self.high


def share(right: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """The share of ones among zeros and ones (n,), with Wilson's score interval (1927).

    Raises:
        ValueError: there are no examples, or other values.
    """
    values = _column(right)
    _refuse_other_than_binary(values)
    low, high = _wilson(float(values.mean()), len(values), level)
    return Estimate(mean=float(values.mean()), low=low, high=high, n=len(values), level=level)


def mean(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    reading: Reading = np.asarray,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """reading(sum w v / sum w) of examples (n,), with the bootstrap's percentile interval (Efron 1979).

    Whole examples are drawn, each with its weight, so tokens of one example are not taken for independent.

    Raises:
        ValueError: there are no examples, or not as many weights.
    """
    v = _column(values)
    w = _weights(weights, len(v))
    drawn = np.concatenate([reading(_means(v, w, rows)) for rows in _draws(len(v), resamples, seed)])
    low, high = _percentiles(drawn, level)
    return Estimate(mean=float(reading(_mean(v, w))), low=low, high=high, n=len(v), level=level)


def difference(
    values: ArrayLike,
    base: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    reading: Reading = np.asarray,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """`values` less `base`, both (n,) of the same examples: each draw takes the same rows of both.

    Raises:
        ValueError: there are no examples, or not as many of both.
    """
    v, b = _pair(values, base)
    w = _weights(weights, len(v))
    drawn = [reading(_means(v, w, rows)) - reading(_means(b, w, rows)) for rows in _draws(len(v), resamples, seed)]
    low, high = _percentiles(np.concatenate(drawn), level)
    found = float(reading(_mean(v, w)) - reading(_mean(b, w)))
    return Estimate(mean=found, low=low, high=high, n=len(v), level=level)


def share_difference(right: ArrayLike, base: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """The difference of two shares of the same examples (n,), with Newcombe's interval for pairs (1998, method 10).

    It is made of the two Wilson intervals and the correlation of the pairs, and unlike the bootstrap's it does not
    shrink to a point where all pairs are alike.

    Raises:
        ValueError: there are no examples, not as many of both, or other values than 0 and 1.
    """
    v, b = _pair(right, base)
    _refuse_other_than_binary(v)
    _refuse_other_than_binary(b)
    p, q = float(v.mean()), float(b.mean())
    (p_low, p_high), (q_low, q_high) = _wilson(p, len(v), level), _wilson(q, len(b), level)
    phi = _correlation(v, b)
    found = p - q
    low = found - math.sqrt(max(0.0, (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2))
    high = found + math.sqrt(max(0.0, (p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2))
    return Estimate(mean=found, low=low, high=high, n=len(v), level=level)


def _correlation(v: Values, b: Values) -> float:
    """phi of the table of pairs, with Newcombe's correction for continuity where it is positive."""
    n = len(v)
    both, first, second = float(v @ b), float(v @ (1 - b)), float((1 - v) @ b)
    neither = n - both - first - second
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if not margins:
        return 0.0
    found = both * neither - first * second
    return (max(found - n / 2, 0.0) if found > 0 else found) / math.sqrt(margins)


def _wilson(p: float, n: int, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    # All or nothing is an end of its own interval; rounding alone would say otherwise.
    return min(max(low, 0.0), p), max(min(high, 1.0), p)


def _draws(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Rows of as many draws of n out of n, some draws at a time: (draws, n)."""
    random, at_once = np.random.default_rng(seed), max(1, CELLS // n)
    for done in range(0, resamples, at_once):
        yield random.integers(0, n, (min(at_once, resamples - done), n))


def _means(v: Values, w: Values, rows: NDArray[np.int64]) -> Values:
    return (v * w)[rows].sum(1) / w[rows].sum(1)


def _mean(v: Values, w: Values) -> Values:
    return np.asarray((v @ w) / w.sum())


def _percentiles(drawn: Values, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _column(values: ArrayLike) -> Values:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(
            f"One value for each example is needed, and at least one example; got the shape {found.shape}."
        )
    return found


def _pair(values: ArrayLike, base: ArrayLike) -> tuple[Values, Values]:
    v, b = _column(values), _column(base)
    if len(v) != len(b):
        raise ValueError(f"A difference needs the same examples on both sides; there are {len(v)} and {len(b)}.")
    return v, b


def _weights(weights: ArrayLike | None, n: int) -> Values:
    w = np.ones(n) if weights is None else _column(weights)
    if len(w) != n or not (w > 0).all():
        raise ValueError(f"Each of the {n} examples needs a weight above 0; there are {len(w)}, the least {w.min()}.")
    return w


def _refuse_other_than_binary(values: Values) -> None:
    if strange := sorted(set(values.tolist()) - {0.0, 1.0}):
        raise ValueError(f"A share is of examples that are right (1) or not (0); got {strange[0]}.")
