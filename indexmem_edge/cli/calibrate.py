"""The command `indexmem calibrate-memory`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import typer
from typing_extensions import Annotated

from ..models.demo import demo_model
from ..native.processors import usable_processors
from ..options import DEFAULT_SINKS, LEAST_WINDOW
from ..runtime.choice import DEFAULT_MEMORY_SLOTS, DEFAULT_POLICY, INDEXER_POLICY
from .console import Bar, console
from .options import one_line_errors, panel_option
from .terminal import printable

if TYPE_CHECKING:
    from ..calibrate.run import Calibration

_MODEL, _CACHE, _TEXT, _FILE = "Model", "KV cache", "Measuring", "Sidecar"


def calibrate_memory(
    *,
    model: Annotated[
        Optional[Path],
        panel_option(_MODEL, "-m", "--model", help="GGUF file. Default: the demo model.", show_default=False),
    ] = None,
    text: Annotated[
        list[Path], panel_option(_TEXT, "--text", metavar="FILE", help="UTF-8 text to measure on; may be given repeatedly.")
    ],
    out: Annotated[Path, panel_option(_FILE, "-o", "--out", help="Sidecar to write, FILE.indexmem.gguf.")],
    kv_budget: Annotated[
        int, panel_option(_CACHE, "--kv-budget", min=1, help="Entries that each KV head keeps, latent slots included.")
    ],
    indexmem: Annotated[
        Optional[Path],
        panel_option(
            _FILE,
            "--indexmem",
            metavar="FILE",
            show_default=False,
            help="Sidecar that gets the memory; without one, the new sidecar holds a memory alone.",
        ),
    ] = None,
    memory: Annotated[
        str, panel_option(_FILE, "--memory", help="centroid, or residual, whose weights --indexmem must hold.")
    ] = "centroid",
    memory_slots: Annotated[
        int, panel_option(_FILE, "--memory-slots", min=1, max=4096, help="Latent slots of a centroid memory, per KV head.")
    ] = DEFAULT_MEMORY_SLOTS,
    no_fingerprint: Annotated[
        bool, panel_option(_FILE, "--no-fingerprint", help="Leave the fingerprint out, so that fine-tunes may use the file.")
    ] = False,
    force: Annotated[bool, panel_option(_FILE, "--force", help="Overwrite a file that is there.")] = False,
    kv_policy: Annotated[
        Optional[str],
        panel_option(
            _CACHE,
            "--kv-policy",
            show_default=f"{INDEXER_POLICY} with an indexer, else {DEFAULT_POLICY}",
            help="Who is evicted; `indexmem doctor` lists the policies.",
        ),
    ] = None,
    kv_sinks: Annotated[int, panel_option(_CACHE, "--kv-sinks", min=0, help="First tokens, which are never evicted.")] = (
        DEFAULT_SINKS
    ),
    kv_window: Annotated[
        int, panel_option(_CACHE, "--kv-window", min=1, help="Most recent tokens, which are never evicted.")
    ] = LEAST_WINDOW,
    ctx_size: Annotated[int, panel_option(_TEXT, "-c", "--ctx-size", min=1, help="Tokens of a passage.")] = 4096,
    ubatch_size: Annotated[
        int, panel_option(_TEXT, "-ub", "--ubatch-size", min=1, help="Tokens evaluated, and evicted, at once.")
    ] = 512,
    passages: Annotated[
        int, panel_option(_TEXT, "--passages", min=2, help="Passages at most, taken from all over the text.")
    ] = 4,
    threads: Annotated[
        Optional[int],
        panel_option(_MODEL, "-t", "--threads", min=1, help="CPU threads. Default: all.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure on text in which layers a memory of evicted entries helps, and write that into a sidecar.

    A memory is not always a gain: its slots are paid from the budget, and some layers are better off without. For each
    layer this compares the attention output with that of a cache that keeps everything, chooses how much the memory
    counts on one half of the text, and switches it off unless the error is lower on both halves. `no memory` is a cache
    whose whole budget is exact entries, `off` one that pays for slots that this layer does not use.

    Examples:

    indexmem calibrate-memory -m model.gguf --text book.txt --kv-budget 1024 --out model.indexmem.gguf

    indexmem calibrate-memory -m model.gguf --indexmem scorer.indexmem.gguf --text a.txt --text b.txt --kv-budget 2048
    --out model.indexmem.gguf
    """
    with one_line_errors():
        from ..calibrate.run import calibrate_memory as calibrate

        with Bar("measuring", wanted=not as_json) as bar:
            result = calibrate(
                model if model is not None else demo_model(),
                text,
                out,
                kv_budget=kv_budget,
                kv_policy=kv_policy,
                kv_sinks=kv_sinks,
                kv_window=kv_window,
                indexmem=indexmem,
                memory=memory,
                slots=memory_slots,
                n_ctx=ctx_size,
                n_ubatch=ubatch_size,
                n_passages=passages,
                n_threads=threads or usable_processors(),
                fingerprint=not no_fingerprint,
                force=force,
                progress=bar.update,
            )
        if as_json:
            print(json.dumps(result.to_dict(), indent=2))
        else:
            _show(result)
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)


def _show(result: Calibration) -> None:
    from rich import box
    from rich.table import Table

    out = console()
    plain = "gate 1" if result.memory == "centroid" else "as trained"
    table = Table(title="Error of the attention output", title_justify="left", title_style="bold", box=box.SIMPLE)
    for name in ("layer", "no memory", "off", plain, "calibrated", "gate", "memory"):
        table.add_column(name, justify="left" if name == "memory" else "right")
    for row in result.layers:
        errors = (f"{error:.4f}" for error in (row.without, row.off, row.plain, row.gated))
        table.add_row(str(row.layer), *errors, f"{row.gate:.3f}", "on" if row.enabled else "off")
    out.print(table)
    on, slots = sum(row.enabled for row in result.layers), f" of {result.slots} slots" if result.slots else ""
    lengths = ", ".join(f"{n:,}" for n in result.passages)
    out.print(
        f"{result.memory} memory{slots} on in {on} of {len(result.layers)} layers; "
        f"mean error {result.error_without:.4f} without, {result.error:.4f} with it"
    )
    if result.worse:
        out.print(f"better off without: layer {', '.join(map(str, result.worse))}")
    out.print(
        f"policy {result.policy}, budget {result.budget:,}; "
        f"passages of {lengths} tokens, {result.rows:,} outputs a layer"
    )
    out.print(f"{printable(result.path)}: {result.bytes:,} bytes", markup=False)
