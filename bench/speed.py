"""Decode and prefill at growing depths: the stock cache with and without flash attention, and the bounded one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .machine import describe, rss_bytes
from .report import Report, Verdict, series
from .runner import Model, Setup, System, library
from .stats import alternate, pair_ratio
from .text import TokenStream, read_text

COLUMNS = (
    "system",
    "budget",
    "depth",
    "tokens_seen",
    "kv_bytes",
    "prefill_tps",
    "decode_tps",
    "decode_vs_flash",
    "decode_vs_no_flash",
    "prefill_vs_flash",
)
PREFILL = 512
CHUNK = 32  # decoded tokens of one turn: at least one eviction falls into each


def run_speed(
    model: Model,
    setup: Setup,
    depths: list[int],
    *,
    text: Path | None = None,
    decode_tokens: int = 64,
    repeats: int = 3,
    no_flash: bool = True,
    name: str = "speed",
    progress: Progress | None = None,
    out: Path | None = None,
) -> Report:
    """Fills every system once, depth by depth; at each depth the systems take turns of a few tokens."""
    n_ctx = max(depths) + PREFILL + CHUNK
    setups = [
        replace(setup, policy="full", budget=0, n_ctx=n_ctx, flash=flash, sidecar=None)
        for flash in ((True, False) if no_flash else (True,))
    ]
    rounds = max(1, -(-decode_tokens * repeats // CHUNK))
    how = (
        f"decode: {rounds} alternating turns of {CHUNK} tokens a system; prefill: {repeats} alternating turns of {PREFILL} tokens; figures are medians, "
        "ratios medians of the pairwise ratios; a turn is undone where the cache allows it, else it counts as seen"
    )
    meta = describe(
        model.path.name,
        library(),
        setup.threads,
        how=how,
        repeats=repeats,
        text=text.name if text else "built in",
        ubatch=setup.ubatch,
        cache_type=setup.cache_type,
    )
    report = Report(name, meta)
    corpus = model.tokens(read_text(text))
    systems = [System(model, s) for s in [*setups, setup]]
    task = progress.add_task("speed", total=len(depths) * len(systems)) if progress else None
    try:
        for depth in sorted(depths):
            for system in systems:
                _fill(system, corpus, depth)
                if progress and task is not None:
                    progress.advance(task)
            decode = alternate(rounds, [_turn(s, depth, _decode, corpus) for s in systems])
            prefill = alternate(repeats, [_turn(s, depth, _prefill, corpus) for s in systems])
            for i, system in enumerate(systems):
                row = report.add(
                    policy=system.setup.policy,
                    budget=system.setup.budget,
                    tokens_seen=system.seen,
                    **system.byte_counts(),
                    rss_bytes=rss_bytes(),
                    prefill_tps=statistics.median(prefill[i]),
                    decode_tps=statistics.median(decode[i]),
                    system=system.setup.label,
                    flash=system.setup.flash,
                    depth=depth,
                )
                if system.setup.budget:
                    row["decode_vs_flash"], row["prefill_vs_flash"] = (
                        pair_ratio(decode[i], decode[0]),
                        pair_ratio(prefill[i], prefill[0]),
                    )
                    row["decode_vs_no_flash"] = pair_ratio(decode[i], decode[1]) if no_flash else None
            if out:
                report.save(out)
    finally:
        for system in systems:
            system.close()
    report.verdicts = verdicts([row for row in report.rows if row["budget"]])
    return report


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """`rows` are those of the bounded system. The goals are set for a depth of 8192."""
    deep, out = max(rows, key=lambda row: row["depth"]), []
    goal = deep["depth"] >= 8192
    out.append(
        Verdict(
            f"decode at {deep['depth']} / unbounded with flash attention", deep["decode_vs_flash"], 4 if goal else None
        )
    )
    out.append(
        Verdict(
            f"decode at {deep['depth']} / unbounded without flash attention",
            deep["decode_vs_no_flash"],
            1 if goal else None,
        )
    )
    below = [row for row in rows if row["depth"] < row["budget"]]
    if below:
        out.append(
            Verdict(
                "decode below the budget / unbounded (worst depth)", min(row["decode_vs_flash"] for row in below), 0.97
            )
        )
        out.append(
            Verdict("prefill below the budget / unbounded (worst depth)", min(row["prefill_vs_flash"] for row in below))
        )
    out.append(Verdict(f"prefill at {deep['depth']} / unbounded with flash attention", deep["prefill_vs_flash"]))
    return out


def _fill(system: System, corpus: list[int], depth: int) -> None:
    if depth > system.seen:
        system.feed(TokenStream(corpus, system.seen).take(depth - system.seen))


def _decode(system: System, stream: TokenStream) -> float:
    return CHUNK / sum(system.decode(CHUNK, stream.take(1)[0]))


def _prefill(system: System, stream: TokenStream) -> float:
    return PREFILL / sum(seconds for _, seconds in system.feed(stream.take(PREFILL)))


def _turn(
    system: System, depth: int, measure: Callable[[System, TokenStream], float], corpus: list[int]
) -> Callable[[], float]:
    def turn() -> float:
        value = measure(system, TokenStream(corpus, system.seen))
        system.rollback(depth)
        return value

    return turn


def plot(figure: Any, report: Report) -> None:
    for axis, key, name in zip(figure.subplots(1, 2), ("decode_tps", "prefill_tps"), ("decode", "prefill")):
        for system in dict.fromkeys(row["system"] for row in report.rows):
            x, y = series([row for row in report.rows if row["system"] == system], "depth", key)
            axis.plot(x, y, marker="o", label=system)
        axis.set(xlabel="tokens already seen", ylabel=f"{name}, tokens/s", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
