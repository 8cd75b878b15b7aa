"""What a trained indexer costs: decode and prefill with one, against the same cache that ranks by position alone.

Time depends on shapes and types, not on values, so the indexers are random (`synthetic.py`).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from indexmem_edge.native.memory import resident_memory
from indexmem_edge.runtime.choice import INDEXER_POLICY

from .. import synthetic
from ..machine import describe
from ..report import Report, Verdict
from ..runner import BenchError, Model, Setup, System, library
from .turns import HOW, Side, corpus_of, past_budget, plot_ratios, take_turns, verdict

TYPES = ("f32", "f16", "q8_0")
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
    depth, corpus = past_budget(setup, depth), corpus_of(model, text)
    with System(model, setup) as plain, tempfile.TemporaryDirectory() as folder:
        base = Side(plain, corpus, depth)
        report = Report(name, describe(model.path.name, library(), setup.threads, **meta))
        report.meta.update(
            how=f"random weights; at {depth} tokens and more, past the budget of {setup.budget}: {rounds} alternating "
            f"turns of {base.turn} decoded tokens (whole cycles of eviction), {prefill_rounds} of {setup.ubatch} prefilled "
            f"tokens each, with an indexer and with the policy streaming; {HOW}",
            repeats=rounds,
            ubatch=setup.ubatch,
            cache_type=setup.cache_type,
            depth=depth,
            turn=base.turn,
            layers=shape.n_layer,
            text=text.name if text else "built in",
        )
        task = progress.add_task("indexer", total=len(systems)) if progress else None
        ours = report.add(policy=setup.policy, budget=setup.budget, system=setup.policy)
        decoded: list[float] = []
        prefilled: list[float] = []
        for variant, kind in systems:
            sidecar = synthetic.random_sidecar(Path(folder) / "random.indexmem.gguf", shape, variant, kind)
            with System(model, replace(setup, policy=INDEXER_POLICY, sidecar=str(sidecar))) as system:
                turns = take_turns(base, Side(system, corpus, depth), rounds, prefill_rounds)
                report.add(
                    policy=INDEXER_POLICY,
                    budget=setup.budget,
                    system=f"{variant}, {kind}",
                    indexer=variant,
                    type=kind,
                    tokens_seen=system.seen,
                    rss_bytes=resident_memory(),
                    **turns.figures(),
                    **system.byte_counts(),
                )
            decoded += turns.decode[0]
            prefilled += turns.prefill[0]
            ours.update(
                tokens_seen=plain.seen,
                rss_bytes=resident_memory(),
                decode_tps=statistics.median(decoded),
                prefill_tps=statistics.median(prefilled),
                decode_ratio=1.0,
                prefill_ratio=1.0,
                **plain.byte_counts(),
            )
            report.verdicts = verdicts(report.rows)
            if out:
                report.save(out)
            if progress and task is not None:
                progress.advance(task)
    return report


def _systems(shape: synthetic.Shape, variants: Sequence[str], types: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Variants times types; once where there is no matrix to which the type applies."""
    for what, given, known in (("indexer", variants, tuple(synthetic.VARIANTS)), ("type", types, TYPES)):
        unknown = [value for value in given if value not in known]
        if unknown or not given:
            raise BenchError(f"unknown {what} {', '.join(unknown) or 'list'}: choose from {', '.join(known)}")
    for variant in variants:
        for kind in types if synthetic.has_matrices(shape, variant) else ("f32",):
            yield variant, kind


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The goals are for the retention indexer; the others are told."""
    return [
        verdict(row, key, f"with {row['system']} / streaming", goal if row["indexer"].startswith("retention") else None)
        for key, goal in GOALS.items()
        for row in rows
        if row.get("indexer")
    ]


def plot(figure: Any, report: Report) -> None:
    rows = [row for row in report.rows if row.get("indexer")][::-1]
    plot_ratios(figure, rows, GOALS, lambda goal: f"streaming (goal of retention: {goal:g})", "retention")
