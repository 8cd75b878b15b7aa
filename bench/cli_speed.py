"""The command `indexmem bench speed`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Optional

import typer

from .cli_options import (
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
    finish,
    numbers,
    session,
    setup_of,
    synthetic_model,
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
        "depths,rows,latency,prefill", help="What is measured: a curve over depths, rows at once, token latency, a whole text."
    ),
    depths: str = typer.Option("0,1024,2048,4096,8192", help="Tokens seen before each measurement of the curve."),
    full_depth: int = typer.Option(8192, help="How far the unbounded caches go along."),
    prefill_tokens: int = typer.Option(32768, min=1, help="Length of the whole text."),
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
    """Decode and prefill at growing depths, several rows at once, token latency: bounded caches against the unbounded one.

    Without --kv-policy, --indexmem and --memory two bounded caches are measured: policy streaming, and an indexer with the
    memory centroid (that of the demo model, or a random one for another model: it costs the same).
    """
    from . import speed as bench
    from . import speed_parts
    from .runner import BenchError

    wanted = [part for part in parts.split(",") if part]
    if unknown := [part for part in wanted if part not in bench.PARTS]:
        raise typer.BadParameter(f"unknown part {unknown[0]!r}: choose from {', '.join(bench.PARTS)}")
    how: Any = (kv_budget, cache_type, kv_sinks, kv_window, threads, ubatch)
    with session(model, as_json, synthetic_model(model, geometry, layers, weights, cache), gpu_layers) as (loaded, progress):
        if not kv_budget:
            raise BenchError("a bounded cache needs a --kv-budget")
        with tempfile.TemporaryDirectory() as folder:
            more: Any = {"ratio": kv_budget_ratio, "slots": memory_slots}
            if kv_policy is None and indexmem is None and latent is None:
                sidecar = _sidecar(loaded, Path(folder), demo=model is None and geometry is None)
                bounded = [setup_of(None, *how, ratio=kv_budget_ratio), setup_of(None, *how, indexmem=sidecar, memory="centroid", **more)]
            else:
                bounded = [setup_of(kv_policy, *how, indexmem=indexmem, memory=latent, **more)]
            report = bench.run_speed(
                loaded,
                bounded,
                numbers(depths, int),
                parts=wanted,
                full_depth=full_depth,
                prefill_tokens=prefill_tokens,
                text=text,
                decode_tokens=decode_tokens,
                repeats=repeats,
                no_flash=cache_type in ("f16", "f32"),
                name="speed" + (f"-{geometry}" if geometry else "") + ("" if cache_type == "f16" else f"-{cache_type}".replace("/", "-")),
                progress=progress,
                out=out,
            )
    finish(report, bench.COLUMNS, out, bench.plot, as_json, more=speed_parts.COLUMNS)


def _sidecar(model: Any, folder: Path, demo: bool) -> Path:
    """The indexer to measure with: time depends on its size, not on what it has learned."""
    from indexmem_edge import demo as demo_files

    from . import synthetic

    if demo:
        return demo_files.demo_sidecar()
    return synthetic.random_sidecar(folder / "random.indexmem.gguf", synthetic.shape_of(model), "retention")
