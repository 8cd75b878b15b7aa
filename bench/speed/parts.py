"""What `bench speed` measures beside depths: tokens evaluated at once, the latency of single tokens, long prompts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
from rich.progress import Progress

from ..report import Row
from ..runner import Model, Setup, System
from ..stats import alternate, pair_ratio
from ..text import TokenStream
from .turns import past_budget, whole_cycles

COLUMNS = {
    "rows_at_once": ("system", "rows", "decode_tps", "vs_one"),
    "latency": ("system", "tokens", "p50_ms", "p99_ms", "max_ms", "p99_vs_p50", "evict_step"),
    "prefill": ("system", "tokens", "seconds", "prefill_tps", "vs_unbounded", "compared_at"),
}
ROWS = (1, 2, 4, 8)
ROW_TURN = 64  # tokens of one turn, in ubatches of 1, 2, 4 or 8
PREFILL_TURN = 4096  # tokens that each system reads before the next one does


def rows_at_once(
    model: Model, setups: Sequence[Setup], corpus: list[int], rounds: int, progress: Progress | None = None
) -> list[Row]:
    """Throughput of ubatches of k tokens of one sequence, with the logits of all, at a full budget: k as in ROWS."""
    found: list[Row] = []
    task = progress.add_task("rows", total=len(setups)) if progress else None
    for setup in setups:
        with System(model, setup) as system:
            stream = _past_budget(system, corpus)
            turns = [_rows_turn(system, stream, k) for k in ROWS]
            for turn in turns:
                turn()  # once, so that nothing is measured cold
            speeds = alternate(rounds, turns)
        for k, speed in zip(ROWS, speeds):
            found.append(
                {
                    "system": setup.label,
                    "rows": k,
                    "decode_tps": statistics.median(speed),
                    "vs_one": pair_ratio(speed, speeds[0]),
                }
            )
        if progress and task is not None:
            progress.advance(task)
    return found


def latencies(
    model: Model,
    setups: Sequence[Setup],
    corpus: list[int],
    tokens: int,
    stock: Setup,
    progress: Progress | None = None,
) -> list[Row]:
    """Percentiles of the seconds of greedy steps past the budget: `tokens` or more, whole cycles of eviction. The systems take
    turns of a cycle, the unbounded one (`stock`) among them: what it has is the machine's."""
    past = max(past_budget(setup, 0) for setup in setups)
    with ExitStack() as stack:
        systems = [stack.enter_context(System(model, setup)) for setup in setups]
        turns = [whole_cycles(system.evict_step()) for system in systems]
        turns.insert(0, max(turns))
        n_ctx = past + tokens + 2 * turns[0]  # a turn before, and what the last one is too long
        systems.insert(0, stack.enter_context(System(model, replace(stock, n_ctx=n_ctx))))
        rounds = -(-tokens // min(turns))
        task = progress.add_task("latency", total=rounds) if progress else None
        for system, turn in zip(systems, turns):
            system.feed(TokenStream(corpus).take(past), last_logits=True)
            system.decode(turn, system.greedy())  # once, so that nothing is measured cold
        names = [(system.setup.label, system.evict_step()) for system in systems]
        times: list[list[float]] = [[] for _ in systems]
        for _ in range(rounds):
            for system, turn, seconds in zip(systems, turns, times):
                if len(seconds) < tokens:
                    seconds += system.decode(turn, system.greedy())
            if progress and task is not None:
                progress.advance(task)
    return [
        {"system": label, "evict_step": step, **percentiles(seconds)} for (label, step), seconds in zip(names, times)
    ]


def percentiles(seconds: Sequence[float]) -> Row:
    p50, p99, most = (float(x) * 1e3 for x in np.percentile(seconds, [50, 99, 100]))
    return {"tokens": len(seconds), "p50_ms": p50, "p99_ms": p99, "max_ms": most, "p99_vs_p50": p99 / p50}


def long_prefill(
    model: Model,
    setups: Sequence[Setup],
    corpus: list[int],
    tokens: int,
    full_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Seconds to read a text of so many tokens. The systems take turns of PREFILL_TURN tokens; an unbounded one stops after
    `full_tokens`, and is compared with the others at the last turn that it has read."""
    full = min(tokens, full_tokens or tokens)
    most = [tokens if setup.budget else full for setup in setups]
    read: list[list[tuple[int, float]]] = [[(0, 0.0)] for _ in setups]  # (tokens, seconds so far) after each turn
    task = progress.add_task("prefill", total=sum(most)) if progress else None
    with ExitStack() as stack:
        systems = [stack.enter_context(System(model, replace(s, n_ctx=n))) for s, n in zip(setups, most)]
        while any(system.seen < n for system, n in zip(systems, most)):
            for system, n, marks in zip(systems, most, read):
                take = min(PREFILL_TURN, (full if system.seen < full else n) - system.seen)
                if take:
                    times = system.feed(TokenStream(corpus, system.seen).take(take))
                    marks.append((system.seen, marks[-1][1] + sum(seconds for _, seconds in times)))
                    if progress and task is not None:
                        progress.advance(task, take)
    return [prefill_row(setup, marks, read[0]) for setup, marks in zip(setups, read)]


def prefill_row(setup: Setup, marks: Sequence[tuple[int, float]], stock: Sequence[tuple[int, float]]) -> Row:
    """Of (tokens, seconds) after each turn of a system and of the unbounded one, which may have stopped earlier."""
    tokens, seconds = marks[-1]
    row: Row = {"system": setup.label, "tokens": tokens, "seconds": seconds, "prefill_tps": tokens / seconds}
    if setup.budget:
        at, stock_seconds = stock[-1]
        row |= {"compared_at": at, "vs_unbounded": stock_seconds / dict(marks)[at]}
    return row


def _past_budget(system: System, corpus: list[int]) -> TokenStream:
    stream = TokenStream(corpus)
    system.feed(stream.take(past_budget(system.setup, 0)), last_logits=True)
    return stream


def _rows_turn(system: System, stream: TokenStream, k: int) -> Callable[[], float]:
    n = -(-whole_cycles(system.evict_step()) * (ROW_TURN // 32) // k)
    return lambda: n * k / sum(system.at_once(stream.take(k)) for _ in range(n))
