"""KV bytes, resident memory and speed while one context sees ever more tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from indexmem_edge.native.memory import resident_memory

from ..machine import describe
from ..report import Report, Verdict, series
from ..runner import FIXED_KEYS, Model, Setup, System, library
from ..stats import alternate, pair_ratio, tps
from ..text import TokenStream, read_text

SPAN = 4096  # tokens that a prefill figure looks back on
TURN = 32  # decoded tokens of one turn: at least one eviction falls into each
COLUMNS = ("policy", "budget", "tokens_seen", "kv_bytes", "meta_bytes", "rss_bytes", "prefill_tps", "decode_tps")


def columns(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Of the table: parts that the model does not have are left out."""
    found = tuple(key for key in FIXED_KEYS if any(row.get(key) for row in rows))
    return COLUMNS[:5] + found + COLUMNS[5:]


def checkpoints(last: int) -> list[int]:
    points = [1 << i for i in range(10, 40) if 1 << i < last]
    return [*points, last]


def run_memory(
    model: Model,
    setup: Setup,
    tokens: int,
    *,
    text: Path | None = None,
    unbounded_tokens: int = 8192,
    decode_tokens: int = 64,
    rounds: int = 12,
    progress: Progress | None = None,
    out: Path | None = None,
) -> Report:
    """Feeds text to one bounded context; then, for drift, a fresh one at the budget is timed alternately with the old one."""
    corpus = model.tokens(read_text(text))
    how = (
        f"checkpoints: median ubatch of the last {SPAN} tokens, mean of {decode_tokens} decoded tokens; verdicts on speed: "
        f"{rounds} alternating turns ({TURN} tokens decoded, one ubatch prefilled) of the old context and a fresh one just past the budget, median of the pairwise ratios"
    )
    meta = describe(
        model.path.name,
        library(),
        setup.threads,
        how=how,
        repeats=rounds,
        text=text.name if text else "built in",
        ubatch=setup.ubatch,
        cache_type=setup.cache_type,
        kv_full_bytes=[[n, model.kv_bytes(n, setup.cache_type)] for n in checkpoints(tokens)],
    )
    report = Report("memory", meta)
    with System(model, setup) as old:
        _walk(report, old, TokenStream(corpus), checkpoints(tokens), decode_tokens, progress)
        bounded = list(report.rows)
        if out:
            report.save(out)
        with System(model, setup) as fresh:
            stream = TokenStream(corpus, start=tokens)
            fresh.feed(stream.take(min(setup.budget + setup.ubatch, tokens)), last_logits=True)
            report.meta["fresh_starts_at"] = fresh.seen
            decode = alternate(rounds, [_decoder(s) for s in (old, fresh)])
            prefill = alternate(max(rounds, SPAN // setup.ubatch), [_prefiller(s, stream) for s in (old, fresh)])
    if unbounded_tokens:
        full = replace(setup, policy="full", budget=0, n_ctx=unbounded_tokens + 256, sidecar=None)
        with System(model, full) as system:
            _walk(report, system, TokenStream(corpus), checkpoints(unbounded_tokens), decode_tokens, progress)
    report.verdicts = verdicts(bounded, setup, pair_ratio(*decode), pair_ratio(*prefill))
    return report


def verdicts(rows: list[dict[str, Any]], setup: Setup, decode: float, prefill: float) -> list[Verdict]:
    sizes = {tuple(row.get(key) for key in ("kv_bytes", *FIXED_KEYS)) for row in rows}
    settled = [row for row in rows if row["tokens_seen"] >= SPAN] or rows[-1:]
    growth = (settled[-1]["rss_bytes"] - settled[0]["rss_bytes"]) / 1e6 if len(settled) > 1 else None
    return [
        Verdict("different KV sizes seen at the checkpoints", len(sizes), 1, at_most=True),
        Verdict(
            f"resident memory grown from {settled[0]['tokens_seen']} to {rows[-1]['tokens_seen']} tokens, MB",
            growth,
            8,
            at_most=True,
        ),
        Verdict(f"decode at {rows[-1]['tokens_seen']} tokens / decode just past the budget", decode, 0.95),
        Verdict(f"prefill at {rows[-1]['tokens_seen']} tokens / prefill just past the budget", prefill, 0.95),
    ]


def _walk(
    report: Report,
    system: System,
    stream: TokenStream,
    points: list[int],
    decode_tokens: int,
    progress: Progress | None,
) -> None:
    times: list[tuple[int, float]] = []
    setup = system.setup
    task = progress.add_task(setup.label, total=points[-1]) if progress else None
    for point in points:
        while (left := point - decode_tokens - system.seen) > 0:
            times += system.feed(stream.take(min(left, setup.ubatch)))
            if progress and task is not None:
                progress.update(task, completed=system.seen)
        decode = system.decode(decode_tokens, stream.take(1)[0])
        whole = [t for t in times if t[0] == setup.ubatch] or times
        report.add(
            policy=setup.policy,
            budget=setup.budget,
            tokens_seen=system.seen,
            rss_bytes=resident_memory(),
            prefill_tps=tps(whole[-SPAN // setup.ubatch :]),
            decode_tps=decode_tokens / sum(decode),
            **_byte_counts(system),
            **({} if setup.budget else {"n_ctx": setup.n_ctx}),
        )
        if progress and task is not None:
            progress.update(task, completed=system.seen)


def _byte_counts(system: System) -> dict[str, int]:
    """Of an unbounded cache: what a context just large enough would hold."""
    counts, cache_type = system.byte_counts(), system.setup.cache_type
    if not system.setup.budget:
        for key, window in (("kv_bytes", False), ("window_bytes", True)):
            counts[key] = system.model.kv_bytes(system.seen, cache_type, window)
    return counts


def _decoder(system: System) -> Callable[[], float]:
    return lambda: TURN / sum(system.decode(TURN, system.greedy()))


def _prefiller(system: System, stream: TokenStream) -> Callable[[], float]:
    return lambda: tps(system.feed(stream.take(system.setup.ubatch)))


def plot(figure: Any, report: Report) -> None:
    left, middle, right = figure.subplots(1, 3)
    for budget in dict.fromkeys(row["budget"] for row in report.rows):
        rows = [row for row in report.rows if row["budget"] == budget]
        name = f"{rows[0]['policy']}, budget {budget}" if budget else "unbounded"
        for axis, key, scale in ((left, "kv_bytes", 2**20), (middle, "decode_tps", 1), (right, "prefill_tps", 1)):
            x, y = series(rows, "tokens_seen", key)
            axis.plot(x, [v / scale for v in y], marker="o", label=name)
    points = report.meta["kv_full_bytes"]
    left.plot(
        [n for n, _ in points], [size / 2**20 for _, size in points], "--", color="grey", label="unbounded, computed"
    )
    left.set(ylabel="KV cache, MiB", yscale="log")
    middle.set(ylabel="decode, tokens/s", ylim=(0, None))
    right.set(ylabel="prefill, tokens/s", ylim=(0, None))
    for axis in (left, middle, right):
        axis.set(xlabel="tokens seen", xscale="log")
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
