"""Decode and prefill at growing depths: the stock cache with and without flash attention, and bounded ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import Progress

from indexmem_edge.native.memory import resident_memory

from ..machine import describe
from ..report import Report, Row, print_rows, series
from ..runner import BenchError, Model, Setup, System, captures, library, llama_cpp
from ..stats import alternate, pair_ratio
from ..text import TokenStream, read_text
from . import evictions as evictions_of, parts as parts_of
from .goals import bytes_limit, has_all, verdicts

COLUMNS = (
    "system",
    "budget",
    "depth",
    "tokens_seen",
    "kv_bytes",
    "prefill_tps",
    "decode_tps",
    "decode_vs_empty",
    "bytes_limit",
    "decode_vs_flash",
    "decode_vs_no_flash",
    "prefill_vs_flash",
    "graphs_built",  # during a turn of decoding, as the next two
    "captures_made",
    "captures_dropped",
)
PARTS = ("depths", "rows", "latency", "prefill", "evictions")
COLUMNS_OF = {**parts_of.COLUMNS, "evictions": evictions_of.COLUMNS}
PREFILL = 512
Measured = TypeVar("Measured")
CHUNK = 32  # decoded tokens of one turn: at least one eviction falls into each
FLASH, NO_FLASH = "unbounded", "unbounded, no flash"  # as Setup.label has them


def run_speed(
    model: Model,
    bounded: Sequence[Setup],
    depths: Sequence[int],
    *,
    parts: Sequence[str] = ("depths",),
    full_depth_max: int | None = None,
    prefill_tokens: int = 32768,
    prefill_full_tokens: int | None = None,
    latency_tokens: int = 320,
    eviction_budgets: Sequence[int] = (2048, 16384, 32768),
    eviction_rounds: int = 15,
    eviction_policies: Sequence[str] | None = None,
    text: Path | None = None,
    decode_tokens: int = 64,
    repeats: int = 3,
    no_flash: bool = True,
    name: str = "speed",
    progress: Progress | None = None,
    out: Path | None = None,
) -> Report:
    """The wanted parts, one after the other; what is there is saved after each.

    Args:
        bounded: the bounded systems; they differ in no more than policy, sidecar and memory.
        full_depth_max: the unbounded systems stop at this depth; None: they go to the end.
        prefill_tokens, prefill_full_tokens: length of the text of the part `prefill`, and how much of it the unbounded
            cache reads; None: all.
        eviction_policies: of the part `evictions`; None: all that need nothing but the model.

    Raises:
        BenchError: an unknown part, no bounded system, or no depth.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise BenchError(f"unknown part {', '.join(unknown) or 'list'}: choose from {', '.join(PARTS)}")
    if not bounded or not depths:
        raise BenchError("speed takes at least one bounded system and one depth")
    base = bounded[0]
    rounds = max(1, -(-decode_tokens * repeats // CHUNK))
    report = Report(
        name,
        describe(
            model.path.name,
            library(),
            base.threads,
            how=f"decode: {rounds} alternating turns of {CHUNK} tokens a system and of an unbounded cache that is emptied after "
            f"each; prefill: {repeats} alternating turns of {PREFILL} tokens; figures are medians, ratios medians of the "
            "pairwise ratios; a turn is undone where the cache allows it, else it counts as seen",
            repeats=repeats,
            text=text.name if text else "built in",
            ubatch=base.ubatch,
            cache_type=base.cache_type,
            parts=list(parts),
            full_depth_max=full_depth_max,
            weight_bytes=model.weight_bytes(),
            token_bytes=model.token_bytes(base.cache_type),
            indexer_and_memory=[setup.label for setup in bounded if has_all(setup)],
        ),
    )
    corpus = model.tokens(read_text(text))
    stock = base.unbounded()

    def save() -> None:
        report.verdicts = verdicts(report)
        if out:
            report.save(out)

    if "depths" in parts:
        flashes = (True, False) if no_flash else (True,)
        setups = [*(replace(stock, flash=flash) for flash in flashes), *bounded]
        _depths(model, report, setups, sorted(depths), full_depth_max, rounds, repeats, corpus, progress, save)
    for part, key, measure in (
        ("rows", "rows_at_once", lambda: parts_of.rows_at_once(model, bounded, corpus, rounds, progress)),
        ("latency", "latency", lambda: parts_of.latencies(model, bounded, corpus, latency_tokens, stock, progress)),
        (
            "prefill",
            "prefill",
            lambda: parts_of.long_prefill(
                model, [stock, *bounded], corpus, prefill_tokens, prefill_full_tokens, progress
            ),
        ),
        (
            "evictions",
            "evictions",
            lambda: evictions_of.evictions(
                model, base, eviction_policies or evictions_of.policies(), eviction_budgets, corpus, eviction_rounds
            ),
        ),
    ):
        if part in parts:
            report.extra[key] = measure()
            save()
    return report


def _depths(
    model: Model,
    report: Report,
    setups: Sequence[Setup],
    depths: Sequence[int],
    full_depth_max: int | None,
    rounds: int,
    repeats: int,
    corpus: list[int],
    progress: Progress | None,
    save: Callable[[], None],
) -> None:
    """Fills every system once, depth by depth; at each depth the systems take turns of a few tokens."""
    most = min(depths[-1], depths[-1] if full_depth_max is None else full_depth_max)
    weights = report.meta["weight_bytes"]
    task = progress.add_task("depths", total=len(depths) * len(setups)) if progress else None
    with ExitStack() as stack:
        empty = stack.enter_context(System(model, replace(setups[0], n_ctx=CHUNK)))
        turns_of = (rounds + 1) * CHUNK + repeats * PREFILL  # at a depth; a recurrent state cannot be rolled back
        room = turns_of * len(depths) if model.has_recurrent() else PREFILL + CHUNK
        systems = [stack.enter_context(System(model, replace(s, n_ctx=most + room))) for s in setups]
        for depth in depths:
            here = [system for system in systems if system.setup.budget or depth <= most]
            for system in here:
                _fill(system, corpus, depth)
                if progress and task is not None:
                    progress.advance(task)
            if progress and task is not None:
                progress.advance(task, len(systems) - len(here))
            turns = [_turn(empty, 0, _decode, corpus), *(_turn(s, depth, _decode, corpus) for s in here)]
            from_empty, *decode = alternate(rounds, turns)
            prefill = alternate(repeats, [_turn(s, depth, _prefill, corpus) for s in here])
            built = [_turn(s, depth, _built, corpus)() for s in here]
            at = {system.setup.label: i for i, system in enumerate(here)}
            for i, system in enumerate(here):
                setup, read = system.setup, min(depth, system.setup.budget or depth) * report.meta["token_bytes"]
                report.add(
                    policy=setup.policy,
                    budget=setup.budget,
                    tokens_seen=system.seen,
                    **system.byte_counts(),
                    rss_bytes=resident_memory(),
                    prefill_tps=statistics.median(prefill[i]),
                    decode_tps=statistics.median(decode[i]),
                    system=setup.label,
                    flash=setup.flash,
                    depth=depth,
                    decode_vs_empty=pair_ratio(decode[i], from_empty),
                    bytes_limit=bytes_limit(weights, read),
                    **built[i],
                    **(_against(i, at, decode, prefill) if setup.budget else {}),
                )
            save()


def _against(i: int, at: dict[str, int], decode: list[list[float]], prefill: list[list[float]]) -> Row:
    """A bounded system against the unbounded ones that went this far."""
    row: Row = {}
    for name, key in ((FLASH, "flash"), (NO_FLASH, "no_flash")):
        row[f"decode_vs_{key}"] = pair_ratio(decode[i], decode[at[name]]) if name in at else None
    row["prefill_vs_flash"] = pair_ratio(prefill[i], prefill[at[FLASH]]) if FLASH in at else None
    return row


def _fill(system: System, corpus: list[int], depth: int) -> None:
    if depth > system.seen:
        system.feed(TokenStream(corpus, system.seen).take(depth - system.seen))


def _decode(system: System, stream: TokenStream) -> float:
    return CHUNK / sum(system.decode(CHUNK, stream.take(1)[0]))


def _built(system: System, stream: TokenStream) -> Row:
    """Of the tokens that follow the first, before which there may have been a ubatch of many, whose graph is another: graphs that were
    built, and on a device those that were captured, and were captured in vain.
    """
    system.decode(1, stream.take(1)[0])
    before, captured = system.n_reused(), replace(captures)
    system.decode(CHUNK - 1, stream.take(1)[0])
    built: Row = {"graphs_built": CHUNK - 1 - (system.n_reused() - before)}
    if llama_cpp.llama_supports_gpu_offload():
        built |= {"captures_made": captures.made - captured.made, "captures_dropped": captures.dropped - captured.dropped}
    return built


def _prefill(system: System, stream: TokenStream) -> float:
    return PREFILL / sum(seconds for _, seconds in system.feed(stream.take(PREFILL)))


def _turn(
    system: System, depth: int, measure: Callable[[System, TokenStream], Measured], corpus: list[int]
) -> Callable[[], Measured]:
    def turn() -> Measured:
        value = measure(system, TokenStream(corpus, system.seen))
        system.rollback(depth)
        return value

    return turn


def print_parts(report: Report) -> None:
    """The tables of the parts other than the depths."""
    for part, rows in report.extra.items():
        print_rows(f"{report.name}: {part}", COLUMNS_OF[part], rows)


def plot(figure: Any, report: Report) -> None:
    """Tokens per second over tokens seen, one line per system; depth 0 stands at the left edge."""
    panels = [("decode", "decode_tps"), ("prefill", "prefill_tps")]
    for axis, (name, key) in zip(figure.subplots(1, 2), panels):
        for system in _systems(report.rows):
            x, y = series([row for row in report.rows if row["system"] == system], "depth", key)
            axis.plot(x, y, marker="o", label=system)
        axis.set_xscale("symlog", base=2, linthresh=512)
        axis.set(xlabel="tokens already seen", ylabel=f"{name}, tokens/s", ylim=(0, None))
        axis.grid(alpha=0.3)
        if report.rows:
            axis.legend(fontsize=8)


def _systems(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["system"] for row in rows))
