"""`indexmem bench serve`: its commands, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import typer

from indexmem_edge.cli.console import console
from indexmem_edge.cli.serve import COPIES, server_program
from indexmem_edge.errors import IndexMemError

from .. import machine
from .options import BUDGET, JSON, MODEL, OUT, THREADS, demo_model, fail, finish, numbers

if TYPE_CHECKING:
    from ..report import Row
    from ..serve.client import Kind

STOCK = typer.Option(
    None, "--stock", exists=True, dir_okay=False, help="llama-server as llama.cpp makes it, to compare with.", show_default=False
)
CONTEXT = typer.Option(8192, "--stock-context", help="Tokens that each conversation of the stock server may have.")

app = typer.Typer(no_args_is_help=True, help="llama.cpp's server with the bounded cache, beside a stock one.")


@app.command()
def actions(
    model: Optional[Path] = MODEL,
    stock: Optional[Path] = STOCK,
    stock_context: int = CONTEXT,
    kv_budget: int = BUDGET,
    samples: int = typer.Option(3, min=1, help="Documents; the table has medians."),
    threads: int = THREADS,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """Another answer, an edit, a second question, another conversation: tokens evaluated and seconds to the first token."""
    from ..serve import actions as bench

    with _measuring(as_json) as tell:
        path = model or demo_model()
        kinds = [_with(kind, "-c", kind.context) if kind.context else kind for kind in _kinds(path, stock, stock_context, kv_budget)]
        without = _with(_kinds(path, None, 0, kv_budget, copies=0)[0], "--cache-ram", 0)
        kinds.append(replace(without, name=f"{without.name}, no checkpoints"))
        report = bench.run_actions(kinds, path, threads, samples, _meta(path, threads, kinds), tell)
    finish(report, bench.COLUMNS, out, None, as_json)


@app.command()
def rates(
    model: Optional[Path] = MODEL,
    stock: Optional[Path] = STOCK,
    stock_context: int = CONTEXT,
    kv_budget: int = BUDGET,
    conversations: str = typer.Option("1,4,8", help="Conversations at once, each with a slot."),
    turns: int = typer.Option(6, min=1, help="Turns of each conversation."),
    rounds: int = typer.Option(2, min=1, help="Times that the servers take turns."),
    threads: int = THREADS,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """Several conversations at once: answers per second, seconds to the first token, resident memory."""
    from ..serve import rates as bench

    with _measuring(as_json) as tell:
        path, several = model or demo_model(), numbers(conversations, int)
        kinds = _kinds(path, stock, stock_context, kv_budget)
        report = bench.run_rates(kinds, path, threads, several, turns, rounds, _meta(path, threads, kinds), tell)
    finish(report, bench.COLUMNS, out, None, as_json)


@app.command()
def load(
    model: Optional[Path] = MODEL,
    kv_budget: int = BUDGET,
    conversations: int = typer.Option(16, min=1, help="Clients at once, each with one conversation after the other."),
    slots: int = typer.Option(4, min=1, help="Conversations that the server works on at once (its -np)."),
    turns: int = typer.Option(20, min=1, help="Turns of a conversation."),
    seconds: float = typer.Option(600, min=1, help="How long."),
    cache_ram: int = typer.Option(1024, help="MiB for conversations that have no slot (the server's --cache-ram)."),
    checkpoints: int = typer.Option(COPIES, min=0, help="Copies of the state that each may have (--ctx-checkpoints); they need room there, too."),
    threads: int = THREADS,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """More conversations than slots: does memory grow, is text read twice, are answers mixed up?"""
    from ..serve import load as bench

    with _measuring(as_json) as tell:
        path = model or demo_model()
        kind = _with(_kinds(path, None, 0, kv_budget, checkpoints)[0], "-np", slots, "--cache-ram", cache_ram)
        report = bench.run_load(kind, path, threads, conversations, turns, seconds, _meta(path, threads, [kind]), tell)
    finish(report, bench.COLUMNS, out, None, as_json)


@app.command()
def outlive(
    model: Optional[Path] = MODEL,
    kv_budget: int = BUDGET,
    slots: int = typer.Option(4, min=1, help="Conversations, each with a slot."),
    threads: int = THREADS,
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """The server is killed while it works (kill -9) and started again: do saved slots go on?"""
    from ..serve import outlive as bench

    with _measuring(as_json) as tell:
        path = model or demo_model()
        kind = _with(_kinds(path, None, 0, kv_budget)[-1], "-np", slots)
        report = bench.run_outlive(kind, path, threads, slots, _meta(path, threads, [kind]), tell)
    finish(report, bench.COLUMNS, out, None, as_json)


def _with(kind: Kind, *options: object) -> Kind:
    return replace(kind, options=(*kind.options, *map(str, options)))


@contextmanager
def _measuring(as_json: bool) -> Iterator[Callable[[str], object]]:
    try:
        if as_json:
            yield lambda _: None
        else:
            with console(error=True).status("starting") as status:
                yield status.update
    except IndexMemError as error:
        fail(error)
    except KeyboardInterrupt:
        console(error=True).print("stopped")
        raise typer.Exit(130) from None


def _kinds(model: Path, stock: Optional[Path], context: int, budget: int, copies: int = COPIES) -> list[Kind]:
    """The servers to compare, ours with its sidecar last."""
    from indexmem_edge.models.sidecars import find_sidecar

    from ..serve.client import Kind

    sidecar = find_sidecar(str(model)).path
    options = ("--kv-budget", str(budget), "--ctx-checkpoints", str(copies), *(("--indexmem", str(sidecar)) if sidecar else ()))
    kinds = [Kind("stock", stock, (), context)] if stock else []
    return [*kinds, Kind(f"budget {budget}", server_program(), options)]


def _meta(model: Path, threads: int, kinds: list[Kind]) -> Row:
    from ..runner import library

    systems = {kind.name: [Path(word).name if Path(word).is_absolute() else word for word in kind.options] for kind in kinds}
    contexts = {kind.name: kind.context for kind in kinds if kind.context}
    return machine.describe(model.name, library(), threads, systems=systems, tokens_of_a_conversation=contexts or None)
