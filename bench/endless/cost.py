"""What renewing positions costs: the same policy with a span and without, taking turns on the same text.

Steps (ubatches or tokens) in which positions are renewed are told apart. What such a one takes beyond the same step of the other
side is shared by all tokens from one renewal to the next: a ratio of whole runs would drown in the machine's noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from ..report import Row
from ..runner import BenchError, Model, Setup, System
from ..stats import pair_interval, pair_ratio
from ..text import TokenStream

DECODED = 16  # tokens of a turn of decode; positions are renewed in the middle of it
CYCLES = 3  # renewals that are seen in prefill, and as many in decode
HOW = (
    "cost: a context with the span and one without read the same text in alternating steps (ubatches; tokens around every "
    "other renewal); ratio: median of the pairwise ratios of their seconds where nothing is renewed, with a 95 % interval; "
    "share: what a step with a renewal takes beyond the same step without the span (at least what the library's clock says), "
    "as a share of all tokens from one renewal to the next"
)


@dataclass
class Steps:
    """Seconds of the same steps with the span and without."""

    tokens: int  # of a step
    mine: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    renewed: list[bool] = field(default_factory=list)

    def plain(self, seconds: list[float]) -> list[float]:
        return [s for s, renewed in zip(seconds, self.renewed) if not renewed]

    def figures(self, name: str, between: float, least: float) -> Row:
        """`between` tokens lie from one renewal to the next; `least`: seconds that one takes by the library's own clock."""
        mine, base = self.plain(self.mine), self.plain(self.base)
        usual = statistics.median(a - b for a, b in zip(mine, base))
        more = [a - b - usual for a, b, renewed in zip(self.mine, self.base, self.renewed) if renewed]
        extra, token = max(statistics.median(more), least), statistics.median(mine) / self.tokens
        return {
            f"{name}_tps": 1 / token,
            f"{name}_ratio": pair_ratio(mine, base),
            f"{name}_interval": pair_interval(mine, base),
            f"{name}_extra_ms": extra * 1e3,
            f"{name}_share": extra / (between * token),
        }


def _read(tokens: Sequence[int], system: System) -> float:
    return sum(seconds for _, seconds in system.feed(tokens, True))


def _write(token: int, system: System) -> float:
    return system.step(token)


class Pair:
    """The two contexts."""

    def __init__(self, mine: System, base: System, stream: TokenStream):
        self.mine, self.base, self.stream = mine, base, stream
        self.prefill, self.decode = Steps(mine.setup.ubatch), Steps(1)
        self.renewed_at: list[int] = []

    def read(self, n: int, timed: bool = True) -> None:
        """`n` tokens; whole ubatches are timed, what is left over is not."""
        size = self.mine.setup.ubatch
        for _ in range(max(n, 0) // size):
            self._step(self.prefill if timed else None, partial(_read, self.stream.take(size)))
        if rest := self.stream.take(max(n, 0) % size):
            self._step(None, partial(_read, rest))

    def write(self, n: int) -> None:
        for token in self.stream.take(n):
            self._step(self.decode, partial(_write, token))

    def _step(self, steps: Steps | None, act: Callable[[System], float]) -> None:
        before, turn = self.rebases(), len(steps.mine) % 2 if steps else 0
        seconds = {id(system): act(system) for system in (self.mine, self.base)[:: -1 if turn else 1]}
        renewed = self.rebases() > before
        if renewed:
            self.renewed_at.append(self.mine.seen)
        if steps:
            steps.mine.append(seconds[id(self.mine)])
            steps.base.append(seconds[id(self.base)])
            steps.renewed.append(renewed)

    def rebases(self) -> int:
        return self.mine.stats()["rebases"]

    def left(self) -> int:
        """Tokens until positions have to be renewed."""
        stats = self.mine.stats()
        return stats["span"] - stats["next_position"]


def cost(model: Model, setup: Setup, corpus: list[int], advance: Callable[[float], None]) -> Row:
    """Renewals happen in prefill and in decode by turns; `advance` gets the share that is done.

    Raises:
        BenchError: there is no span in force, or nothing is ever renewed.
    """
    with ExitStack() as stack:
        mine, base = (stack.enter_context(System(model, each)) for each in (setup, replace(setup, span=0)))
        span = mine.stats()["span"]
        if not span:
            raise BenchError(f"{setup.label}: no span is in force, there is nothing to measure the cost of")
        pair = Pair(mine, base, TokenStream(corpus))
        pair.read(setup.budget + setup.ubatch, timed=False)  # past the budget, where all steps are alike
        for done in range(CYCLES):
            if len(pair.renewed_at) < 2 * done:
                raise BenchError(f"{setup.label}: {2 * done} renewals were due in {mine.seen} tokens, {pair.rebases()} happened")
            pair.read(pair.left() - DECODED // 2)
            pair.write(DECODED)
            pair.read(pair.left() + setup.ubatch)
            advance((done + 1) / CYCLES)
        between = statistics.median(b - a for a, b in zip(pair.renewed_at, pair.renewed_at[1:]))
        clock = mine.stats()["rebase_us"] / 1e6 / pair.rebases()
        slowest = {"slowest_ms": max(pair.decode.mine) * 1e3, "slowest_without_ms": max(pair.decode.base) * 1e3}
        return {
            "tokens_seen": mine.seen,
            "rebases": pair.rebases(),
            "rebase_ms": clock * 1e3,
            "span_in_force": span,
            "tokens_between": between,
            **pair.prefill.figures("prefill", between, clock),
            **pair.decode.figures("decode", between, clock),
            **slowest,
            **mine.byte_counts(),
        }
