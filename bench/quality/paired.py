"""Intervals by paired bootstrap: samples are drawn again, and every system is looked at on the same draw.

What is compared are means over groups (tasks) of means over the samples of a group. Samples are drawn within their group: the
groups stand for themselves, not for others of their kind. Sharing the draw takes out what makes a sample easy or hard for all
systems, and is what a difference of two of them needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 4000
NONE, FEW = "no difference", "too few samples"  # what an interval says if it does not leave out zero
LEAST = 6  # samples in all: of fewer, chance gives an interval without zero more often than one time in twenty


class Interval(NamedTuple):
    """95 %. Without ends (NaN) where a group has a single sample, which cannot be drawn again."""

    value: float
    low: float
    high: float

    def row(self, name: str) -> dict[str, float]:
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    @property
    def without_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Paired:
    """Systems on the same samples."""

    def __init__(self, groups: Sequence[np.ndarray], rounds: int = ROUNDS, seed: int = 0):
        """`groups`: [samples, systems] each, numbers only.

        Raises:
            ValueError: there is no group, or one has no sample.
        """
        if not groups or min(map(len, groups)) == 0:
            raise ValueError("expected one group or more, with one sample or more in each")
        rng = np.random.default_rng(seed)
        self.n = sum(map(len, groups))
        self.n_groups = len(groups)
        self.means = np.mean([group.mean(axis=0) for group in groups], axis=0)  # [systems]
        draws = [rng.multinomial(len(g), [1 / len(g)] * len(g), rounds) @ g / len(g) for g in groups]
        self.draws = np.mean(draws, axis=0)  # [rounds, systems]
        self._repeats = min(map(len, groups)) > 1

    @property
    def enough(self) -> bool:
        """Whether an interval without zero says something."""
        return self._repeats and self.n >= LEAST

    def interval(self, what: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """Of a function of the means [..., systems]. Draws for which it is no number (a quotient by zero) are left out."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value, drawn = float(what(self.means)), what(self.draws)
        drawn = drawn[np.isfinite(drawn)]
        if not self._repeats or not len(drawn):
            return Interval(value, math.nan, math.nan)
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Interval(value, float(low), float(high))

    def mean(self, i: int) -> Interval:
        return self.interval(lambda m: m[..., i])

    def share(self, i: int, of: int) -> Interval:
        return self.interval(lambda m: m[..., i] / m[..., of])

    def difference(self, i: int, j: int) -> Interval:
        return self.interval(lambda m: m[..., i] - m[..., j])

    def share_difference(self, i: int, j: int, of: int) -> Interval:
        """Of two shares of the same whole."""
        return self.interval(lambda m: (m[..., i] - m[..., j]) / m[..., of])
