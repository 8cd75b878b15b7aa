"""A million tokens through one context with a latent memory: nothing may grow, get lost or stop being a number.

What would show in days of chat is looked for in minutes: a random model with layers of the demo model's shape, but few of
them, and a small budget. Most tokens are prefilled, some decoded one by one; at every checkpoint the context is checked.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from indexmem_edge.native import api
from indexmem_edge.native.memory import resident_memory

from ..machine import describe
from ..quality.arms import Arm, Sidecars, setup_for
from ..report import Report, Row, Verdict, series
from ..runner import BYTE_KEYS, LOGICAL_MAX, BenchError, Model, Setup, System, library
from ..text import TokenStream, builtin_text
from .latent import with_random_memory

SPAN = 8192  # tokens from one checkpoint to the next
DECODED = 64  # of them one by one, just before the checkpoint
WARM_UP = 4 * SPAN  # tokens after which resident memory is not to grow
GROWTH = 8 * 2**20  # that is allowed all the same
COLUMNS = (
    "tokens_seen",
    "kept",
    "evicted",
    "memory_slots",
    "kv_bytes",
    "meta_bytes",
    "rss_bytes",
    "span_tps",
    "failed",
)


def run_soak(
    model: Model, base: Setup, memory: str, tokens: int, *, progress: Progress | None = None, out: Path | None = None
) -> Report:
    """Feeds the tokens; a checkpoint that fails is a row that says why, and the run goes on."""
    with tempfile.TemporaryDirectory() as folder:
        sidecars = with_random_memory(model, [memory], Sidecars(), Path(folder))
        setup = setup_for(base, Arm(base.policy, 1.0, memory, base.cache_type), sidecars, base.budget, 0)
        return _run(model, setup, tokens, progress, out)


def _run(model: Model, setup: Setup, tokens: int, progress: Progress | None, out: Path | None) -> Report:
    if tokens > LOGICAL_MAX - SPAN:
        raise BenchError(f"{tokens} tokens are more than a context counts: at most {LOGICAL_MAX - SPAN}")
    report = Report(
        "soak",
        describe(
            model.path.name,
            library(),
            setup.threads,
            how=f"every {SPAN} tokens, the last {DECODED} of them decoded greedily: logits finite, bytes and slots as at "
            "the start, entries within the budget less the slots of the memory, kept + evicted = seen, every head holds "
            f"distinct positions with all that are protected; resident memory against that at {WARM_UP} tokens",
            ubatch=setup.ubatch,
            cache_type=setup.cache_type,
            sinks=setup.sinks,
            window=setup.window,
            memory=setup.memory,
            layers=_layers(model),
        ),
    )
    stream = TokenStream(model.tokens(builtin_text(50_000)))
    task = progress.add_task("soak", total=tokens) if progress else None
    with System(model, setup) as system:
        start = system.stats()
        while system.seen < tokens:
            began = time.monotonic()
            n = min(SPAN, tokens - system.seen)
            bad = _span(system, stream, n)
            report.add(
                policy=setup.policy,
                budget=setup.budget,
                memory=setup.memory,
                tokens_seen=system.seen,
                span_tps=n / (time.monotonic() - began),
                failed="; ".join([*bad, *check(system, start)]) or None,
                **_counts(system),
            )
            if progress and task is not None:
                progress.update(task, completed=system.seen)
            if out and len(report.rows) % 16 == 0:
                report.save(out)
    report.verdicts = verdicts(report.rows)
    return report


def _span(system: System, stream: TokenStream, n: int) -> list[str]:
    """Goes `n` tokens further; what was wrong with the logits."""
    decoded = min(DECODED, n - 1)
    system.feed(stream.take(n - decoded), last_logits=True)
    bad = [] if _finite(system) else ["logits of prefill are not finite"]
    for i in range(decoded):
        system.step(system.greedy())
        if not _finite(system):
            return [*bad, f"logits are not finite at decoded token {i}"]
    return bad


def _finite(system: System) -> bool:
    return system.logits is not None and bool(np.isfinite(system.logits).all())


def _counts(system: System) -> Row:
    stats = system.stats()
    keys = ("kept", "evicted", "slots", "memory_slots", *BYTE_KEYS)
    return {**{key: stats[key] for key in keys}, "rss_bytes": resident_memory()}


def check(system: System, start: dict[str, int]) -> Iterator[str]:
    """What is wrong with a context, in words."""
    setup, now = system.setup, system.stats()
    for key in ("slots", "memory_slots", *BYTE_KEYS):
        if now[key] != start[key]:
            yield f"{key} was {start[key]} and is {now[key]}"
    if now["kept"] > setup.budget - now["memory_slots"]:
        yield f"{now['kept']} entries in a budget of {setup.budget} with {now['memory_slots']} slots of the memory"
    if now["kept"] + now["evicted"] != system.seen:
        yield f"{now['kept']} kept + {now['evicted']} evicted are not the {system.seen} tokens seen"
    for layer in range(_layers(system.model)):
        for head in range(api.n_head_kv(system.ctx, layer)):
            held = api.positions(system.ctx, layer, head)
            if why := positions_wrong(held, now["kept"], system.seen, setup.sinks, setup.window):
                yield f"layer {layer}, head {head}: {why}"


def positions_wrong(held: np.ndarray, kept: int, seen: int, sinks: int, window: int) -> str:
    """Why a head cannot hold these positions, sorted as they are; "" if it can."""
    if len(held) != kept:
        return f"{len(held)} positions for {kept} entries"
    if kept and (held[0] < 0 or held[-1] >= seen or (np.diff(held) <= 0).any()):
        return "positions out of range or twice"
    first, last = min(sinks, seen), min(window, seen)
    if not np.array_equal(held[:first], np.arange(first)) or not np.array_equal(
        held[-last:], np.arange(seen - last, seen)
    ):
        return "a protected position is gone"
    return ""


def _layers(model: Model) -> int:
    from ..runner import llama_cpp

    return int(llama_cpp.llama_model_n_layer(model.raw.model))


def verdicts(rows: list[Row]) -> list[Verdict]:
    warm = [row for row in rows if row["tokens_seen"] >= WARM_UP]
    growth = max(row["rss_bytes"] for row in warm) - warm[0]["rss_bytes"] if len(warm) > 1 else None
    failed = [row for row in rows if row["failed"]]
    where = f", the first at {failed[0]['tokens_seen']} tokens: {failed[0]['failed']}" if failed else ""
    return [
        Verdict(f"checkpoints of {len(rows)} at which something was wrong{where}", len(failed), 0, at_most=True),
        Verdict(
            f"resident memory grown after {WARM_UP} tokens, MiB",
            None if growth is None else growth / 2**20,
            GROWTH / 2**20,
            at_most=True,
        ),
    ]


def shown(rows: list[Row]) -> list[Row]:
    """Rows for people: those at doubling numbers of checkpoints, those that failed, and the last."""
    return [row for i, row in enumerate(rows, 1) if row["failed"] or i == len(rows) or math.log2(i).is_integer()]


def plot(figure: Any, report: Report) -> None:
    axes = figure.subplots(1, 3)
    for axis, (key, scale, name) in zip(
        axes, (("rss_bytes", 2**20, "resident memory, MiB"), ("kept", 1, "entries kept"), ("span_tps", 1, "tokens/s"))
    ):
        x, y = series(report.rows, "tokens_seen", key)
        axis.plot(x, [v / scale for v in y])
        axis.set(xlabel="tokens seen", ylabel=name, ylim=(0, None))
        axis.grid(alpha=0.3)
