"""`indexmem bench ruler`, `needle` and `ceiling`: samples of RULER, where needles are found, and what selection can reach."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import typer

from .options import (
    BOOK,
    INDEXMEMS,
    JSON,
    MODEL,
    OUT,
    RATIO,
    THREADS,
    TYPE,
    UBATCH,
    finish,
    memories_of,
    numbers,
    policies_of,
    session,
    setup_of,
)

SEED = typer.Option(0, help="Other seeds give other samples.")


def ruler(
    model: Optional[Path] = MODEL,
    lengths: str = typer.Option("2048,4096", help="Tokens of a sample, those to generate included."),
    tasks: Optional[str] = typer.Option(
        None, help="Tasks; default: all that need no file which is not named.", show_default=False
    ),
    samples: int = typer.Option(25, help="Samples of each task at each length."),
    seed: int = SEED,
    text: Optional[Path] = BOOK,
    squad: Optional[Path] = typer.Option(
        None, exists=True, dir_okay=False, help="File of SQuAD: the questions of qa_1.", show_default=False
    ),
    hotpotqa: Optional[Path] = typer.Option(
        None, exists=True, dir_okay=False, help="File of HotpotQA: the questions of qa_2.", show_default=False
    ),
    out: Optional[Path] = typer.Option(
        None, "--out", help="Folder for <length>/<task>.jsonl.gz; default: one for temporary files.", show_default=False
    ),
    check: Optional[Path] = typer.Option(
        None,
        "--check",
        exists=True,
        file_okay=False,
        help="Folder with samples of the official generators: are these built like them?",
        show_default=False,
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the folder and nothing else."),
) -> None:
    """Make samples of RULER's tasks for the tokenizer of a model; those of qa_1 and qa_2 take files of questions."""
    from ..report import print_table, show
    from ..ruler import compare

    checks: list[compare.Check] = []
    with session(model, as_json) as (loaded, progress):
        wanted = numbers(lengths, int)
        files = {form: path for form, path in (("squad", squad), ("hotpotqa", hotpotqa)) if path}
        order = _order(wanted, tasks, samples, seed, text, files)
        folder = _generate(loaded, order, out, progress)[0]
        if check:
            checks = compare.compare(
                folder, check, order.lengths, order.tasks, lambda text: len(loaded.tokens(text)), samples
            )
    if as_json:
        print(folder)
    else:
        names, cells = _sizes(folder, order.lengths, order.tasks)
        print_table(f"samples in {folder}", names, cells)
        if checks:
            title = f"against {check}: {sum(not c.problems for c in checks)} of {len(checks)} built alike"
            content = [[show(name, c.to_row()[name]) for name in compare.COLUMNS] for c in checks]
            print_table(title, compare.COLUMNS, content)
    if failed := [c for c in checks if c.problems]:
        for c in failed if as_json else ():
            print(f"{c.task} {c.length}: {'; '.join(c.problems)}", file=sys.stderr)
        raise typer.Exit(1)


