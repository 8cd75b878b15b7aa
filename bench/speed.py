"""Decode and prefill while the tokens seen grow: the stock cache with and without flash attention, and bounded ones.

An empty context of the stock cache takes a turn beside the others at every depth, so that each speed can be told as a share
of it: that is what a cache that costs nothing would reach.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .machine import describe, rss_bytes
from .report import Report, Row, Verdict, series
from .runner import Model, Setup, System, library, llama_cpp
from .speed_parts import PREFILL, latency, prefill_all, rows_at_once
from .stats import alternate, pair_ratio
from .text import TokenStream, read_text

COLUMNS = (
    "system",
    "tokens_seen",
    "kv_bytes",
    "prefill_tps",
    "decode_tps",
    "of_empty",
    "byte_limit",
    "decode_vs_flash",
    "decode_vs_no_flash",
    "prefill_vs_flash",
)
PARTS = ("depths", "rows", "latency", "prefill")
CHUNK = 32  # decoded tokens of one turn: at least one eviction falls into each


def run_speed(
    model: Model,
    bounded: Sequence[Setup],
    depths: list[int],
    *,
    parts: Sequence[str] = PARTS,
    full_depth: int = 8192,
    prefill_tokens: int = 32768,
    text: Path | None = None,
    decode_tokens: int = 64,
    repeats: int = 3,
    no_flash: bool = True,
    name: str = "speed",
    progress: Progress | None = None,
    out: Path | None = None,
) -> Report:
    """Measures the `parts` that are asked for, with one corpus and one set of systems; the report is saved after each."""
    base = bounded[0]
    full = replace(base, policy="full", budget=0, sidecar=None, memory="off", memory_slots=0, ratio=0.0)
    rounds = max(1, -(-decode_tokens * repeats // CHUNK))
    how = (
        f"decode: {rounds} alternating turns of {CHUNK} tokens a system; prefill: {repeats} alternating turns of {PREFILL} tokens; figures are medians, "
        "ratios medians of the pairwise ratios; a turn is undone where the cache allows it, else it counts as seen; of_empty: "
        "against the unbounded cache with nothing in it, which takes turns, too; byte_limit: what that would be if bytes of "
        "weights and entries alone counted"
    )
    meta = describe(
        model.path.name,
        library(),
        base.threads,
        how=how,
        repeats=repeats,
        text=text.name if text else "built in",
        ubatch=base.ubatch,
        cache_type=base.cache_type,
    )
    report = Report(name, meta)
    corpus = model.tokens(read_text(text))
    if "depths" in parts:
        flashes = (True, False) if no_flash else (True,)
        _depths(report, model, [replace(full, flash=flash) for flash in flashes], bounded, sorted(depths), full_depth, corpus, rounds, repeats, progress, out)  # fmt: skip
    rest = {
        "rows_at_once": lambda: rows_at_once(model, bounded, corpus, rounds, progress),
        "latency": lambda: latency(model, bounded, corpus, progress),
        "prefill": lambda: prefill_all(model, [replace(full, flash=True), *bounded], corpus, prefill_tokens, progress),
    }
    for part, measure in rest.items():
        if part.partition("_")[0] in parts:
            report.extra[part] = measure()
            if out:
                report.save(out)
    report.verdicts = verdicts(report)
    return report


def _depths(
    report: Report,
    model: Model,
    full: Sequence[Setup],
    bounded: Sequence[Setup],
    depths: Sequence[int],
    full_depth: int,
    corpus: list[int],
    rounds: int,
    repeats: int,
    progress: Progress | None,
    out: Path | None,
) -> None:
    """Fills every system once, depth by depth; at each depth the systems take turns of a few tokens."""
    n_ctx = min(max(depths), full_depth) + PREFILL + CHUNK
    setups = [replace(s, n_ctx=n_ctx) for s in full] + list(bounded)
    task = progress.add_task("depths", total=len(depths) * len(setups)) if progress else None
    weights = llama_cpp.llama_model_size(model.raw.model)
    with ExitStack() as stack:
        empty = stack.enter_context(System(model, replace(full[0], n_ctx=PREFILL)))
        systems = [stack.enter_context(System(model, s)) for s in setups]
        for depth in depths:
            here = [s for s in systems if s.setup.budget or depth <= full_depth]
            for system in here:
                _fill(system, corpus, depth)
                if progress and task is not None:
                    progress.advance(task)
            decode = alternate(rounds, [_turn(s, d, _decode, corpus) for s, d in [(empty, 0), *((s, depth) for s in here)]])
            prefill = alternate(repeats, [_turn(s, depth, _prefill, corpus) for s in here])
            nothing, decode = decode[0], decode[1:]
            flash = 0 if not here[0].setup.budget else None
            plain = 1 if len(full) > 1 and flash is not None else None
            for i, system in enumerate(here):
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
                    of_empty=pair_ratio(decode[i], nothing),
                    byte_limit=weights / (weights + _read_bytes(system, depth)),
                )
                if system.setup.budget and flash is not None:
                    row["decode_vs_flash"] = pair_ratio(decode[i], decode[flash])
                    row["prefill_vs_flash"] = pair_ratio(prefill[i], prefill[flash])
                    row["decode_vs_no_flash"] = None if plain is None else pair_ratio(decode[i], decode[plain])
            if out:
                report.save(out)


def _read_bytes(system: System, depth: int) -> int:
    """Bytes of entries and latent slots that a token reads."""
    held = min(depth, system.setup.budget) if system.setup.budget else depth
    return held * system.model.token_bytes(system.setup.cache_type)


def verdicts(report: Report) -> list[Verdict]:
    """The goals; those of a depth are judged where it was measured."""
    found: list[Verdict] = []
    for system in dict.fromkeys(row["system"] for row in report.rows if row["budget"]):
        mine = [row for row in report.rows if row["system"] == system]
        found += _of_depths(system, mine)
    for row in report.extra.get("rows_at_once", ()):
        if row["rows"] == 8:
            found.append(Verdict(f"{row['system']}: 8 rows at once / 1 row", row["speedup"], 4.0))
    for row in report.extra.get("latency", ()):
        found.append(Verdict(f"{row['system']}: 99th percentile of token latency / median", row["p99_vs_p50"], 1.5, at_most=True))
    for row in report.extra.get("prefill", ()):
        if row["vs_flash"] is not None and row["budget"]:
            goal = 4.0 if row["tokens"] >= 32768 else None
            found.append(Verdict(f"{row['system']}: prefill of {row['tokens']} tokens / unbounded", row["vs_flash"], goal))
    return found


def _of_depths(system: str, rows: Sequence[Row]) -> list[Verdict]:
    budget = rows[0]["budget"]
    past = [row for row in rows if row["depth"] > budget]
    out = []
    if past:
        goal, worst = (0.6 if "memory" in system else 0.65), min(past, key=lambda row: row["of_empty"])
        limit = f", limit by bytes {worst['byte_limit']:.2f}"
        out.append(Verdict(f"{system}: decode past the budget / empty context (worst depth{limit})", worst["of_empty"], goal))
    at = next((row for row in rows if row["depth"] == 8192), None)
    for key, what, goal in (("decode_vs_flash", "with", 15.0), ("decode_vs_no_flash", "without", 5.0)):
        if at and at.get(key) is not None:
            # a bounded cache that costs nothing would reach the speed of the empty context
            most = at[key] / at["of_empty"]
            out.append(Verdict(f"{system}: decode at 8192 / unbounded {what} flash attention (a free cache: {most:.1f})", at[key], goal))
    flat = [row for row in past if row["depth"] >= 2048]
    if len(flat) > 1:
        low, high = (pick(row["of_empty"] for row in flat) for pick in (min, max))
        deepest = max(row["depth"] for row in flat)
        out.append(Verdict(f"{system}: slowest / fastest depth from {flat[0]['depth']} to {deepest}", low / high, 0.97))
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
    """Tokens/s over the tokens seen, a line per system."""
    if not report.rows:
        return
    for axis, key, name in zip(figure.subplots(1, 2), ("decode_tps", "prefill_tps"), ("decode", "prefill")):
        for system in dict.fromkeys(row["system"] for row in report.rows):
            x, y = series([row for row in report.rows if row["system"] == system], "depth", key)
            axis.plot([max(depth, 256) for depth in x], y, marker="o", label=system)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="tokens already seen (the first point: none)", ylabel=f"{name}, tokens/s", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
