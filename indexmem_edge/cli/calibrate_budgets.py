"""The command `indexmem calibrate-budgets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import typer
from typing_extensions import Annotated

from ..models.demo import demo_model
from ..native.processors import usable_processors
from ..options import DEFAULT_SINKS
from .console import Bar, console
from .options import one_line_errors, panel_option
from .terminal import printable

_MODEL, _CACHE, _TEXT, _FILE = "Model", "KV cache", "Measuring", "Sidecar"


def calibrate_budgets(
    *,
    model: Annotated[
        Optional[Path],
        panel_option(_MODEL, "-m", "--model", help="GGUF file. Default: the demo model.", show_default=False),
    ] = None,
    indexmem: Annotated[Path, panel_option(_FILE, "--indexmem", metavar="FILE", help="Sidecar with the indexer that ranks.")],
    text: Annotated[
        list[Path],
        panel_option(_TEXT, "--text", metavar="FILE", help="UTF-8 book that facts are told in; may be given repeatedly."),
    ],
    out: Annotated[Path, panel_option(_FILE, "-o", "--out", help="Sidecar to write, FILE.indexmem.gguf.")],
    kv_budget: Annotated[
        int, panel_option(_CACHE, "--kv-budget", min=1, help="Entries that each KV head keeps, on average over the heads.")
    ],
    kv_sinks: Annotated[int, panel_option(_CACHE, "--kv-sinks", min=0, help="First tokens, which are never evicted.")] = (
        DEFAULT_SINKS
    ),
    kv_window: Annotated[
        Optional[int],
        panel_option(
            _CACHE, "--kv-window", min=1, show_default="a quarter of the budget, at most 128",
            help="Most recent tokens, which are never evicted.",
        ),
    ] = None,
    ctx_size: Annotated[int, panel_option(_TEXT, "-c", "--ctx-size", min=256, help="Tokens of a text.")] = 2048,
    texts: Annotated[int, panel_option(_TEXT, "--texts", min=2, help="Texts that are read with each arrangement.")] = 8,
    seed: Annotated[int, panel_option(_TEXT, "--seed", min=0, help="Of what is told in them.")] = 0,
    force: Annotated[bool, panel_option(_FILE, "--force", help="Overwrite a file that is there.")] = False,
    threads: Annotated[
        Optional[int],
        panel_option(_MODEL, "-t", "--threads", min=1, help="CPU threads. Default: all.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure which layers, and which of their KV heads, need more of a budget than others, and write that into a sidecar.

    Texts with facts in them are read with the budget and asked about: all layers alike, and with four times the room in one
    layer after the other, all heads together keeping as much as before. The layers that gain most become wide together, or only
    those of their heads that gain, if texts that had no part in the choice agree. It takes as long as reading the texts once
    for each layer, and for each head of up to four layers.

    Examples:

    indexmem calibrate-budgets -m model.gguf --indexmem model.indexmem.gguf --text book.txt --kv-budget 96 --out shared.indexmem.gguf
    """
    with one_line_errors():
        from ..calibrate.budgets import calibrate_budgets as calibrate

        with Bar("measuring", wanted=not as_json) as bar:
            result = calibrate(
                model if model is not None else demo_model(), text, indexmem, out, kv_budget=kv_budget, kv_sinks=kv_sinks,
                kv_window=kv_window, n_ctx=ctx_size, n_texts=texts, n_threads=threads or usable_processors(), seed=seed,
                force=force, progress=bar.update,
            )  # fmt: skip
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    show = console().print
    for il, gain in sorted(result.gains.items(), key=lambda item: -item[1])[:8]:
        show(f"layer {il:>3} alone {gain:+.3f} nats per token of an answer")
    if result.least is None:
        show(f"nothing does better on other texts: {printable(result.path)} says of budgets what {printable(str(indexmem))} says")
        return
    names = (f"layer {i}" if result.heads == 1 else f"layer {i // result.heads} head {i % result.heads}" for i in range(len(result.least)))
    wide = ", ".join(f"{name} gets {n} entries first" for name, n in zip(names, result.least) if n) or "nothing gets entries first any more"
    show(f"{wide}; answers on other texts {result.nll_before:.3f} -> {result.nll:.3f} nats per token")
    show(f"{printable(result.path)} written")
