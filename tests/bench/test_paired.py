"""The paired bootstrap against all draws there are, and against what is known of means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from indexmem_edge.bench.quality.paired import Paired


def all_draws(groups: list[np.ndarray]) -> np.ndarray:
    """[draws, systems]: means of every way to draw the samples of each group again."""
    each = [
        [group[list(pick)].mean(axis=0) for pick in itertools.product(range(len(group)), repeat=len(group))]
        for group in groups
    ]
    return np.array([np.mean(picked, axis=0) for picked in itertools.product(*each)])


RNG = np.random.default_rng(5)
GROUPS = [RNG.uniform(1, 2, (4, 3)), RNG.uniform(0, 1, (3, 3))]


@pytest.mark.parametrize(
    ("found", "formula"),
    [
        (lambda p: p.mean(1), lambda m: m[..., 1]),
        (lambda p: p.share(1, 0), lambda m: m[..., 1] / m[..., 0]),
        (lambda p: p.difference(2, 1), lambda m: m[..., 2] - m[..., 1]),
        (lambda p: p.share_difference(2, 1, 0), lambda m: (m[..., 2] - m[..., 1]) / m[..., 0]),
    ],
)
def test_intervals_are_those_of_all_draws(found: Callable, formula: Callable) -> None:
    interval = found(Paired(GROUPS, rounds=200_000))
    means = np.mean([g.mean(axis=0) for g in GROUPS], axis=0)
    every = formula(all_draws(GROUPS))  # 256 x 27 of them
    assert interval.value == pytest.approx(formula(means))
    assert (interval.low, interval.high) == pytest.approx(np.percentile(every, [2.5, 97.5]), abs=0.01 * np.ptp(every))


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3, 2, (400, 1))
    interval = Paired([values]).mean(0)
    error = values.std() / math.sqrt(400)
    assert interval.low == pytest.approx(interval.value - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(interval.value + 1.96 * error, abs=0.15 * error)


def test_groups_count_alike_and_their_errors_add() -> None:
    rng = np.random.default_rng(2)
    large, small = rng.normal(0, 1, (400, 1)), rng.normal(10, 1, (100, 1))
    interval = Paired([large, small]).mean(0)
    assert interval.value == pytest.approx((large.mean() + small.mean()) / 2)
    error = math.sqrt(large.var() / 400 + small.var() / 100) / 2
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_both_of_a_pair_see_the_same_draw() -> None:
    hard = np.random.default_rng(3).normal(0, 5, (50, 1))
    paired = Paired([np.hstack([hard, hard + 0.25])])
    difference = paired.difference(1, 0)
    assert difference == pytest.approx((0.25, 0.25, 0.25)) and difference.without_zero
    assert paired.mean(0).high - paired.mean(0).low > 1 and not paired.mean(0).without_zero


def test_single_samples_have_no_interval_and_few_prove_nothing() -> None:
    one = Paired([np.ones((5, 2)), np.ones((1, 2))])
    assert one.mean(0).value == 1 and math.isnan(one.mean(0).low) and not one.mean(0).without_zero and not one.enough
    assert not Paired([np.ones((5, 2))]).enough and Paired([np.ones((3, 2))] * 2).enough
    for nothing in ([], [np.ones((0, 2))]):
        with pytest.raises(ValueError, match="one sample or more"):
            Paired(nothing)


def test_draws_without_a_whole_are_left_out_of_shares() -> None:
    paired = Paired([np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])])
    assert paired.share(1, 0).value == 0.5 and 0 <= paired.share(1, 0).low <= paired.share(1, 0).high <= 1
    nothing = Paired([np.zeros((3, 2))]).share(1, 0)
    assert math.isnan(nothing.value) and math.isnan(nothing.low)


def test_the_same_data_gives_the_same_interval() -> None:
    assert Paired(GROUPS).share(1, 0) == Paired(GROUPS).share(1, 0)
