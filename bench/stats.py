"""Fair comparison on a noisy machine: runs that alternate, ratios pair by pair, medians, intervals by resampling."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np


def alternate(rounds: int, actions: Sequence[Callable[[], float]]) -> list[list[float]]:
    """Runs every action once a round, every other round backwards; the results of each action."""
    results: list[list[float]] = [[] for _ in actions]
    for i in range(rounds):
        order = range(len(actions))
        for j in order if i % 2 == 0 else reversed(order):
            results[j].append(actions[j]())
    return results


def pair_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a/b over runs that were neighbours in time."""
    return statistics.median(x / y for x, y in zip(a, b))


def pair_interval(a: Sequence[float], b: Sequence[float], rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of `pair_ratio`: the pairs are drawn again."""
    ratios = np.asarray(a, dtype=float) / np.asarray(b, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(ratios), (rounds, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return float(low), float(high)


def most_of(values: Sequence[float]) -> float:
    """95 % of the values are at most this one of them."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def tps(times: Sequence[tuple[int, float]]) -> float:
    """Tokens per second of the median (tokens, seconds) run."""
    return statistics.median(n / seconds for n, seconds in times)


def bootstrap(groups: Sequence[Sequence[float]], rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the means of the groups, with a 95 % interval: values are drawn again within each group."""
    arrays = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not arrays:
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    draws = [a[rng.integers(0, len(a), (rounds, len(a)))].mean(axis=1) for a in arrays]
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    return float(np.mean([a.mean() for a in arrays])), float(low), float(high)


def standard_error(groups: Sequence[Sequence[float]]) -> float:
    """Of the mean of the means of the groups; NaN with a single value in one of them."""
    if not groups or min(map(len, groups)) < 2:
        return float("nan")
    return sum(statistics.variance(group) / len(group) for group in groups) ** 0.5 / len(groups)


def wilson(hits: int, n: int) -> tuple[float, float, float]:
    """A share with its 95 % interval by Wilson, which is honest with few values and at 0 and 1."""
    if not n:
        return float("nan"), float("nan"), float("nan")
    z, share = 1.96, hits / n
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return share, max(low, 0.0), min(high, 1.0)
