"""Intervals against published figures, a naive second computation, and how often they hold."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from coadapt.evaluation import intervals


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_share_s_interval_is_the_published_one(right: int, n: int, low: float, high: float) -> None:
    """Table I of Newcombe (1998), Statistics in Medicine 17:857, method 3."""
    found = intervals.share([1] * right + [0] * (n - right))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.mean == right / n
    assert found.n == n


def test_all_or_nothing_is_an_end_of_its_own_interval() -> None:
    none, every = intervals.share([0] * 40), intervals.share([1] * 40)
    assert none.low == none.mean == 0
    assert every.high == every.mean == 1
    assert none.high == pytest.approx(1 - every.low) == pytest.approx(1.959964**2 / (40 + 1.959964**2))


def test_the_mean_s_interval_is_the_normal_one_where_rows_are_many() -> None:
    values = np.random.default_rng(0).exponential(2.0, 3000)
    found = intervals.mean(values)
    half = NormalDist().inv_cdf(0.975) * values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), rel=0.01)


def test_weights_and_readings_as_one_by_one() -> None:
    """Perplexity: the draws of a plain loop, and exp of the ends."""
    random = np.random.default_rng(1)
    losses, tokens = random.uniform(1, 3, 12), random.integers(1, 30, 12).astype(float)
    found = intervals.mean(losses, tokens, reading=np.exp, resamples=500, seed=7)
    rows = np.random.default_rng(7).integers(0, 12, (500, 12))
    naive = [sum(losses[i] * tokens[i] for i in draw) / sum(tokens[i] for i in draw) for draw in rows]
    assert found.mean == pytest.approx(math.exp(sum(losses * tokens) / sum(tokens)))
    assert found.low == pytest.approx(np.quantile(np.exp(naive), 0.025))
    assert found.high == pytest.approx(np.quantile(np.exp(naive), 0.975))


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=50)
    whole = intervals.mean(values)
    monkeypatch.setattr(intervals, "CELLS", 130)
    assert intervals.mean(values) == whole


def test_pairs_are_told_apart_where_two_means_are_not() -> None:
    random = np.random.default_rng(3)
    base = random.normal(5, 3, 60)
    better = base + 0.3 + random.normal(0, 0.1, 60)
    one, other = intervals.mean(better), intervals.mean(base)
    assert one.low < other.high  # apart, they say nothing
    found = intervals.difference(better, base)
    assert found.clear
    assert found.mean == pytest.approx((better - base).mean())
    assert found.low < 0.3 < found.high


def share_of_hits(rounds: int, draw: object, truth: float) -> float:
    return sum(found.low <= truth <= found.high for found in (draw() for _ in range(rounds))) / rounds  # type: ignore[operator]


def test_intervals_of_95_percent_hold_about_95_percent_of_the_time() -> None:
    random = np.random.default_rng(4)

    def share() -> intervals.Estimate:
        return intervals.share(random.random(30) < 0.85)

    def mean() -> intervals.Estimate:
        return intervals.mean(random.exponential(1.0, 60), resamples=400)

    def paired() -> intervals.Estimate:
        level = random.random(40)  # how hard a question is, for both
        return intervals.share_difference(
            level + random.normal(0, 0.3, 40) < 0.8, level + random.normal(0, 0.3, 40) < 0.5
        )

    hard = np.random.default_rng(5).random(200_000)
    noise = np.random.default_rng(6).normal(0, 0.3, 200_000)
    truth = float((hard + noise < 0.8).mean() - (hard + noise < 0.5).mean())
    assert 0.92 <= share_of_hits(600, share, 0.85) <= 0.985
    assert 0.89 <= share_of_hits(600, mean, 1.0) <= 0.97
    assert 0.92 <= share_of_hits(600, paired, truth) <= 0.99


def test_pairs_without_a_correlation_add_up_in_squares() -> None:
    """With phi = 0 the interval is that of two independent samples: the two halves, squared and added."""
    right, base = [1, 1, 0, 0] * 10, [1, 0, 1, 0] * 10
    found, one = intervals.share_difference(right, base), intervals.share(right)
    half = math.hypot(one.mean - one.low, one.high - one.mean)
    assert (found.mean, found.low, found.high) == pytest.approx((0, -half, half))


def test_pairs_that_are_alike_still_have_a_spread() -> None:
    found = intervals.share_difference([1] * 40, [0] * 40)
    assert found.mean == found.high == 1
    assert 0.85 < found.low < 0.9
    assert found.clear
    assert not intervals.share_difference([1, 0] * 20, [1, 0] * 20).clear


def test_nothing_is_claimed_of_a_handful() -> None:
    assert not intervals.difference([1.0, 2, 3, 4, 5], [0.0, 1, 2, 3, 4]).clear
    assert intervals.difference([1.0, 2, 3, 4, 5, 6], [0.0, 1, 2, 3, 4, 5]).clear


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: intervals.mean([]), "at least one example"),
        (lambda: intervals.share([0.5, 1]), "right \\(1\\) or not \\(0\\); got 0.5"),
        (lambda: intervals.difference([1.0, 2.0], [1.0]), "there are 2 and 1"),
        (lambda: intervals.mean([1.0, 2.0], [1.0, 0.0]), "a weight above 0"),
    ],
)
def test_what_cannot_be_reckoned_is_refused(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()  # type: ignore[operator]
