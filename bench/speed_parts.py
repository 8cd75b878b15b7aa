"""What speed is beside a curve over tokens seen: several rows at once, the latency of single tokens, a whole prefill."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.progress import Progress

from .report import Row
from .runner import Model, Setup, System
from .stats import alternate, pair_ratio
from .text import TokenStream

PREFILL = 512
ROWS = (1, 2, 4, 8)
TURN = 32  # tokens of one turn, whatever the number of rows
TOKENS = 512  # whose latency is taken, one by one: 16 evictions or more

COLUMNS: dict[str, tuple[str, ...]] = {
    "rows_at_once": ("system", "rows", "tokens_seen", "decode_tps", "speedup"),
    "latency": ("system", "tokens", "p50_ms", "p99_ms", "max_ms", "p99_vs_p50"),
    "prefill": ("system", "tokens", "seconds", "prefill_tps", "vs_flash"),
}


def rows_at_once(model: Model, bounded: Sequence[Setup], corpus: list[int], rounds: int, progress: Progress | None) -> list[Row]:
    """Throughput of k tokens in one ubatch, logits of all of them, at a full budget: drafts that are checked, short turns."""
    found: list[Row] = []
    task = progress.add_task("rows", total=len(bounded)) if progress else None
    for setup in bounded:
        with System(model, setup) as system:
            stream = _filled(system, corpus)

            def turn(k: int, system: System = system, stream: TokenStream = stream) -> Callable[[], float]:
                return lambda: TURN / sum(system.together(stream.take(k)) for _ in range(TURN // k))

            speeds = alternate(rounds, [turn(k) for k in ROWS])
            for k, speed in zip(ROWS, speeds):
                found.append({
                    **_of(system), "rows": k, "decode_tps": statistics.median(speed), "speedup": pair_ratio(speed, speeds[0]),
                })  # fmt: skip
        _advance(progress, task)
    return found


def latency(model: Model, bounded: Sequence[Setup], corpus: list[int], progress: Progress | None) -> list[Row]:
    """Milliseconds of single greedy tokens at a full budget, those that evict among them."""
    found: list[Row] = []
    task = progress.add_task("latency", total=len(bounded)) if progress else None
    for setup in bounded:
        with System(model, setup) as system:
            stream = _filled(system, corpus)
            system.decode(TURN, stream.take(1)[0])
            ms = 1000 * np.asarray(system.decode(TOKENS, system.greedy()))
            p50, p99 = (float(np.percentile(ms, p)) for p in (50, 99))
            found.append({
                **_of(system), "tokens": TOKENS, "evict_step": system.evict_step(), "p50_ms": p50, "p99_ms": p99,
                "max_ms": float(ms.max()), "p99_vs_p50": p99 / p50,
            })  # fmt: skip
        _advance(progress, task)
    return found


def prefill_all(model: Model, setups: Sequence[Setup], corpus: list[int], tokens: int, progress: Progress | None) -> list[Row]:
    """Seconds of reading a text of `tokens` from its beginning, one system after the other; the first is the unbounded one."""
    found: list[Row] = []
    task = progress.add_task("prefill", total=len(setups)) if progress else None
    for setup in setups:
        with System(model, replace(setup, n_ctx=0 if setup.budget else tokens)) as system:
            seconds = sum(time for _, time in system.feed(TokenStream(corpus).take(tokens)))
            first = found[0]["seconds"] if found else seconds
            found.append({
                **_of(system), "tokens": tokens, "seconds": seconds, "prefill_tps": tokens / seconds, "vs_flash": first / seconds,
            })  # fmt: skip
        _advance(progress, task)
    return found


def _filled(system: System, corpus: list[int]) -> TokenStream:
    """The text after the budget and one ubatch of it have been read."""
    stream = TokenStream(corpus)
    system.feed(stream.take(system.setup.budget + system.setup.ubatch), last_logits=True)
    return stream


def _of(system: System) -> dict[str, Any]:
    return {"system": system.setup.label, "budget": system.setup.budget, "tokens_seen": system.seen}


def _advance(progress: Progress | None, task: Any) -> None:
    if progress and task is not None:
        progress.advance(task)