def needle(
    model: Optional[Path] = MODEL,
    lengths: str = typer.Option("1024,2048,4096", help="Tokens of a sample, those to generate included."),
    depths: str = typer.Option("0,25,50,75,100", help="Where the needle lies, in per cent of the text."),
    policies: Optional[str] = typer.Option(
        None, help="Policies; default: all. The full cache always runs, so do indexers of sidecars.", show_default=False
    ),
    memories: str = typer.Option("off", help="Latent memories: off, centroid, centroid:SLOTS, residual."),
    indexmem: Optional[list[Path]] = INDEXMEMS,
    kv_budget_ratio: Optional[float] = RATIO,
    budgets: str = typer.Option("0.25", help="Shares of the context that the cache keeps."),
    samples: int = typer.Option(5, help="Needles at each length and depth."),
    text: Optional[Path] = typer.Option(
        None,
        "--text",
        help="Text file with prose, such as a book, as the haystack; default: sentences made up on the spot.",
        show_default=False,
    ),
    cache_type: str = TYPE,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    seed: int = SEED,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """Is a needle in a haystack found? A map of length and depth per policy. Can be stopped and started again."""
    from ..quality import needle as bench
    from ..quality.arms import Sidecars
    from ..runner import UNBOUNDED

    with session(model, as_json) as (loaded, progress):
        sidecars = Sidecars.open(indexmem or [])
        grid = bench.Grid(
            tuple(numbers(lengths, int)),
            tuple(numbers(depths, int)),
            tuple(name for name in policies_of(policies, list(sidecars.indexers)) if name != UNBOUNDED),
            tuple(numbers(budgets, float)),
            samples,
            setup_of(None, 0, cache_type, 4, 128, threads, ubatch, seed, ratio=kv_budget_ratio),
            memories_of(memories),
            sidecars,
        )
        report = bench.run_needle(loaded, grid, out, text, seed, progress=progress)
    finish(report, bench.COLUMNS, out, bench.plot, as_json)


def tasks_in(data: Path, lengths: Sequence[int], tasks: Optional[str]) -> tuple[str, ...]:
    """The tasks that were asked for, or all; BenchError unless each is there at every length."""
    from .. import ruler
    from ..runner import BenchError

    found = dict.fromkeys(task for length in lengths for task in ruler.tasks(data, length))
    names = tuple(tasks.split(",")) if tasks else tuple(found)
    missing = [f"{n}/{task}" for n in lengths for task in names if task not in ruler.tasks(data, n)]
    if missing or not names:
        raise BenchError(f"not in {data}: {', '.join(missing) or 'any task'}")
    return names


def samples_for(
    model: Any,
    lengths: Sequence[int],
    tasks: Optional[str],
    samples: int,
    seed: int,
    text: Optional[Path],
    progress: Any,
) -> tuple[Path, str]:
    """A folder with samples for this model, made if they are not there yet, and what they are known by."""
    return _generate(model, _order(lengths, tasks, samples, seed, text), None, progress)


def _order(
    lengths: Sequence[int],
    tasks: Optional[str],
    samples: int,
    seed: int,
    text: Optional[Path],
    questions: Optional[dict[str, Path]] = None,
) -> Any:
    from ..ruler.generate import Order

    return Order.of(lengths, tasks.split(",") if tasks else None, samples, seed, text, questions)


def _generate(model: Any, order: Any, out: Optional[Path], progress: Any) -> tuple[Path, str]:
    from ..ruler.generate import generate

    return generate(model, order, out, progress=progress)


def _sizes(folder: Path, lengths: Sequence[int], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table of what was made."""
    from ..ruler.samples import path_of, rows

    lines = []
    for length in lengths:
        for task in tasks:
            found = [row["length"] for row in rows(folder, length, task)]
            filled = sum(found) / len(found) / length
            size = f"{path_of(folder, length, task).stat().st_size / 1024:.0f} KiB"
            lines.append([task, str(length), str(len(found)), str(min(found)), str(max(found)), f"{filled:.1%}", size])
    return ["task", "length", "n", "shortest", "longest", "filled", "file"], lines


def ceiling(
    data: Path = typer.Option(..., exists=True, file_okay=False, help="Folder with <length>/<task>.jsonl.gz (RULER)."),
    model: Optional[Path] = MODEL,
    indexmem: Optional[list[Path]] = INDEXMEMS,
    lengths: str = typer.Option("2048", help="Lengths, folders of DATA."),
    tasks: Optional[str] = typer.Option(None, help="Tasks; default: all that are there.", show_default=False),
    policies: str = typer.Option("keydiff", help="Policies without training to show beside; none: ''."),
    budgets: str = typer.Option("0.5,0.25,0.1", help="Shares of the context's entries that are kept."),
    groups: int = typer.Option(0, min=0, help="Exchange the indexer for the oracle in each of so many groups of layers."),
    samples: int = typer.Option(5, min=1, help="Samples of each task."),
    slots: str = typer.Option("", help="Also the best memories of means, with so many slots in the place of entries."),
    book: Optional[Path] = typer.Option(
        None, "--text", exists=True, dir_okay=False, help="Book: how likely is what follows a passage?", show_default=False
    ),
    pages: int = typer.Option(8, min=1, help="Passages of the book, of each length."),
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """How far is an indexer from an oracle that knows the question, in which layers, and what could a memory give? Needs PyTorch."""
    from indexmem_edge.train.torch_extra import require_torch

    from ..runner import BenchError

    with session(model, as_json) as (loaded, progress):
        require_torch()
        from ..quality import ceiling as bench

        wanted = numbers(lengths, int)
        names = tasks_in(data, wanted, tasks)
        found = [name for name in policies.split(",") if name]
        if unknown := [name for name in found if name not in bench.POLICIES]:
            raise BenchError(f"unknown policy {unknown[0]!r}: choose from {', '.join(bench.POLICIES)}")
        report = bench.run_ceiling(
            loaded, data, wanted, names, samples, indexmem or [], numbers(budgets, float),
            groups=groups, policies=found, slots=numbers(slots, int) if slots else [], book=book, pages=pages if book else 0,
            progress=progress, out=out,
        )  # fmt: skip
    finish(report, bench.COLUMNS, out, bench.plot, as_json)
