"""`indexmem fit`: what of a model fits into the memory, how fast it is here, and what to type."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer
from typing_extensions import Annotated

from ..stats import format_bytes
from .amounts import parsed_bytes
from .console import Bar, console
from .options import one_line_errors
from .terminal import printable

if TYPE_CHECKING:
    from ..models.advice import Advice
    from ..models.fit import Fit, Row

AUTO = "auto"


def fit(
    model: Annotated[Path, typer.Argument(help="GGUF file; of a model in several files the first.", metavar="FILE", show_default=False)],
    memory: Annotated[
        str, typer.Option("--memory", help="How much there is for it: 8G, 8GiB, 512M, or `auto`: what is free now, less a reserve.")
    ] = AUTO,
    kv_checkpoints: Annotated[
        Optional[str],
        typer.Option(
            "--kv-checkpoints", metavar="MEMORY", help="For copies of the state, as in `indexmem chat`; 0: none.",
            show_default="256M, or, where the state is large, three of it; where that leaves no room, none",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="To measure for, in all, loading included; Ctrl-C ends it earlier.")
    ] = 60,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Only sizes: of the model nothing but the header is read.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say which budget, and which type of the cache, fits into the memory, how fast it is on this machine, and what to type.

    Sizes are those that the library itself computes, without loading the model, which may be larger than the memory. Speed is
    measured on the CPU with a random text, with a few of the caches that fit, and only for these it is said.

    Examples:

    indexmem fit model.gguf

    indexmem fit model.gguf --memory 8G --no-measure

    indexmem fit model.gguf --memory 6GiB --seconds 20 --json
    """
    with one_line_errors():
        from ..models import advice, fit as fitting

        asked = None if memory == AUTO else parsed_bytes("--memory", memory)
        copies = None if kv_checkpoints is None else parsed_bytes("--kv-checkpoints", kv_checkpoints)
        found = fitting.fit(model, fitting.memory_for(asked), copies)
        if not no_measure:
            found = _measured(found, seconds, wanted=not as_json)
        advised = advice.advise(found)
        if as_json:
            print(json.dumps(facts(found, advised), indent=2))
        else:
            show(found, advised)


def _measured(found: Fit, seconds: float, wanted: bool) -> Fit:
    """With what could be measured until the time was over, or somebody had enough."""
    from ..models import advice, fit as fitting

    rows = advice.worth_measuring(found)
    if not rows:
        return found
    best = found
    try:
        with Bar("measuring", wanted) as bar:
            for more in fitting.with_speeds(found, rows, seconds, lambda done, total: bar.update(round(done), round(total))):
                best = more
    except KeyboardInterrupt:
        print("note: stopped measuring", file=sys.stderr)
        return best
    if not any(row.speed for row in best.rows):
        print(f"note: nothing was measured: to load the model took all of the {seconds:g} s, --seconds gives it more", file=sys.stderr)
    return best


# for programs


def facts(found: Fit, advised: Advice) -> dict[str, Any]:
    """Plain values that json.dumps takes; bytes, tokens, tokens per second."""
    return {
        "model": {
            "path": found.path, "bytes": found.file_bytes, "about": found.about, "trained_length": found.trained,
            "bounded": found.refused is None, "why_not": found.refused,
        },
        "memory": {"usable": found.memory.usable, "free": found.memory.free, "reserve": found.memory.reserve},
        "sidecar": found.sidecar,
        "checkpoint_limit": found.copies,
        "problems": list(found.problems),
        "rows": [_row_facts(found, row) for row in found.rows],
        "advice": {
            "row": found.rows.index(advised.row) if advised.row is not None else None,
            "why": advised.why,
            "command": list(advised.command),
            "short_by": advised.short_by,
            "largest_file": advised.largest_file,
        },
    }  # fmt: skip


def _row_facts(found: Fit, row: Row) -> dict[str, Any]:
    sizes, speed = row.sizes, row.speed
    if sizes is None:
        return {"budget": row.budget or None, "cache_type": row.cache_type, "fits": False, "why_not": row.why_not}
    return {
        "budget": row.budget or None,
        "cache_type": row.cache_type,
        "fits": row.fits,
        "exact_tokens": row.exact,
        "bytes": {
            "program": found.program, "model": sizes.model, "sidecar": sizes.sidecar, "cache": sizes.total,
            "working_room": sizes.room, "checkpoints": sizes.copies(found.copies), "total": row.total,
        },
        "positions_grow": sizes.span_reason or None,
        "speed": None if speed is None else {
            "read": speed.read, "read_tokens": speed.read_tokens, "write": speed.write, "kept": speed.kept, "full": speed.full,
        },
    }  # fmt: skip


