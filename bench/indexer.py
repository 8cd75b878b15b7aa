"""What a trained indexer costs: decode and prefill with one, against the same cache that ranks by position alone.

Time depends on shapes and types, not on values, so the indexers are random (`synthetic.py`).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from indexmem_edge.options import INDEXER_POLICY

from . import synthetic
from .machine import describe, rss_bytes
from .report import Report, Verdict
from .runner import BenchError, Model, Setup, System, library
from .stats import alternate, pair_interval, pair_ratio
from .text import TokenStream, read_text

N_CHARS = 50_000  # of the text, fed over and over
TYPES = ("f32", "f16", "q8_0")
LEAST = 32  # decoded tokens of one turn, rounded up to whole cycles of eviction
GOALS = {"decode_ratio": 0.97, "prefill_ratio": 0.95}  # of the retention indexer
COLUMNS = (
    "system",
    "decode_tps",
    "decode_ratio",
    "prefill_tps",
    "prefill_ratio",
    "sidecar_bytes",
    "indexer_bytes",
    "meta_bytes",
    "kv_bytes",
)


def run_indexer(
    model: Model,
    setup: Setup,
    variants: Sequence[str],
    types: Sequence[str],
    *,
    name: str = "indexer",
    depth: int = 0,
    rounds: int = 6,
    prefill_rounds: int = 3,
    text: Path | None = None,
    progress: Progress | None = None,
    out: Path | None = None,
    **meta: Any,
) -> Report:
    """One context with `setup` stays open; one with each indexer in turn is filled and alternates with it."""
    shape = synthetic.shape_of(model)
    systems = list(_systems(shape, variants, types))
    depth = depth or setup.budget + setup.ubatch
    if depth <= setup.budget:
        raise BenchError(f"a depth of {depth} is not past the budget of {setup.budget}: nothing would be evicted")
    corpus = model.tokens(read_text(text, N_CHARS)[:N_CHARS])
    with System(model, setup) as base, tempfile.TemporaryDirectory() as folder:
        stream = TokenStream(corpus)
        turn = whole_cycles(_fill(base, stream, depth))
        report = Report(name, describe(model.path.name, library(), setup.threads, **meta))
        report.meta.update(
            how=f"random weights; at {depth} tokens and more, past the budget of {setup.budget}: {rounds} alternating "
            f"turns of {turn} decoded tokens (whole cycles of eviction), {prefill_rounds} of {setup.ubatch} prefilled "
            "tokens each, with an indexer and with the policy streaming; figures are medians, ratios medians of the "
            "pairwise ratios, with 95 % intervals by drawing the pairs again",
            repeats=rounds,
            ubatch=setup.ubatch,
            cache_type=setup.cache_type,
            depth=depth,
            turn=turn,
            layers=shape.n_layer,
            text=text.name if text else "built in",
        )
        task = progress.add_task("indexer", total=len(systems)) if progress else None
        base.decode(turn, base.greedy())  # once, so that nothing is measured cold
        ours = report.add(policy=setup.policy, budget=setup.budget, system=setup.policy)
        decoded: list[float] = []
        prefilled: list[float] = []
        for variant, kind in systems:
            sidecar = synthetic.random_sidecar(Path(folder) / "random.indexmem.gguf", shape, variant, kind)
            with System(model, replace(setup, policy=INDEXER_POLICY, sidecar=sidecar)) as system:
                other = TokenStream(corpus)
                _fill(system, other, depth)
                system.decode(turn, system.greedy())
                decode = alternate(rounds, [_decoder(base, turn), _decoder(system, turn)])
                prefill = alternate(prefill_rounds, [_prefiller(base, stream), _prefiller(system, other)])
                report.add(
                    policy=INDEXER_POLICY,
                    budget=setup.budget,
                    system=f"{variant}, {kind}",
                    indexer=variant,
                    type=kind,
                    tokens_seen=system.seen,
                    rss_bytes=rss_bytes(),
                    decode_tps=statistics.median(decode[1]),
                    prefill_tps=statistics.median(prefill[1]),
                    decode_ratio=pair_ratio(decode[1], decode[0]),
                    decode_interval=pair_interval(decode[1], decode[0]),
                    prefill_ratio=pair_ratio(prefill[1], prefill[0]),
                    prefill_interval=pair_interval(prefill[1], prefill[0]),
                    **system.byte_counts(),
                )
            decoded += decode[0]
            prefilled += prefill[0]
            ours.update(
                tokens_seen=base.seen,
                rss_bytes=rss_bytes(),
                decode_tps=statistics.median(decoded),
                prefill_tps=statistics.median(prefilled),
                decode_ratio=1.0,
                prefill_ratio=1.0,
                **base.byte_counts(),
            )
            report.verdicts = verdicts(report.rows)
            if out:
                report.save(out)
            if progress and task is not None:
                progress.advance(task)
    return report


def whole_cycles(evict_step: int) -> int:
    """The least number of tokens, LEAST or more, after which the cache is as full as before."""
    step = max(evict_step, 1)
    return -(-LEAST // step) * step


def _systems(shape: synthetic.Shape, variants: Sequence[str], types: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Variants times types; once where there is no matrix to which the type applies."""
    for what, given, known in (("indexer", variants, tuple(synthetic.VARIANTS)), ("type", types, TYPES)):
        unknown = [value for value in given if value not in known]
        if unknown or not given:
            raise BenchError(f"unknown {what} {', '.join(unknown) or 'list'}: choose from {', '.join(known)}")
    for variant in variants:
        for kind in types if synthetic.has_matrices(shape, variant) else ("f32",):
            yield variant, kind


def _fill(system: System, stream: TokenStream, depth: int) -> int:
    """Goes to the depth and returns how many entries leave at once during decode."""
    system.feed(stream.take(depth), last_logits=True)
    return system.evict_step()


def _decoder(system: System, turn: int) -> Callable[[], float]:
    return lambda: turn / sum(system.decode(turn, system.greedy()))


def _prefiller(system: System, stream: TokenStream) -> Callable[[], float]:
    size = system.setup.ubatch
    return lambda: size / sum(seconds for _, seconds in system.feed(stream.take(size)))


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The goals are for the retention indexer; the others are told."""
    return [
        Verdict(
            f"{key.partition('_')[0]} with {row['system']} / streaming "
            f"({' to '.join(f'{x:.3f}' for x in row[key.replace('ratio', 'interval')])})",
            row[key],
            goal if row["indexer"].startswith("retention") else None,
        )
        for key, goal in GOALS.items()
        for row in rows
        if row.get("indexer")
    ]


def plot(figure: Any, report: Report) -> None:
    rows = [row for row in report.rows if row.get("indexer")][::-1]
    for axis, (key, goal) in zip(figure.subplots(1, 2, sharey=True), GOALS.items()):
        colours = ["C0" if row["indexer"].startswith("retention") else "C7" for row in rows]
        interval = [row[key.replace("ratio", "interval")] for row in rows]
        values = [row[key] for row in rows]
        errors = [[v - low for v, (low, _) in zip(values, interval)], [high - v for v, (_, high) in zip(values, interval)]]
        axis.barh([row["system"] for row in rows], values, color=colours, xerr=errors, ecolor="0.3", capsize=2)
        axis.axvline(goal, color="black", linestyle="--", linewidth=1)
        axis.set(xlabel=f"{key.partition('_')[0]} / streaming (goal of retention: {goal:g})")
        axis.grid(alpha=0.3, axis="x")
