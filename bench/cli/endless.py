"""`indexmem bench endless`: its options, and what they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import typer

from .options import (
    INDEXMEMS,
    JSON,
    MODEL,
    OUT,
    SINKS,
    THREADS,
    UBATCH,
    WINDOW,
    numbers,
    policies_of,
    session,
    setup_of,
)

ARMS = "streaming,keydiff,indexer,shift"


def endless(
    model: Optional[Path] = MODEL,
    text: Optional[list[Path]] = typer.Option(
        None,
        "--text",
        exists=True,
        dir_okay=False,
        help="Text file with prose, such as a book; can be given several times. Default: sentences made up on the spot.",
        show_default=False,
    ),
    parts: str = typer.Option("nll,facts,talk,cost", help="nll, facts, talk, cost, far (the end of a text against its beginning)."),
    arms: str = typer.Option(ARMS, help="Policies, and `shift`: the stock cache that drops half of itself when it is full."),
    kv_span: str = typer.Option(
        "trained,0", "--kv-span", help="Spans that every policy runs with: trained (the default length), 0 (none), numbers."
    ),
    indexmem: Optional[list[Path]] = INDEXMEMS,
    budgets: str = typer.Option("1024", help="Entries that each KV head keeps; cells of the stock cache."),
    tokens: int = typer.Option(262144, help="Tokens that the parts nll, facts and far read."),
    per: int = typer.Option(16384, help="Tokens of a window of nll. The curve of every 1024 is in the JSON file, too."),
    distances: str = typer.Option("256,8192,16384,32768,65536", help="Tokens after which a fact is asked for."),
    fact_every: int = typer.Option(2500, min=100, help="Tokens from one fact to the next; the first is at 2000."),
    turns: int = typer.Option(200, min=8, help="Turns of the part talk."),
    turn_tokens: int = typer.Option(300, min=160, help="Tokens of a turn, about."),
    samples: int = typer.Option(1, min=1, help="Texts that every part but cost is run on; each begins elsewhere."),
    kv_sinks: int = SINKS,
    kv_window: int = WINDOW,
    threads: int = THREADS,
    ubatch: int = UBATCH,
    seed: int = typer.Option(0, help="Other seeds give other places in the text, other facts and other questions."),
    out: Path = OUT,
    as_json: bool = JSON,
) -> None:
    """What a conversation far past the trained length is worth: likelihood, facts told long ago, talk, cost. Against llama.cpp's
    context shift. Can be stopped and started again: what is finished is kept.
    """
    from indexmem_edge.cli.console import console
    from indexmem_edge.runtime.choice import INDEXER_POLICY

    from ..endless import run as bench, table as endless_table
    from ..endless.arms import SHIFT, arms_of, spans_of
    from ..quality.arms import Sidecars
    from ..report import PIPE_WIDTH, print_table

    with session(model, as_json) as (loaded, progress):
        words = [word for word in arms.split(",") if word]
        sidecars = _sidecars(loaded, indexmem) if indexmem or INDEXER_POLICY in words else Sidecars()
        if arms == ARMS and not sidecars.indexers:
            words.remove(INDEXER_POLICY)  # nobody asked for it, and there is none for this model
        bounded = [word for word in words if word != SHIFT]
        policies = policies_of(",".join(bounded), list(sidecars.indexers)) if bounded else list(sidecars.indexers)
        plan = bench.Plan(
            tuple(dict.fromkeys(word for word in parts.split(",") if word)),
            tuple(dict.fromkeys(numbers(budgets, int))),
            tuple(arms_of([*policies, *(word for word in words if word == SHIFT)], spans_of(kv_span))),
            setup_of(None, 0, "f16", kv_sinks, kv_window, threads, ubatch, seed),
            tokens=tokens,
            per=per,
            distances=tuple(sorted(set(numbers(distances, int)))),
            fact_every=fact_every,
            turns=turns,
            turn_tokens=turn_tokens,
            samples=samples,
            sidecars=sidecars,
        )
        report = bench.run_endless(loaded, plan, out, text or (), seed, progress)
    files = report.save(out, endless_table.plot)
    if as_json:
        print(files[0])
        return
    for title, columns, cells in endless_table.tables(report):
        print_table(title, columns, cells)
    for verdict in report.verdicts:
        console(width_in_pipes=PIPE_WIDTH).print(str(verdict))
    for reason in report.meta["without_span"]:
        print(f"span trained: none is in force, {reason}")
    if repeated := report.meta["text_repeated"]:
        print(repeated)
    print("wrote " + ", ".join(str(path) for path in files))


def _sidecars(model: Any, named: Optional[list[Path]]) -> Any:
    """Those that were named; for the demo model, without any, the one that was trained for it."""
    from indexmem_edge.errors import DemoModelMissing
    from indexmem_edge.models import demo

    from ..quality.arms import Sidecars

    if named:
        return Sidecars.open(named)
    try:
        ours = model.path.samefile(demo.demo_model())
    except DemoModelMissing:
        ours = False
    return Sidecars.open([demo.demo_sidecar()]) if ours else Sidecars()
