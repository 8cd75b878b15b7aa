"""The command `indexmem bench longbench`: the official files of LongBench, with bounded caches."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from .options import (
    INDEXMEMS,
    JSON,
    MODEL,
    OUT,
    RATIO,
    THREADS,
    UBATCH,
    finish,
    memories_of,
    numbers,
    policies_of,
    session,
    setup_of,
)

ABLE = 0.05  # below it a score of the full cache is chance, and shares of it say nothing
SCORED = (
    "official prompt of each task, without a chat template; what is longer than the length loses its middle; the question is what "
    "the prompt has after the text; score: as LongBench publishes"
)


def longbench(
    data: Path = typer.Option(
        ..., exists=True, file_okay=False, help="Folder with LongBench: its .jsonl files, dataset2prompt.json, dataset2maxlen.json."
    ),
    model: Optional[Path] = MODEL,
    length: str = typer.Option("7500", "--length", help="Tokens of a prompt, at most."),
    tasks: Optional[str] = typer.Option(None, help="Tasks; default: all that are there.", show_default=False),
    policies: Optional[str] = typer.Option(
        None, help="Policies; default: all. The full cache always runs, so do indexers of sidecars.", show_default=False
    ),
    memories: str = typer.Option("off", help="Latent memories: off, centroid, centroid:SLOTS, residual."),
    indexmem: Optional[list[Path]] = INDEXMEMS,
    kv_budget_ratio: Optional[float] = RATIO,
    budgets: str = typer.Option("0.25,0.5,0.1", help="Shares of what the full f16 cache takes for the context."),
    budget_in: str = typer.Option("bytes", help="What they are shares of: bytes, with all state and weights, or entries."),
    samples: int = typer.Option(200, min=1, help="Samples of each task, from the beginning of its file."),
    time_limit: Optional[float] = typer.Option(
        None, min=1, help="Seconds after which no trial begins; finished samples are judged.", show_default=False
    ),
    threads: int = THREADS,
    ubatch: int = UBATCH,
    seed: int = typer.Option(0, help="For the policy `random`."),
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """LongBench's official files with physically evicted contexts, scored as published. Can be stopped and started again."""
    from ..longbench.files import Folder, loader
    from ..longbench.table import table
    from ..quality import run as bench, table as quality_table
    from ..quality.arms import Sidecars
    from ..quality.plan import Plan
    from ..report import print_table
    from ..runner import UNBOUNDED

    with session(model, as_json) as (loaded, progress):
        folder = Folder(data)
        sidecars = Sidecars.open(indexmem or [])
        found = policies_of(policies, list(sidecars.indexers))
        plan = Plan(
            data=data,
            lengths=tuple(numbers(length, int)),
            tasks=folder.tasks(tasks),
            policies=tuple(name for name in found if name != UNBOUNDED),
            ratios=tuple(numbers(budgets, float)),
            samples=samples,
            base=setup_of(None, 0, "f16", 4, 128, threads, ubatch, seed, ratio=kv_budget_ratio),
            memories=memories_of(memories),
            sidecars=sidecars,
            budget_in=budget_in,
            made=f"longbench {folder.identity}",
            load=loader(folder, loaded),
            name="longbench",
            able=ABLE,
            scored=SCORED,
            all_tasks=True,
        )
        report = bench.run_quality(loaded, plan, out, seed, time_limit, progress=progress)
    if not as_json:
        print_table("scores of LongBench", *table(report.rows))
    columns, cells = quality_table.table(report.extra["standing"], report.extra["versus"])
    finish(report, columns, out, quality_table.plot, as_json, [dict(zip(columns, line)) for line in cells])
