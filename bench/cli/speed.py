"""The command `indexmem bench speed`: which systems it measures, of which model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Optional

import typer

from .options import (
    BUDGET,
    CACHE,
    GEOMETRY,
    GPU,
    INDEXMEM,
    JSON,
    LAYERS,
    MEMORY,
    MODEL,
    OUT,
    POLICY,
    RATIO,
    SINKS,
    SLOTS,
    TEXT,
    THREADS,
    TYPE,
    UBATCH,
    WEIGHTS,
    WINDOW,
    any_sidecar,
    demo_model,
    fail,
    finish,
    numbers,
    random_model,
    session,
    setup_of,
)


def speed(
    model: Optional[Path] = MODEL,
    geometry: Optional[str] = GEOMETRY,
    layers: int = LAYERS,
    weights: str = WEIGHTS,
    cache: Optional[Path] = CACHE,
    kv_budget: int = BUDGET,
    kv_policy: Optional[str] = POLICY,
    indexmem: Optional[Path] = INDEXMEM,
    latent: Optional[str] = MEMORY,
    memory_slots: Optional[int] = SLOTS,
    kv_budget_ratio: Optional[float] = RATIO,
    kv_sinks: int = SINKS,
    kv_window: int = WINDOW,
    parts: str = typer.Option(
        "depths,rows,latency,prefill",
        help="What to measure: decode and prefill at growing depths, tokens evaluated at once, latency of single "
        "tokens, time of a long prompt; and `evictions`, what one costs at growing budgets.",
    ),
    depths: str = typer.Option(
        "0,1024,2048,4096,8192", help="Tokens seen before each measurement; 32768,131072 take minutes a system."
    ),
    full_depth_max: int = typer.Option(8192, min=0, help="The unbounded systems, slow by then, stop at this depth."),
    prefill_tokens: int = typer.Option(32768, min=1, help="Length of the long prompt."),
    prefill_full_tokens: Optional[int] = typer.Option(
        None,
        min=1,
        help="How much of it the unbounded cache reads; it is compared with the others there.",
        show_default="all",
    ),
    latency_tokens: int = typer.Option(320, min=1, help="Tokens whose latency is taken, at least."),
    eviction_budgets: str = typer.Option("2048,16384,32768", help="Budgets of the part `evictions`."),
    eviction_rounds: int = typer.Option(15, min=1, help="Evictions of each policy at each of them."),
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    gpu_layers: Optional[int] = GPU,
    decode_tokens: int = typer.Option(64, help="Tokens decoded in one repeat."),
    repeats: int = typer.Option(3, help="Repeats at each depth."),
    text: Optional[Path] = TEXT,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """Speed at growing depths, of several tokens at once, of single tokens and long prompts, against the unbounded cache.

    The bounded systems are the policy streaming, and an indexer with the memory centroid (the sidecar of the demo model;
    for other models a random one): or the one that --kv-policy, --indexmem and --memory name.
    """
    from ..report import report_name
    from ..speed import run as bench

    def setup(policy: Optional[str], sidecar: Optional[Path], memory: Optional[str]) -> Any:
        return setup_of(
            policy,
            kv_budget,
            cache_type,
            kv_sinks,
            kv_window,
            threads,
            ubatch,
            indexmem=sidecar,
            ratio=kv_budget_ratio,
            memory=memory,
            slots=memory_slots if memory != "off" else None,
        )

    make = random_model(geometry, model, layers, weights, cache)
    with session(model, as_json, make, gpu_layers) as (loaded, progress), tempfile.TemporaryDirectory() as folder:
        if any(given is not None for given in (kv_policy, indexmem, latent)):
            systems = [setup(kv_policy, indexmem, latent)]
        else:
            sidecar = any_sidecar(loaded, model is None and geometry is None, folder)
            systems = [setup("streaming", None, "off"), setup(None, sidecar, "centroid")]
        report = bench.run_speed(
            loaded,
            systems,
            numbers(depths, int),
            parts=[part for part in parts.split(",") if part],
            full_depth_max=full_depth_max,
            prefill_tokens=prefill_tokens,
            prefill_full_tokens=prefill_full_tokens,
            latency_tokens=latency_tokens,
            eviction_budgets=numbers(eviction_budgets, int),
            eviction_rounds=eviction_rounds,
            eviction_policies=[kv_policy] if kv_policy else None,
            text=text,
            decode_tokens=decode_tokens,
            repeats=repeats,
            no_flash=cache_type in ("f16", "f32"),
            name=report_name("speed", geometry, cache_type),
            progress=progress,
            out=out,
        )
    if not as_json:
        bench.print_parts(report)
    finish(report, bench.COLUMNS, out, bench.plot, as_json)


def drafts(
    model: Optional[Path] = MODEL,
    kv_budget: int = BUDGET,
    kv_policy: Optional[str] = POLICY,
    indexmem: Optional[Path] = INDEXMEM,
    passages: int = typer.Option(6, min=1, help="Passages that are edited."),
    tokens: int = typer.Option(200, min=1, help="Tokens of an answer at most."),
    ngram: int = typer.Option(2, min=1, help="Tokens that are looked up, at most."),
    guesses: int = typer.Option(10, min=1, help="Tokens that are guessed at once."),
    threads: int = THREADS,
    repeats: int = typer.Option(3, min=1, help="Times that each passage is edited, with and without drafts in turns."),
    text: Optional[Path] = TEXT,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """Prompt lookup on a text-editing task: tokens per second with it and without, and whether the tokens are the same."""
    from indexmem_edge.cli.console import progress
    from indexmem_edge.errors import IndexMemError
    from indexmem_edge.runtime.creation import options_for

    from ..speed import drafts as bench

    path = model or demo_model()
    given = {"kv_budget": kv_budget, "kv_policy": kv_policy, "indexmem": str(indexmem) if indexmem is not None else None}
    try:
        options, _ = options_for(str(path), given)
        with progress(not as_json, transient=False) as bar:
            report = bench.run_drafts(
                path, options, passages=passages, tokens=tokens, rounds=repeats, ngram=ngram, drafts=guesses, threads=threads, text=text,
                progress=bar,
            )  # fmt: skip
    except IndexMemError as error:
        fail(error)
        return
    finish(report, bench.COLUMNS, out, None, as_json)
