"""`indexmem bench`: memory, speed, quality, indexers, latent memories, GPUs, the server: a table, a JSON file and a plot each."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from indexmem_edge.options import DEFAULT_SINKS, LEAST_WINDOW

from . import ruler as cli_ruler
from .endless import endless
from .gpu import app as gpu
from .longbench import longbench
from .options import (
    BUDGET,
    CACHE,
    DEPTH,
    GEOMETRY,
    INDEXMEM,
    INDEXMEMS,
    JSON,
    LAYERS,
    MEMORY,
    MODEL,
    OUT,
    POLICY,
    PREFILL_REPEATS,
    RATIO,
    REPEATS,
    SINKS,
    SLOTS,
    TEXT,
    THREADS,
    TYPE,
    UBATCH,
    WEIGHTS,
    WINDOW,
    finish,
    memories_of,
    memory_of,
    numbers,
    policies_of,
    random_model,
    session,
    setup_of,
)
from .page import one_page
from .quality import quality
from .serve import app as serve
from .speed import drafts, speed
from .stock import stock

app = typer.Typer(no_args_is_help=True, help="Measure the bounded cache against the unbounded one on this machine.")
app.command()(cli_ruler.ruler)
app.command()(cli_ruler.needle)
app.command()(cli_ruler.ceiling)


@app.command()
def memory(
    model: Optional[Path] = MODEL,
    kv_budget: int = BUDGET,
    kv_policy: Optional[str] = POLICY,
    indexmem: Optional[Path] = INDEXMEM,
    latent: Optional[str] = MEMORY,
    memory_slots: Optional[int] = SLOTS,
    kv_budget_ratio: Optional[float] = RATIO,
    kv_sinks: int = SINKS,
    kv_window: int = WINDOW,
    tokens: int = typer.Option(65536, help="Tokens to feed."),
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    repeats: int = typer.Option(12, help="Alternating turns of the old and the fresh context at the end."),
    unbounded_tokens: int = typer.Option(
        8192, help="How far to take the unbounded cache for comparison; 0 leaves it out."
    ),
    text: Optional[Path] = TEXT,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """KV bytes, resident memory and speed while the tokens seen grow."""
    from ..speed import memory as bench

    with session(model, as_json) as (loaded, progress):
        setup = setup_of(
            kv_policy,
            kv_budget,
            cache_type,
            kv_sinks,
            kv_window,
            threads,
            ubatch,
            indexmem=indexmem,
            ratio=kv_budget_ratio,
            memory=latent,
            slots=memory_slots,
        )
        report = bench.run_memory(
            loaded,
            setup,
            tokens,
            text=text,
            unbounded_tokens=unbounded_tokens,
            rounds=repeats,
            progress=progress,
            out=out,
        )
    finish(report, bench.columns(report.rows), out, bench.plot, as_json)


app.command()(speed)
app.command()(stock)
app.command()(drafts)
app.command()(quality)
app.command()(longbench)
app.command(name="report")(one_page)
app.command()(endless)
app.add_typer(gpu, name="gpu")
app.add_typer(serve, name="serve")


@app.command()
def indexer(
    model: Optional[Path] = MODEL,
    geometry: Optional[str] = GEOMETRY,
    layers: int = LAYERS,
    weights: str = WEIGHTS,
    cache: Optional[Path] = CACHE,
    kinds: Optional[str] = typer.Option(None, help="Indexers; default: all.", show_default=False),
    types: str = typer.Option("f16,q8_0", help="Types of their matrices."),
    kv_budget: int = BUDGET,
    kv_sinks: int = SINKS,
    kv_window: int = WINDOW,
    depth: int = DEPTH,
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    repeats: int = REPEATS,
    prefill_repeats: int = PREFILL_REPEATS,
    text: Optional[Path] = TEXT,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """What indexers cost: decode and prefill with random ones of every kind, against the policy streaming."""
    from .. import synthetic
    from ..speed import indexer as bench

    with session(model, as_json, random_model(geometry, model, layers, weights, cache)) as (loaded, progress):
        report = bench.run_indexer(
            loaded,
            setup_of(None, kv_budget, cache_type, kv_sinks, kv_window, threads, ubatch),
            kinds.split(",") if kinds else list(synthetic.VARIANTS),
            types.split(","),
            name=f"indexer-{geometry}" if geometry else "indexer",
            depth=depth,
            rounds=repeats,
            prefill_rounds=prefill_repeats,
            text=text,
            progress=progress,
            out=out,
            **({"geometry": geometry, "all_layers": synthetic.GEOMETRIES[geometry].n_layer} if geometry else {}),
        )
    finish(report, bench.COLUMNS, out, bench.plot, as_json)


@app.command()
def latent(
    model: Optional[Path] = MODEL,
    memories: str = typer.Option("centroid", help="Latent memories: centroid, centroid:SLOTS, residual."),
    indexmem: Optional[list[Path]] = INDEXMEMS,
    kv_budget: int = BUDGET,
    policies: str = typer.Option("streaming", help="Policies, beside the indexers of sidecars."),
    kv_sinks: int = SINKS,
    kv_window: int = WINDOW,
    depth: int = DEPTH,
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    repeats: int = REPEATS,
    prefill_repeats: int = PREFILL_REPEATS,
    text: Optional[Path] = TEXT,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """What latent memories cost: decode and prefill with them, against the same policy and budget without."""
    from ..quality.arms import Sidecars
    from ..speed import latent as bench

    with session(model, as_json) as (loaded, progress):
        sidecars = Sidecars.open(indexmem or [])
        report = bench.run_latent(
            loaded,
            setup_of(None, kv_budget, cache_type, kv_sinks, kv_window, threads, ubatch),
            policies_of(policies, list(sidecars.indexers)),
            memories_of(memories),
            sidecars,
            depth=depth,
            rounds=repeats,
            prefill_rounds=prefill_repeats,
            text=text,
            progress=progress,
            out=out,
        )
    finish(report, bench.COLUMNS, out, bench.plot, as_json)


@app.command()
def checkpoint(
    model: Optional[Path] = MODEL,
    budgets: str = typer.Option("256,1024,4096,16384", help="Entries that each KV head keeps."),
    kv_policy: Optional[str] = POLICY,
    indexmem: Optional[Path] = INDEXMEM,
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    repeats: int = typer.Option(9, min=1, help="Copies; the table has medians."),
    text: Optional[Path] = TEXT,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """What a copy of the KV state costs, which is what coming back to an earlier point costs."""
    from ..speed import checkpoint as bench

    with session(model, as_json) as (loaded, progress):
        base = setup_of(kv_policy, 0, cache_type, DEFAULT_SINKS, LEAST_WINDOW, threads, ubatch, indexmem=indexmem)
        report = bench.run_checkpoint(loaded, base, numbers(budgets, int), repeats, text=text, progress=progress)
    finish(report, bench.COLUMNS, out, None, as_json)


@app.command()
def background(
    model: Optional[Path] = MODEL,
    budgets: str = typer.Option("256,512,1024", help="Entries that each KV head keeps."),
    policies: Optional[str] = typer.Option("streaming,keydiff", help="Policies; those of --indexmem come on top."),
    memory: str = typer.Option("centroid", help="Latent memory that each runs with as well; off: none."),
    indexmem: Optional[Path] = INDEXMEM,
    tokens: int = typer.Option(2000, min=1, help="Tokens of the first conversation, about."),
    facts: int = typer.Option(8, min=1, help="Facts told in it, one a turn."),
    samples: int = typer.Option(12, min=2, help="Conversations; all arms have the same."),
    seed: int = typer.Option(0, help="For what is told."),
    threads: int = THREADS,
    text: Optional[Path] = TEXT,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """Facts told in one conversation and asked in the next, which begins with the saved session as its background."""
    from indexmem_edge.runtime.choice import INDEXER_POLICY

    from ..quality import background as bench

    with session(model, as_json) as (loaded, progress):
        indexers = [INDEXER_POLICY] if indexmem is not None else []
        names = policies_of(policies, indexers)
        arms = bench.arms_of(names, numbers(budgets, int), memory_of(memory), indexmem)
        report = bench.run_background(
            loaded, arms, n_tokens=tokens, n_facts=facts, samples=samples, seed=seed, threads=threads, text=text, progress=progress
        )
    finish(report, bench.COLUMNS, out, None, as_json)


@app.command()
def soak(
    tokens: int = typer.Option(1_000_000, min=1, help="Tokens to feed."),
    layers: int = typer.Option(2, min=1, help="Layers of the random model, each of the demo model's shape."),
    memory: str = typer.Option("centroid", help="Latent memory: centroid, centroid:SLOTS, residual or off."),
    kv_budget: int = typer.Option(256, "-b", "--kv-budget", help="Entries that each KV head keeps."),
    kv_policy: Optional[str] = typer.Option(
        None, "--kv-policy", "--policy", help="Who is evicted.", show_default="streaming"
    ),
    kv_sinks: int = SINKS,
    kv_window: int = typer.Option(64, "--kv-window", help="Most recent tokens that always stay."),
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """A million tokens through one context of a small random model: does anything grow, get lost or stop being a number?"""
    from dataclasses import replace

    from .. import synthetic
    from ..speed import soak as bench

    def small() -> Path:
        return synthetic.cached_model(replace(synthetic.GEOMETRIES["demo"], n_layer=layers), "q8_0")

    with session(None, as_json, small) as (loaded, progress):
        base = setup_of(kv_policy, kv_budget, cache_type, kv_sinks, kv_window, threads, ubatch)
        report = bench.run_soak(loaded, base, memory_of(memory), tokens, progress=progress, out=out)
    finish(report, bench.COLUMNS, out, bench.plot, as_json, bench.shown(report.rows))
    if any(verdict.ok is False for verdict in report.verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
