"""What a latent memory costs: decode and prefill with one, against the same policy and budget without."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from indexmem_edge.native.memory import resident_memory
from indexmem_edge.runtime.choice import INDEXER_POLICY, MEMORY_OFF

from .. import synthetic
from ..machine import describe
from ..quality.arms import Sidecar, Sidecars, arms, setup_for
from ..report import Report, Row, Verdict
from ..runner import BenchError, Model, Setup, System, library
from .turns import HOW, Side, corpus_of, past_budget, plot_ratios, take_turns, verdict

RESIDUAL = "residual"  # the kind that needs weights
GOALS = {"decode_ratio": 0.93, "prefill_ratio": 0.90}
COLUMNS = (
    "system",
    "decode_tps",
    "decode_ratio",
    "prefill_tps",
    "prefill_ratio",
    "memory_slots",
    "memory_bytes",
    "meta_bytes",
    "kv_bytes",
)


def run_latent(
    model: Model,
    base: Setup,
    policies: Sequence[str],
    memories: Sequence[str],
    sidecars: Sidecars,
    *,
    depth: int = 0,
    rounds: int = 20,
    prefill_rounds: int = 8,
    text: Path | None = None,
    progress: Progress | None = None,
    out: Path | None = None,
) -> Report:
    """Each memory takes turns, with each policy, with the same cache without it."""
    if MEMORY_OFF in memories:
        raise BenchError(f"the memory {MEMORY_OFF} is what the others are compared with: leave it out")
    with tempfile.TemporaryDirectory() as folder:
        sidecars = with_random_memory(model, memories, sidecars, Path(folder))
        found = arms(policies, [1.0], memories, sidecars, [base.cache_type])
        setups = [setup_for(base, arm, sidecars, base.budget, 0) for arm in found]
        depth, corpus = past_budget(base, depth), corpus_of(model, text)
        report = Report(
            "latent",
            describe(
                model.path.name,
                library(),
                base.threads,
                how=f"at {depth} tokens and more, past the budget of {base.budget}, of which the slots of the memory are "
                f"a part: {rounds} alternating turns of decode over whole cycles of eviction, {prefill_rounds} of {base.ubatch} "
                f"prefilled tokens each, with and without the memory; {HOW}",
                repeats=rounds,
                ubatch=base.ubatch,
                cache_type=base.cache_type,
                depth=depth,
                text=text.name if text else "built in",
                sidecars=sidecars.describe() or None,
            ),
        )
        task = progress.add_task("latent", total=len(setups)) if progress else None
        for arm, setup in zip(found, setups):
            with System(model, _without(setup)) as plain, System(model, setup) as system:
                sides = Side(plain, corpus, depth), Side(system, corpus, depth)
                turns = take_turns(*sides, rounds, prefill_rounds)
                for i, side in enumerate(sides):
                    report.add(**_row(arm.policy, side.system), turn=side.turn, **turns.figures(i))
            report.verdicts = verdicts(report.rows)
            if out:
                report.save(out)
            if progress and task is not None:
                progress.advance(task)
    return report


def with_random_memory(model: Model, memories: Sequence[str], sidecars: Sidecars, folder: Path) -> Sidecars:
    """With random weights for a memory that needs weights, unless a sidecar has them: they cost what trained ones do."""
    held = {s.memory for s in (*sidecars.indexers.values(), sidecars.memory) if s}
    if RESIDUAL not in memories or RESIDUAL in held or sidecars.memory:
        return sidecars
    path = synthetic.random_memory(folder / "random.indexmem.gguf", synthetic.shape_of(model))
    return replace(sidecars, memory=Sidecar.open(path))


def _without(setup: Setup) -> Setup:
    """A sidecar stays where it ranks; one that was there for the memory alone goes with it."""
    sidecar = setup.sidecar if setup.policy == INDEXER_POLICY else None
    return replace(setup, memory=MEMORY_OFF, memory_slots=0, sidecar=sidecar)


def _row(policy: str, system: System) -> Row:
    setup, stats = system.setup, system.stats()
    slots = stats["memory_slots"]
    memory = "" if setup.memory == MEMORY_OFF else f", {setup.memory}" + (f" {slots}" if slots else "")
    return {
        "policy": policy,
        "budget": setup.budget,
        "memory": setup.memory,
        "memory_slots": slots,
        "system": policy + memory,
        "tokens_seen": system.seen,
        "kept": stats["kept"],
        "rss_bytes": resident_memory(),
        **system.byte_counts(),
    }


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    return [
        verdict(row, key, f"with {row['system']} / without", goal)
        for key, goal in GOALS.items()
        for row in rows
        if row["memory"] != MEMORY_OFF
    ]


def plot(figure: Any, report: Report) -> None:
    rows = [row for row in report.rows if row["memory"] != MEMORY_OFF][::-1]
    plot_ratios(figure, rows, GOALS, lambda goal: f"without (goal: {goal:g})", "")
