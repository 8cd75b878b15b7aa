"""The command `indexmem bench stock`: against a stock llama-cpp-python of the same release."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Optional

import typer

from .options import (
    BUDGET,
    CACHE,
    GEOMETRY,
    INDEXMEM,
    JSON,
    LAYERS,
    MODEL,
    OUT,
    SINKS,
    TEXT,
    THREADS,
    TYPE,
    UBATCH,
    WEIGHTS,
    WINDOW,
    any_sidecar,
    finish,
    numbers,
    random_model,
    session,
    setup_of,
)


def stock(
    model: Optional[Path] = MODEL,
    geometry: Optional[str] = GEOMETRY,
    layers: int = LAYERS,
    weights: str = WEIGHTS,
    cache: Optional[Path] = CACHE,
    kv_budget: int = BUDGET,
    indexmem: Optional[Path] = INDEXMEM,
    kv_sinks: int = SINKS,
    kv_window: int = WINDOW,
    folder: Optional[Path] = typer.Option(
        None,
        "--stock",
        exists=True,
        file_okay=False,
        help="An environment with llama-cpp-python, or a folder with its libllama.",
        show_default="one that pip builds once, of the release that this package is built on",
    ),
    depths: str = typer.Option("0,2048,8192,32768", help="Tokens seen before each measurement."),
    unbounded_max: int = typer.Option(
        8192,
        min=0,
        help="Tokens that caches which keep everything read; past them they are filled with copies, which takes no hours.",
    ),
    bounded_max: int = typer.Option(
        0,
        min=0,
        help="Tokens that bounded caches read, at least two budgets; past them they are measured as they are then.",
        show_default="all",
    ),
    own: bool = typer.Option(False, "--own", help="This library without a budget, too."),
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    repeats: int = typer.Option(6, min=1, help="Turns of each system at each depth."),
    text: Optional[Path] = TEXT,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """Decode, whole prompts, a second question and peak memory, against stock llama.cpp of the same release, in one run.

    Ours are the policy streaming, and an indexer with the memory centroid: that of --indexmem, for the demo model its own, for
    other models one with random weights, which costs as much.
    """
    from ..report import report_name
    from ..stock import run as bench
    from ..stock.environment import stock_library

    def setup(policy: Optional[str], sidecar: Optional[Path], memory: str) -> Any:
        return setup_of(policy, kv_budget, cache_type, kv_sinks, kv_window, threads, ubatch, indexmem=sidecar, memory=memory)

    make = random_model(geometry, model, layers, weights, cache)
    with tempfile.TemporaryDirectory() as temp, session(model, as_json, make) as (loaded, progress):
        sidecar = indexmem or any_sidecar(loaded, model is None and geometry is None, temp)
        report = bench.run_stock(
            loaded.path,
            [setup("streaming", None, "off"), setup(None, sidecar, "centroid")],
            numbers(depths, int),
            stock_library(folder, progress.console.print),
            unbounded_max=unbounded_max,
            bounded_max=bounded_max,
            rounds=repeats,
            text=text,
            own=own,
            name=report_name("stock", geometry, cache_type),
            progress=progress,
            out=out,
        )
    finish(report, bench.COLUMNS, out, bench.plot, as_json)
