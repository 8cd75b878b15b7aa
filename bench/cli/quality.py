"""`indexmem bench quality`: its options, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import typer

from . import ruler as cli_ruler
from .options import (
    BOOK,
    DATA,
    INDEXMEMS,
    JSON,
    MODEL,
    OUT,
    RATIO,
    THREADS,
    UBATCH,
    demo_model,
    finish,
    memories_of,
    numbers,
    policies_of,
    session,
    setup_of,
)

ABLATED = (
    "streaming,keydiff"  # what a memory goes with beside the indexer: what is recent, and the best policy measured
)


def quality(
    data: Optional[Path] = DATA,
    text: Optional[Path] = BOOK,
    model: Optional[Path] = MODEL,
    weights: Optional[str] = typer.Option(
        None,
        help="Write quantised weights out as bf16 or f16, once, to a folder for temporary files: prompts are read faster.",
        show_default="as they are",
    ),
    lengths: str = typer.Option("2048,4096", help="Lengths, folders of DATA."),
    tasks: Optional[str] = typer.Option(None, help="Tasks; default: all that are there.", show_default=False),
    policies: Optional[str] = typer.Option(
        None, help="Policies; default: all. The full cache always runs, so do indexers of sidecars.", show_default=False
    ),
    memories: str = typer.Option("off", help="Latent memories: off, centroid, centroid:SLOTS, residual."),
    indexmem: Optional[list[Path]] = INDEXMEMS,
    ablation: bool = typer.Option(
        False,
        help="Of a sidecar with indexer and memory: each alone and both. Policies beside the indexer: "
        f"{ABLATED}, or those named.",
    ),
    kv_budget_ratio: Optional[float] = RATIO,
    budgets: str = typer.Option("0.25,0.5,0.1", help="Shares of what the full f16 cache takes for the context."),
    budget_in: str = typer.Option(
        "bytes", help="What they are shares of: bytes, with all state and weights, or entries."
    ),
    cache_types: str = typer.Option(
        "f16", help="Types of the entries of bounded caches, K/V for two: f16,q8_0,q8_0/q4_0."
    ),
    full_types: str = typer.Option("q8_0,q4_0", help="Types of full caches that run beside that in f16; none: ''."),
    samples: int = typer.Option(25, help="Samples of each task."),
    all_tasks: bool = typer.Option(False, help="Run policies on tasks that the full cache cannot do, too."),
    nll_text: Optional[Path] = typer.Option(None, exists=True, help="Book whose likelihood is measured as well."),
    nll_tokens: int = typer.Option(4096, help="Tokens of it to score, 512 after each window."),
    time_limit: Optional[float] = typer.Option(
        None, min=1, help="Seconds after which no trial begins; finished samples are judged.", show_default=False
    ),
    threads: int = THREADS,
    ubatch: int = UBATCH,
    seed: int = typer.Option(0, help="For the policy `random`, the places in the book and samples made here."),
    full_only: bool = typer.Option(False, help="Run the full cache and stop: which tasks can it do?"),
    markdown: Optional[Path] = typer.Option(None, help="Write the tables of the results page here."),
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """RULER scores and likelihoods with physically evicted contexts, at equal bytes. Can be stopped and started again: finished
    runs are kept.
    """
    from ..quality import effect, run as bench, table as quality_table
    from ..quality.arms import Sidecars
    from ..quality.plan import Plan
    from ..quality.trial import BOOK_SCORED
    from ..report import draw, print_table
    from ..runner import UNBOUNDED, BenchError, kv_types

    with session(model, as_json, _copy_of(model, weights)) as (loaded, progress):
        wanted = tuple(numbers(lengths, int))
        made = ""
        if data is None:
            data, made = cli_ruler.samples_for(loaded, wanted, tasks, samples, seed, text, progress)
        names = cli_ruler.tasks_in(data, wanted, tasks)
        sidecars, of_memory = Sidecars.open(indexmem or []), memories_of(memories)
        if ablation:
            sidecars = sidecars.lent()
            if not sidecars.indexers or not sidecars.memory:
                raise BenchError("an ablation needs a sidecar with indexer and memory: name it with --indexmem FILE")
            of_memory, policies = memories_of(f"off,{sidecars.memory.memory}"), policies or ABLATED
        found = [] if full_only else policies_of(policies, list(sidecars.indexers))
        types = [_names(text) for text in (cache_types, full_types)]
        for name in types[0] + types[1]:
            kv_types(name)  # an unknown one is an error before anything runs
        plan = Plan(
            data,
            wanted,
            names,
            tuple(name for name in found if name != UNBOUNDED),
            tuple(numbers(budgets, float)),
            samples,
            setup_of(None, 0, "f16", 4, 128, threads, ubatch, seed, ratio=kv_budget_ratio),
            all_tasks,
            nll_text,
            nll_tokens // BOOK_SCORED if nll_text else 0,
            of_memory,
            sidecars,
            types[0],
            types[1],
            budget_in,
            full_only,
            made,
        )
        report = bench.run_quality(loaded, plan, out, seed, time_limit, weights, progress)
    if full_only:
        finish(report, quality_table.DETAILS, out, quality_table.plot, as_json)
    else:
        columns, cells = quality_table.table(report.extra["standing"], report.extra["versus"])
        rows = [dict(zip(columns, line)) for line in cells]
        finish(report, columns, out, quality_table.plot, as_json, rows)
    changed = report.extra.get("differences", [])
    if changed:
        draw(out / "quality-memory.png", report, effect.plot)
        if not as_json:
            print_table("memory - off", effect.COLUMNS, effect.table(changed, tasks=ablation))
    if not as_json:
        _remarks(report)
    if markdown:
        markdown.write_text(
            "\n".join(filter(None, (quality_table.markdown(report.to_dict()), effect.markdown(changed)))),
            encoding="utf-8",
        )


def _copy_of(model: Optional[Path], weights: Optional[str]) -> Any:
    """What makes the file to measure, if that is not the model itself."""
    if weights is None:
        return None

    def make() -> Path:
        from ..quality.weights import converted

        return converted(model or demo_model(), weights)

    return make


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for word in text.split(",") if word))


def _remarks(report: Any) -> None:
    """What the tables do not say: arms that are not in them, and a run that was cut off."""
    lines: Sequence[str] = [
        f"left out at {row['length']} tokens: {row['why']}" for row in report.extra.get("left_out", [])
    ]
    if report.meta.get("cut_off"):
        counts = [
            f"{n} of {task} at {length}"
            for length, of in report.meta["finished_samples"].items()
            for task, n in of.items()
        ]
        lines = [
            *lines,
            f"cut off {report.meta['cut_off']}; samples that all arms finished: {', '.join(counts) or 'none'}",
        ]
    for line in lines:
        print(line)
