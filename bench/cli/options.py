"""Options that commands of `indexmem bench` share, and what is made of them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer

from indexmem_edge.cli.console import console, progress
from indexmem_edge.cli.options import cache_option
from indexmem_edge.cli.terminal import printable
from indexmem_edge.errors import IndexMemError
from indexmem_edge.options import DEFAULT_BUDGET, DEFAULT_SINKS, DEFAULT_WINDOW

if TYPE_CHECKING:
    from rich.progress import Progress

MODEL = typer.Option(None, "-m", "--model", help="GGUF file; default: the demo model.", show_default=False)


def _cache(name: str, default: Any = None, *names: str) -> Any:
    """The option of a field of CacheOptions, as the default value of an argument."""
    option = cache_option(name, default, *names)
    option.param_decls, option.default = (option.default, *option.param_decls), default
    return option


BUDGET = typer.Option(DEFAULT_BUDGET, "-b", "--kv-budget", min=1, help="Entries that each KV head keeps.")
POLICY = _cache("policy", None, "--kv-policy", "--policy")
INDEXMEM = typer.Option(
    None, "--indexmem", metavar="FILE", help="Sidecar with an indexer trained for the model.", show_default=False
)
INDEXMEMS = typer.Option(
    None, "--indexmem", metavar="FILE", help="Sidecar of the model; can be given several times.", show_default=False
)
MEMORY = _cache("memory")
SLOTS = _cache("memory_slots")
RATIO = _cache("budget_ratio")
SINKS = _cache("sinks", DEFAULT_SINKS)
WINDOW = _cache("window", DEFAULT_WINDOW)
TYPE = typer.Option("f16", "--cache-type", help="Type of the entries: f32, f16, q8_0 or q4_0; K/V for two.")
THREADS = typer.Option(2, "-t", "--threads", help="CPU threads.")
GPU = typer.Option(None, "-ngl", "--gpu-layers", help="Layers on the GPU, in a build that has one.", show_default="all")
UBATCH = typer.Option(512, "-ub", "--ubatch-size", help="Tokens evaluated at once in prefill.")
GEOMETRY = typer.Option(
    None,
    help="Instead of a model: random weights of the shape of `qwen3-4b` (2 GiB, written once), `llama-1b` or `demo`.",
    show_default=False,
)
LAYERS = typer.Option(0, min=0, help="With --geometry: so many layers; 0: all.")
WEIGHTS = typer.Option("q4_0", help="With --geometry: type of its weights, q4_0, q8_0 or q4_k_m.")
CACHE = typer.Option(
    None, help="With --geometry: folder for it; default: one for temporary files.", show_default=False
)
DEPTH = typer.Option(0, min=0, help="Tokens seen before the measurements; 0: the budget and one ubatch.")
REPEATS = typer.Option(20, min=1, help="Alternating turns of decode, each of 32 tokens or a little more.")
PREFILL_REPEATS = typer.Option(8, min=1, help="Alternating turns of prefill, each of one ubatch.")
TEXT = typer.Option(
    None, "--text", help="Text file to feed; default: sentences made up on the spot.", show_default=False
)
DATA = typer.Option(
    None,
    exists=True,
    file_okay=False,
    help="Folder with <length>/<task>.jsonl.gz (RULER); default: samples made on the spot for this model.",
    show_default=False,
)
BOOK = typer.Option(
    None, "--text", help="Text file with prose, such as a book: the haystack of RULER's essays.", show_default=False
)


def folder(ctx: typer.Context, path: Path) -> Path:
    """A folder that results can be written to, made if need be; anything else is an error before anything is measured."""
    if ctx.resilient_parsing:  # a shell completes what is typed
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise typer.BadParameter(f"results cannot be written to {path}: {error.strerror or error}") from None


OUT = typer.Option(Path("bench/results"), "--out", callback=folder, help="Folder for the JSON file and the plot.")
JSON = typer.Option(False, "--json", help="Print the JSON file's path and nothing else.")


def policies_of(wanted: Optional[str], indexers: Sequence[str] = ()) -> list[str]:
    """The policies that were asked for, or all, and the indexers; an unknown one is an error before anything runs."""
    from indexmem_edge.errors import PolicyError
    from indexmem_edge.native import api
    from indexmem_edge.runtime.choice import INDEXER_POLICY

    known = [name for name in api.policies() if name != INDEXER_POLICY]
    names = wanted.split(",") if wanted else known
    if INDEXER_POLICY in names and not indexers:
        raise PolicyError(f"the policy {INDEXER_POLICY} needs a sidecar: name one with --indexmem FILE")
    unknown = [name for name in names if name not in known and name != INDEXER_POLICY]
    if unknown:
        raise PolicyError(f"unknown policy {', '.join(unknown)}: choose from {', '.join(known)}")
    return [*(name for name in names if name != INDEXER_POLICY), *indexers]


def memories_of(wanted: str) -> tuple[str, ...]:
    """The memories that were asked for; an unknown one is an error before anything runs."""
    from indexmem_edge.native import api

    from ..quality.arms import check_memories

    return check_memories([word for word in wanted.split(",") if word], api.memories())


def memory_of(wanted: str) -> str:
    """The one memory that was asked for."""
    from ..runner import BenchError

    found = memories_of(wanted)
    if len(found) > 1:
        raise BenchError(f"one memory can be tried at a time: choose from {', '.join(found)}")
    return found[0]


def numbers(text: str, kind: Any) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise typer.BadParameter(f"expected numbers with commas between them, found {text!r}")
    return found


def setup_of(
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
    from indexmem_edge.files.modelfile import check_sidecar_file
    from indexmem_edge.native import api
    from indexmem_edge.options import check_share
    from indexmem_edge.runtime.choice import choose_memory, choose_policy, sidecar_kinds

    from ..runner import Setup, kv_types

    kv_types(cache_type)  # an unknown one is an error before anything runs
    sidecar = check_sidecar_file(indexmem) if indexmem is not None else None
    kinds = sidecar_kinds(sidecar)
    memory, n_slots = choose_memory(memory, slots, kinds, api.memories())
    return Setup(
        policy=choose_policy(policy, memory, sidecar, kinds),
        budget=budget,
        cache_type=cache_type,
        sinks=sinks,
        window=window,
        threads=threads,
        ubatch=ubatch,
        seed=seed,
        sidecar=sidecar,
        budget_ratio=None if ratio is None else check_share("--kv-budget-ratio", ratio),
        memory=memory,
        memory_slots=n_slots,
    )


def random_model(
    geometry: Optional[str], model: Optional[Path], layers: int, weights: str, cache: Optional[Path]
) -> Optional[Callable[[], Path]]:
    """What writes the model of --geometry, or finds it; None without that option."""
    if geometry is None:
        return None
    from dataclasses import replace

    from .. import synthetic
    from ..runner import BenchError

    def make() -> Path:
        if geometry not in synthetic.GEOMETRIES or model is not None:
            raise BenchError(f"--geometry takes {', '.join(synthetic.GEOMETRIES)}, without -m; found {geometry!r}")
        shape = synthetic.GEOMETRIES[geometry]
        return synthetic.cached_model(replace(shape, n_layer=layers or shape.n_layer), weights, cache)

    return make


@contextmanager
def session(
    path: Optional[Path],
    as_json: bool,
    make: Optional[Callable[[], Path]] = None,
    gpu_layers: Optional[int] = None,
) -> Iterator[tuple[Any, Progress]]:
    """The loaded model, which `make` makes if given, and a progress bar; errors become one line."""
    bar = progress(not as_json, transient=False)
    try:
        from ..runner import Model

        loaded = Model(make() if make else path or demo_model(), gpu_layers)
        with bar:
            yield loaded, bar
        loaded.close()
    except (IndexMemError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None


def fail(error: Exception) -> None:
    """One line on standard error, then exit status 1; a traceback only with INDEXMEM_DEBUG=1."""
    if os.environ.get("INDEXMEM_DEBUG") == "1":
        raise error
    text = printable(" ".join(str(error).split()))
    console(error=True).print(f"error: {text}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(1) from None


def demo_model() -> Path:
    from indexmem_edge.models import demo

    return demo.demo_model()


def any_sidecar(loaded: Any, is_demo: bool, folder: str) -> Path:
    """The demo model's own sidecar; for other models one with random weights, which costs as much, in `folder`."""
    from indexmem_edge.models import demo

    from .. import synthetic

    if is_demo:
        return demo.demo_sidecar()
    return synthetic.random_sidecar(Path(folder) / "random.indexmem.gguf", synthetic.shape_of(loaded), "retention")


def finish(report: Any, columns: Sequence[str], out: Path, plot: Any, as_json: bool, rows: Any = None) -> None:
    """Saves and prints a report, all rows of it or some."""
    if not as_json:
        report.print(columns, rows)
    try:
        files = report.save(out, plot)
    except OSError as error:
        fail(error)
    if as_json:
        print(files[0])
        return
    print("wrote " + ", ".join(str(path) for path in files))
