"""Intervals hold as often as they say, and differences are rarely claimed where there are none."""

import numpy as np
import pytest

from coadapt.tuning.spread import Scored, difference, front, quantile, spread, surely_beaten, verdicts

Values = np.ndarray


def drawn(random: np.random.Generator, seeds: int, rows: int, of_seed: float, of_row: float, rest: float) -> Values:
    """v[s, r] = a seed's luck + a row's difficulty + what is of both; the true mean is 0."""
    luck, difficulty = random.normal(0, of_seed, (seeds, 1)), random.normal(0, of_row, (1, rows))
    return luck + difficulty + random.normal(0, rest, (seeds, rows))


def scored(values: Values) -> Scored:
    return Scored(values=values, weights=np.ones(values.shape[1]), seeds=tuple(range(len(values))))


def test_quantiles_are_those_of_student_s_table() -> None:
    for freedom, known in ((1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1e9, 1.960)):
        assert quantile(0.975, freedom) == pytest.approx(known, abs=6e-4)


@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_row", "rest"),
    [(3, 1.0, 0.2, 0.2), (3, 0.02, 3.0, 0.5), (3, 0.1, 1.0, 1.0), (5, 0.3, 1.0, 2.0), (2, 0.5, 0.5, 0.5)],
)
def test_an_interval_holds_the_truth_as_often_as_it_says(
    seeds: int, of_seed: float, of_row: float, rest: float
) -> None:
    random, tries = np.random.default_rng(1), 2000
    found = [spread(drawn(random, seeds, 40, of_seed, of_row, rest)) for _ in range(tries)]
    held = sum(one.low <= 0 <= one.high for one in found) / tries
    assert held >= 0.94


def test_intervals_of_rows_alone_are_not_wider_than_the_rows_make_them() -> None:
    random = np.random.default_rng(1)
    values = drawn(random, 3, 200, 0.0, 1.0, 0.0)
    one = spread(values)
    assert (one.high - one.low) / 2 == pytest.approx(1.972 * values[0].std(ddof=1) / np.sqrt(200), rel=1e-3)


def test_a_weighted_mean_is_that_of_all_tokens() -> None:
    random = np.random.default_rng(2)
    losses, tokens = random.random((2, 9)), random.integers(1, 30, 9)
    total = sum((losses[s, r] * tokens[r]) for s in range(2) for r in range(9)) / (2 * tokens.sum())
    assert spread(losses, tokens).mean == pytest.approx(total)
    each = spread(np.repeat(losses, tokens, axis=1))
    assert each.mean == pytest.approx(total)


def test_equal_methods_are_told_apart_no_more_often_than_one_time_in_twenty() -> None:
    random, families, claimed = np.random.default_rng(3), 200, 0
    for _ in range(families):
        shared = drawn(random, 1, 50, 0.0, 2.0, 0.0)
        found = {name: scored(shared + drawn(random, 3, 50, 0.2, 0.0, 0.5)) for name in "abcd"}
        _, told = verdicts(found, higher_is_better=True)
        claimed += any(one.behind is not None and one.behind.clear for one in told.values())
    assert claimed / families <= 0.07


def test_a_small_difference_is_seen_through_a_large_spread_that_both_share() -> None:
    random = np.random.default_rng(4)
    shared = drawn(random, 3, 100, 0.5, 3.0, 0.0)
    one, other = shared + random.normal(0, 0.05, shared.shape), shared + 0.1
    assert not spread(one).clear or abs(spread(one).mean) > 0.1
    gap = difference(other, one)
    assert gap.clear
    assert gap.mean == pytest.approx(0.1, abs=0.03)
    best, told = verdicts({"one": scored(one), "other": scored(other)}, higher_is_better=False)
    assert best == "one"
    assert told["one"].behind is None
    assert told["other"].behind is not None
    assert told["other"].behind.clear
    assert verdicts({"one": scored(one), "other": scored(other)}, higher_is_better=True)[0] == "other"


def test_one_seed_says_nothing_of_others() -> None:
    values = np.linspace(0, 1, 50)[None]
    gap = difference(values + 1.0 + np.linspace(0, 0.01, 50), values)
    assert gap.low > 0.9
    assert not gap.clear


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_what_a_look_at_every_pair_leaves(higher: bool) -> None:
    random = np.random.default_rng(5)
    for _ in range(50):
        names = "abcdefg"
        costs = {n: float(random.integers(1, 6)) for n in names}
        means = {n: float(random.random()) for n in names}

        def better(one: str, other: str, means: dict[str, float] = means) -> bool:
            return means[one] > means[other] if higher else means[one] < means[other]

        left = {n for n in names if not any(costs[o] <= costs[n] and better(o, n) for o in names)}
        found = front(costs, means, higher)
        assert set(found) == left
        assert [costs[n] for n in found] == sorted(costs[n] for n in found)


def test_surely_beaten_is_only_what_something_cheaper_clearly_beats() -> None:
    random = np.random.default_rng(6)
    rows = random.normal(0, 1, (1, 60))
    values = {n: rows + up + random.normal(0, 0.02, (3, 60)) for n, up in (("cheap", 0.0), ("dear", 1.0), ("mad", 2.0))}
    found = {name: scored(v) for name, v in values.items()}
    costs = {"cheap": 1.0, "dear": 2.0, "mad": 0.5}
    assert surely_beaten(costs, found, higher_is_better=False) == {"dear"}  # nothing is as cheap as mad
    assert surely_beaten(costs, found, higher_is_better=True) == {"cheap", "dear"}
