"""What a copy of the KV state costs, at several budgets: its bytes, taking it and putting it back, beside a token and a plain copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from indexmem_edge.runtime.statecopy import StateCopy

from ..machine import describe
from ..report import Report, Row
from ..runner import BenchError, Model, Setup, System, library
from ..text import TokenStream, read_text

if TYPE_CHECKING:
    from rich.progress import Progress

COLUMNS = ("policy", "budget", "state_bytes", "take_ms", "give_back_ms", "memcpy_ms", "token_ms")
N_CHARS = 100_000  # of the text, fed over and over
TOKENS = 32  # decoded for the time of one


def run_checkpoint(
    model: Model, base: Setup, budgets: Sequence[int], rounds: int, *, text: Path | None, progress: Progress
) -> Report:
    """Each budget with its cache full, past the first eviction."""
    meta = describe(model.path.name, library(), base.threads, rounds=rounds, policy=base.policy, how="medians")
    report = Report("checkpoint", meta)
    task = progress.add_task("budgets", total=len(budgets))
    corpus = model.tokens(read_text(text, N_CHARS))
    for budget in budgets:
        with closing(System(model, replace(base, budget=budget))) as system:
            system.feed(TokenStream(corpus).take(budget + 2 * base.ubatch), last_logits=True)
            report.rows.append({"policy": base.policy, "budget": budget, **_measure(system, rounds)})
        progress.advance(task)
    return report


def _measure(system: System, rounds: int) -> Row:
    copy = StateCopy()
    if not copy.take(system.ctx):
        raise BenchError("there is no memory for a copy of the state")
    back = np.empty(copy.nbytes, dtype=np.uint8)
    plain = np.ones_like(back)
    return {
        "state_bytes": copy.nbytes,
        "take_ms": _median_ms(rounds, lambda: copy.take(system.ctx)),
        "give_back_ms": _median_ms(rounds, lambda: copy.give_back(system.ctx)),
        "memcpy_ms": _median_ms(rounds, lambda: np.copyto(back, plain)),
        "token_ms": 1000 * statistics.median(system.decode(TOKENS, system.greedy())),
    }


def _median_ms(rounds: int, act: Callable[[], object]) -> float:
    def once() -> float:
        started = time.perf_counter()
        act()
        return time.perf_counter() - started

    return 1000 * statistics.median(once() for _ in range(rounds))
