"""Two contexts past their budgets that take turns: how fast is the one, for every token per second of the other?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report import Row, Verdict
from ..runner import BenchError, Model, Setup, System
from ..stats import alternate, pair_interval, pair_ratio
from ..text import TokenStream, read_text

N_CHARS = 50_000  # of the text, fed over and over
LEAST = 32  # decoded tokens of one turn, rounded up to whole cycles of eviction
HOW = "figures are medians, ratios medians of the pairwise ratios, with 95 % intervals by drawing the pairs again"


class Side:
    """A context that has gone past its budget, with the text that it goes on with."""

    def __init__(self, system: System, corpus: list[int], depth: int):
        self.system, self.stream = system, TokenStream(corpus)
        system.feed(self.stream.take(depth), last_logits=True)
        self.turn = whole_cycles(system.evict_step())
        self.decode()  # once, so that nothing is measured cold

    def decode(self) -> float:
        """Tokens per second of one turn of greedy steps."""
        return self.turn / sum(self.system.decode(self.turn, self.system.greedy()))

    def prefill(self) -> float:
        """Tokens per second of one ubatch."""
        size = self.system.setup.ubatch
        return size / sum(seconds for _, seconds in self.system.feed(self.stream.take(size)))


@dataclass(frozen=True)
class Turns:
    """Tokens per second of each turn of both sides."""

    decode: Sequence[Sequence[float]]
    prefill: Sequence[Sequence[float]]

    def figures(self, side: int = 1) -> Row:
        """Of one side, and against the first."""
        row: Row = {}
        for name, speeds in (("decode", self.decode), ("prefill", self.prefill)):
            base, mine = speeds[0], speeds[side]
            row[f"{name}_tps"] = statistics.median(mine)
            row[f"{name}_ratio"] = pair_ratio(mine, base)
            row[f"{name}_interval"] = pair_interval(mine, base)
        return row


def take_turns(base: Side, other: Side, rounds: int, prefill_rounds: int) -> Turns:
    return Turns(
        alternate(rounds, [base.decode, other.decode]),
        alternate(prefill_rounds, [base.prefill, other.prefill]),
    )


def whole_cycles(evict_step: int) -> int:
    """The least number of tokens, LEAST or more, after which the cache is as full as before."""
    step = max(evict_step, 1)
    return -(-LEAST // step) * step


def past_budget(setup: Setup, depth: int) -> int:
    """The depth to measure at; 0 stands for the budget and one ubatch."""
    depth = depth or setup.budget + setup.ubatch
    if depth <= setup.budget:
        raise BenchError(f"a depth of {depth} is not past the budget of {setup.budget}: nothing would be evicted")
    return depth


def corpus_of(model: Model, text: Path | None) -> list[int]:
    return model.tokens(read_text(text, N_CHARS)[:N_CHARS])


def verdict(row: Row, key: str, what: str, goal: float | None) -> Verdict:
    """A ratio of a row with its interval."""
    low, high = row[key.replace("ratio", "interval")]
    return Verdict(f"{key.partition('_')[0]} {what} ({low:.3f} to {high:.3f})", row[key], goal)


def plot_ratios(
    figure: Any, rows: Sequence[Row], goals: Mapping[str, float], against: Callable[[float], str], judged: str
) -> None:
    """Bars with intervals, in colour those whose names begin with `judged`; `against(goal)` names the base."""
    for axis, (key, goal) in zip(figure.subplots(1, 2, sharey=True), goals.items()):
        interval = [row[key.replace("ratio", "interval")] for row in rows]
        values = [row[key] for row in rows]
        errors = [
            [v - low for v, (low, _) in zip(values, interval)],
            [high - v for v, (_, high) in zip(values, interval)],
        ]
        colours = ["C0" if row["system"].startswith(judged) else "C7" for row in rows]
        axis.barh([row["system"] for row in rows], values, color=colours, xerr=errors, ecolor="0.3", capsize=2)
        axis.axvline(goal, color="black", linestyle="--", linewidth=1)
        axis.set(xlabel=f"{key.partition('_')[0]} / {against(goal)}")
        axis.grid(alpha=0.3, axis="x")