# for people


def show(found: Fit, advised: Advice) -> None:
    """Prints what was found: a few lines, the table, the advice."""
    out = console(width_in_pipes=120)
    for line in _head(found):
        out.print(printable(line), markup=False)
    out.print()
    out.print(_table(found, advised))
    out.print()
    for line in _notes(found):
        out.print(printable(line), markup=False)
    if advised.row is None:
        out.print(printable(f"Nothing to advise: {advised.why}."), markup=False)
        return
    out.print(printable(f"Advised: {_name(advised.row)}, {advised.why}."), markup=False)
    print(f"\n    {printable(shell_line(advised.command))}")


def _head(found: Fit) -> Iterator[str]:
    memory = found.memory
    trained = f", trained for {found.trained:,} tokens" if found.trained else ""
    yield f"model    {found.about}{trained}; {format_bytes(found.file_bytes)} on disk"
    free = "" if memory.free is None else f": {format_bytes(memory.free)} are free, {format_bytes(memory.reserve)} are left to others"
    yield f"memory   {format_bytes(memory.usable)}{free}"
    least = found.least
    if least is not None and least.sizes is not None:
        yield f"always   {format_bytes(least.sizes.model)} of weights, {format_bytes(found.program)} of program and vocabulary"
    if found.sidecar:
        yield f"sidecar  {found.sidecar}"
    yield from (f"note     {problem}" for problem in found.problems)
    if found.refused:
        yield f"budget   none possible: {found.refused}"


def _table(found: Fit, advised: Advice) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # a terminal of 80 columns has room for it
    measured = any(row.speed is not None for row in found.rows)
    columns = ["type", "budget", "exact", "cache", "work", "copies", "in all", "fits", *(("read/s", "write/s", "kept") if measured else ())]
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    before = ""
    for row in found.rows:
        cells = [row.cache_type if row.cache_type != before else "", *_cells(found, row, measured)]
        before = row.cache_type
        table.add_row(*map(Text, cells), style="bold" if row is advised.row else None)
    return table


def _cells(found: Fit, row: Row, measured: bool) -> Iterable[str]:
    sizes, budget = row.sizes, f"{row.budget:,}" if row.budget else "none"
    if sizes is None:
        return [budget, "", "", "", "", "", "refused", *([""] * 3 if measured else [])]
    parts = (sizes.total, sizes.room, sizes.copies(found.copies), row.total)
    cells = [budget, f"{row.exact:,}", *map(_short, parts), "yes" if row.fits else "no"]
    return [*cells, *_speeds(row)] if measured else cells


def _short(n: int) -> str:
    """Bytes in MiB or GiB, which the legend says once."""
    if n == 0:
        return "-"
    return f"{n / (1 << 20):.1f}M" if n < 1000 << 20 else f"{n / (1 << 30):.2f}G"


def _speeds(row: Row) -> Iterable[str]:
    speed = row.speed
    if speed is None:
        return ["", "", ""]
    rates = [f"{rate:,.1f}" if rate is not None else "-" for rate in (speed.read, speed.write)]
    return [*rates, "full" if speed.full else f"{speed.kept:,}"]


def _notes(found: Fit) -> Iterator[str]:
    yield "exact: tokens before the first is dropped, or, without a budget, before the end. copies: of the state, to go back to, at most. M, G: MiB, GiB."
    if found.copies == 0:
        yield "With as many copies as usual no budget would fit, so there is only the one that a cancelled answer is taken back to."
    reasons = {row.why_not: row for row in found.rows if row.sizes is None}
    yield from (f"{_name(row)}: {why}" for why, row in reasons.items())
    grow = {row.sizes.span_reason: row for row in found.rows if row.sizes is not None and row.sizes.span_reason}
    yield from (f"{_name(row)}: positions grow with the text, because {why}" for why, row in grow.items())
    measured = [row for row in found.rows if row.speed is not None]
    if measured:
        from ..doctor.machine import cpu
        from ..native.processors import default_threads

        one, many = default_threads()
        yield f"read/s, write/s: tokens per second on {cpu()[0]}, {many} threads to read and {one} to write, with so many entries kept; full: the budget was used up."


def _name(row: Row) -> str:
    return f"{row.cache_type}, " + (f"a budget of {row.budget:,}" if row.budget else "no budget")


def shell_line(words: Iterable[str], system: str = sys.platform) -> str:
    """Words as one types them."""
    return subprocess.list2cmdline(list(words)) if system == "win32" else shlex.join(words)
