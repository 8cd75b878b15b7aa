"""`indexmem bench gpu`: its commands, and what they come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import typer

from indexmem_edge.errors import IndexMemError

from .options import BUDGET, CACHE, MODEL, demo_model, fail, folder, numbers

OUT = typer.Option(Path("bench/results"), "--out", callback=folder, help="Folder for the JSON files.")
THREADS = typer.Option(8, "-t", "--threads", help="CPU threads.")

app = typer.Typer(
    no_args_is_help=True,
    help="The bounded cache on a GPU: does it compute what the CPU computes, wherever model and cache lie, and how fast?",
)


@app.command()
def check(model: Optional[Path] = MODEL, out: Path = OUT, threads: int = THREADS) -> None:
    """The same logits as on the CPU: all layers on the GPU, half of them, the cache in host memory."""
    with _gpu() as bench:
        _end(bench.check(model or demo_model(), out, threads), bench.CHECK_COLUMNS, out)


@app.command()
def speed(
    model: Optional[Path] = MODEL,
    geometry: Optional[str] = typer.Option(None, help="Random weights of this shape: qwen3-4b, qwen3-8b.", show_default=False),
    kv_budget: int = BUDGET,
    systems: str = typer.Option("streaming/off,snapkv/off,knorm/centroid", help="Policy/memory of each run."),
    depths: str = typer.Option("1024,4096,16384", help="Tokens seen before each measurement."),
    cache: Optional[Path] = CACHE,
    out: Path = OUT,
    threads: int = THREADS,
) -> None:
    """Decode and prefill at growing depths, bounded and unbounded."""
    with _gpu() as bench:
        path = bench.model_of(geometry, model or (None if geometry else demo_model()), cache)
        name = geometry or ("demo" if model is None else path.stem)
        _end(bench.speed(path, name, kv_budget, systems.split(","), numbers(depths, int), out, threads), bench.SPEED_COLUMNS, out)


@contextmanager
def _gpu() -> Iterator[Any]:
    """The benchmark, where there is a GPU that it can run on; errors become one line."""
    try:
        from ..speed import gpu

        gpu.require_gpu()
        yield gpu
    except IndexMemError as error:
        fail(error)


def _end(report: Any, columns: tuple[str, ...], out: Path) -> None:
    from ..runner import BenchError

    print("wrote", report.save(out)[0])
    report.print(columns)
    if missed := sum(verdict.ok is False for verdict in report.verdicts):
        raise BenchError(f"{report.name}: {missed} checks failed, see above")
