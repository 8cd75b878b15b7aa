"""`indexmem bench`: memory, speed, quality and indexers of the bounded cache: a table, a JSON file and a plot each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from indexmem_edge._terminal import printable
from indexmem_edge.errors import IndexMemError

app = typer.Typer(no_args_is_help=True, help="Measure the bounded cache against the unbounded one on this machine.")

MODEL = typer.Option(None, "-m", "--model", help="GGUF file; default: the demo model.", show_default=False)
BUDGET = typer.Option(1024, "-b", "--kv-budget", help="Entries that each KV head keeps.")
POLICY = typer.Option(
    None,
    "--kv-policy",
    "--policy",
    help="Who is evicted.",
    show_default="indexer with a sidecar, else streaming",
)
INDEXMEM = typer.Option(
    None, "--indexmem", metavar="FILE", help="Sidecar with an indexer trained for the model.", show_default=False
)
MEMORY = typer.Option(
    None,
    "--memory",
    help="Latent memory: centroid, residual or off.",
    show_default="that of the sidecar, without one off",
)
SLOTS = typer.Option(None, "--memory-slots", min=1, help="Slots of the memory centroid.", show_default=False)
RATIO = typer.Option(
    None, "--kv-budget-ratio", help="Keep no more than this share of the tokens seen, either.", show_default=False
)
SINKS = typer.Option(4, "--kv-sinks", help="First tokens that always stay.")
WINDOW = typer.Option(128, "--kv-window", help="Most recent tokens that always stay.")
TYPE = typer.Option("f16", "--cache-type", help="Type of the entries: f32, f16, q8_0 or q4_0.")
THREADS = typer.Option(2, "-t", "--threads", help="CPU threads.")
GPU = typer.Option(
    None, "-ngl", "--gpu-layers", help="Layers on the GPU, in a build that has one.", show_default="all"
)
UBATCH = typer.Option(512, "-ub", "--ubatch-size", help="Tokens evaluated at once in prefill.")
TEXT = typer.Option(
    None, "--text", help="Text file to feed; default: sentences made up on the spot.", show_default=False
)
OUT = typer.Option(Path("bench/results"), "--out", help="Folder for the JSON file and the plot.")
JSON = typer.Option(False, "--json", help="Print the JSON file's path and nothing else.")


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
    from . import memory as bench

    with _session(model, as_json) as (loaded, progress):
        setup = _setup(
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
    _finish(report, bench.COLUMNS, out, bench.plot, as_json)


@app.command()
def speed(
    model: Optional[Path] = MODEL,
    kv_budget: int = BUDGET,
    kv_policy: Optional[str] = POLICY,
    indexmem: Optional[Path] = INDEXMEM,
    latent: Optional[str] = MEMORY,
    memory_slots: Optional[int] = SLOTS,
    kv_budget_ratio: Optional[float] = RATIO,
    kv_sinks: int = SINKS,
    kv_window: int = WINDOW,
    depths: str = typer.Option("0,1024,2048,4096,8192", help="Tokens seen before each measurement."),
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
    """Decode and prefill at growing depths, against the unbounded cache with and without flash attention."""
    from . import speed as bench

    with _session(model, as_json, gpu_layers=gpu_layers) as (loaded, progress):
        setup = _setup(
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
        report = bench.run_speed(
            loaded,
            setup,
            _numbers(depths, int),
            text=text,
            decode_tokens=decode_tokens,
            repeats=repeats,
            no_flash=cache_type in ("f16", "f32"),
            progress=progress,
            out=out,
        )
    _finish(report, bench.COLUMNS, out, bench.plot, as_json)


@app.command()
def quality(
    data: Path = typer.Option(..., exists=True, file_okay=False, help="Folder with <length>/<task>.jsonl.gz (RULER)."),
    model: Optional[Path] = MODEL,
    lengths: str = typer.Option("2048,4096", help="Lengths, folders of DATA."),
    tasks: Optional[str] = typer.Option(None, help="Tasks; default: all that are there.", show_default=False),
    policies: Optional[str] = typer.Option(
        None, help="Policies; default: all. The full cache always runs, the indexer with a sidecar.", show_default=False
    ),
    indexmem: Optional[Path] = INDEXMEM,
    kv_budget_ratio: Optional[float] = RATIO,
    budgets: str = typer.Option("0.25,0.5,0.1", help="Shares of the context that the cache keeps."),
    samples: int = typer.Option(25, help="Samples of each task."),
    all_tasks: bool = typer.Option(False, help="Run policies on tasks that the full cache cannot do, too."),
    nll_text: Optional[Path] = typer.Option(None, exists=True, help="Book whose likelihood is measured as well."),
    nll_tokens: int = typer.Option(4096, help="Tokens of it to score, 512 after each window."),
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    seed: int = typer.Option(0, help="For the policy `random` and the places in the book."),
    full_only: bool = typer.Option(False, help="Run the full cache and stop: which tasks can it do?"),
    markdown: Optional[Path] = typer.Option(None, help="Write the tables of the results page here."),
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """RULER scores and likelihoods with physically evicted contexts. Can be stopped and started again: finished runs are kept."""
    from . import quality as bench
    from . import ruler, summary
    from .runner import BenchError

    with _session(model, as_json) as (loaded, progress):
        wanted = tuple(_numbers(lengths, int))
        names = (
            tuple(tasks.split(",")) if tasks else tuple(dict.fromkeys(t for n in wanted for t in ruler.tasks(data, n)))
        )
        missing = [f"{n}/{t}" for n in wanted for t in names if t not in ruler.tasks(data, n)]
        if missing or not names:
            raise BenchError(f"not in {data}: {', '.join(missing) or 'any task'}")
        base = _setup(None, 0, cache_type, 4, 128, threads, ubatch, seed, indexmem=indexmem, ratio=kv_budget_ratio)
        plan = bench.Plan(
            data,
            wanted,
            names,
            tuple(p for p in _policies(policies, full_only, indexmem is not None) if p != bench.FULL),
            tuple(_numbers(budgets, float)),
            samples,
            base,
            all_tasks,
            nll_text,
            nll_tokens // bench.BOOK_SCORED if nll_text else 0,
        )
        report = bench.run_quality(loaded, plan, out, seed, full_only, progress)
    _finish(
        report,
        (
            "task",
            "length",
            "policy",
            "ratio",
            "budget",
            "kv_bytes",
            "meta_bytes",
            "n",
            "score",
            "score_delta",
            "nll",
            "nll_delta",
        ),
        out,
        summary.plot,
        as_json,
    )
    if markdown:
        from .report import quality_markdown

        markdown.write_text(quality_markdown(report.to_dict()))


@app.command()
def indexer(
    model: Optional[Path] = MODEL,
    geometry: Optional[str] = typer.Option(
        None,
        help="Instead of a model: random weights of the shape of `qwen3-4b` (2 GiB, written once).",
        show_default=False,
    ),
    layers: int = typer.Option(0, min=0, help="With --geometry: so many layers; 0: all."),
    weights: str = typer.Option("q4_0", help="With --geometry: type of its weights, q4_0 or q8_0."),
    cache: Optional[Path] = typer.Option(
        None, help="With --geometry: folder for it; default: one for temporary files.", show_default=False
    ),
    kinds: Optional[str] = typer.Option(None, help="Indexers; default: all.", show_default=False),
    types: str = typer.Option("f16,q8_0", help="Types of their matrices."),
    kv_budget: int = BUDGET,
    kv_sinks: int = SINKS,
    kv_window: int = WINDOW,
    depth: int = typer.Option(0, min=0, help="Tokens seen before the measurements; 0: the budget and one ubatch."),
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    repeats: int = typer.Option(20, min=1, help="Alternating turns of decode, each of 32 tokens or a little more."),
    prefill_repeats: int = typer.Option(8, min=1, help="Alternating turns of prefill, each of one ubatch."),
    text: Optional[Path] = TEXT,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """What indexers cost: decode and prefill with random ones of every kind, against the policy streaming."""
    from dataclasses import replace

    from . import indexer as bench
    from . import synthetic
    from .runner import BenchError

    def synthetic_model() -> Path:
        if geometry not in synthetic.GEOMETRIES or model is not None:
            raise BenchError(f"--geometry takes {', '.join(synthetic.GEOMETRIES)}, without -m; found {geometry!r}")
        shape = synthetic.GEOMETRIES[geometry]
        return synthetic.cached_model(replace(shape, n_layer=layers or shape.n_layer), weights, cache)

    with _session(model, as_json, synthetic_model if geometry else None) as (loaded, progress):
        report = bench.run_indexer(
            loaded,
            _setup(None, kv_budget, cache_type, kv_sinks, kv_window, threads, ubatch),
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
    _finish(report, bench.COLUMNS, out, bench.plot, as_json)


def _policies(wanted: Optional[str], none: bool, sidecar: bool) -> list[str]:
    """The policies that were asked for, or all; an unknown one is an error before anything runs."""
    from indexmem_edge import _capi
    from indexmem_edge.errors import PolicyError
    from indexmem_edge.options import INDEXER_POLICY

    if none:
        return []
    known = [name for name in _capi.policies() if name != INDEXER_POLICY]
    names = wanted.split(",") if wanted else list(known)
    if sidecar and INDEXER_POLICY not in names:
        names.append(INDEXER_POLICY)
    if INDEXER_POLICY in names and not sidecar:
        raise PolicyError(f"the policy {INDEXER_POLICY} needs a sidecar: name one with --indexmem FILE")
    unknown = [name for name in names if name not in known and name != INDEXER_POLICY]
    if unknown:
        raise PolicyError(f"unknown policy {', '.join(unknown)}: choose from {', '.join(known)}")
    return names


def _numbers(text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas between them, found {text!r}") from None


def _setup(
    policy: Optional[str],
    budget: int,
    cache_type: str,
    sinks: int,
    window: int,
    threads: int,
    ubatch: int,
    seed: int = 0,
    indexmem: Optional[Path] = None,
    ratio: Optional[float] = None,
    memory: Optional[str] = None,
    slots: Optional[int] = None,
) -> Any:
    from indexmem_edge import _capi
    from indexmem_edge._modelfile import check_sidecar_file
    from indexmem_edge._parts import choose_memory, choose_policy, sidecar_kinds
    from indexmem_edge.options import check_share

    from .runner import CACHE_TYPES, BenchError, Setup

    if cache_type not in CACHE_TYPES:
        raise BenchError(f"unknown cache type {cache_type!r}: choose one of {', '.join(CACHE_TYPES)}")
    sidecar = check_sidecar_file(indexmem) if indexmem is not None else None
    kinds = sidecar_kinds(sidecar)
    memory, n_slots = choose_memory(memory, slots, kinds, _capi.memories())
    return Setup(
        policy=choose_policy(policy, memory, sidecar, kinds),
        budget=budget,
        cache_type=cache_type,
        sinks=sinks,
        window=window,
        threads=threads,
        ubatch=ubatch,
        seed=seed,
        sidecar=indexmem,
        ratio=0.0 if ratio is None else check_share("--kv-budget-ratio", ratio),
        memory=memory,
        memory_slots=n_slots,
    )


@contextmanager
def _session(
    path: Optional[Path],
    as_json: bool,
    make: Optional[Callable[[], Path]] = None,
    gpu_layers: Optional[int] = None,
) -> Iterator[tuple[Any, Progress]]:
    """The loaded model, which `make` makes if given, and a progress bar; errors become one line."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=as_json,
    )
    try:
        from .runner import Model

        loaded = Model(make() if make else path or _demo_model(), gpu_layers)
        with bar:
            yield loaded, bar
        loaded.close()
    except IndexMemError as error:
        text = printable(" ".join(str(error).split()))
        Console(stderr=True, soft_wrap=True).print(f"error: {text}", style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None


def _demo_model() -> Path:
    from indexmem_edge import demo

    return demo.demo_model()


def _finish(report: Any, columns: tuple[str, ...], out: Path, plot: Any, as_json: bool) -> None:
    files = report.save(out, plot)
    if as_json:
        print(files[0])
        return
    report.print(columns)
    print("wrote " + ", ".join(str(path) for path in files))


if __name__ == "__main__":
    app()
