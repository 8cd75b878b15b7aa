"""The command `indexmem train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer
from typing_extensions import Annotated

from ..errors import TrainingError, TrainingStopped
from ..models.demo import demo_model
from ..train.options import DEVICES, DTYPES, ENGINES, KINDS, MEMORIES, TORCH, TrainOptions, flag_of, numbers, options_of
from ..train.torch_extra import require_torch
from .options import one_line_errors
from .train_show import show, show_estimate, watching

if TYPE_CHECKING:
    from ..train.run import TrainResult

_MODEL, _TEXT, _WHAT, _HOW, _EVAL, _FILE = "Model", "Text", "What is trained", "How", "Measuring", "Files"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **{"show_default": False, **more})


def _of(panel: str, field: str, *names: str, help: str, **more: Any) -> Any:
    """An option that is a field of TrainOptions, and shows its default."""
    default: Any = TrainOptions.__dataclass_fields__[field].default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return _option(panel, *names, help=help, show_default=shown, **more)


def train(
    *,
    model: Annotated[
        Optional[Path],
        _option(_MODEL, "-m", "--model", help="GGUF file that is trained for. Default: the demo model."),
    ] = None,
    text: Annotated[
        Optional[list[Path]],
        _option(_TEXT, "--text", metavar="PATH", help="UTF-8 book, or folder of .txt and .md; may be given repeatedly."),
    ] = None,
    out: Annotated[
        Optional[Path], _option(_FILE, "-o", "--out", help="Sidecar to write, FILE.indexmem.gguf.")
    ] = None,
    engine: Annotated[
        Optional[str],
        _of(
            _MODEL, "engine", "--engine",
            help=f"Who computes the model: {', '.join(ENGINES)}. native: the library that runs it, so any model that a budget "
            "works for, in the memory that it takes to run; objectives asked-kl, regress, told-apart and pooled-kl alone.",
        ),
    ] = None,
    kind: Annotated[Optional[str], _of(_WHAT, "kind", "--kind", help=f"Indexer: {', '.join(KINDS)}.")] = None,
    mid_dim: Annotated[
        Optional[int], _of(_WHAT, "mid_dim", "--mid-dim", min=0, help="Width of its hidden layer; 0: linear.")
    ] = None,
    decay: Annotated[
        bool, _option(_WHAT, "--decay", help="retention: ranks fall with age, each entry's at a rate of its own.")
    ] = False,
    start: Annotated[
        Optional[Path],
        _option(_WHAT, "--from", metavar="FILE", help="Sidecar whose indexer is trained further; it has kind and size."),
    ] = None,
    memory: Annotated[
        Optional[str], _of(_WHAT, "memory", "--memory", help=f"Memory of evicted entries: {', '.join(MEMORIES)}.")
    ] = None,
    memory_slots: Annotated[
        Optional[int], _of(_WHAT, "memory_slots", "--memory-slots", min=1, help="Slots of a centroid memory.")
    ] = None,
    objective: Annotated[
        Optional[str],
        _option(
            _WHAT,
            "--objective",
            show_default="by kind and memory",
            help="One, or several with commas between them: then each begins with the best weights of the one before. "
            "regress (fast), asked-kl (as fast, learns from questions and a second reading), gated-kl (better, slower), select-kl (after either), told-apart (last: what is told "
            "outlives the rest of a long text), pooled-kl (pairwise), residual-mse (memory).",
        ),
    ] = None,
    steps: Annotated[
        Optional[str], _of(_HOW, "steps", "--steps", metavar="N[,N]", help="Steps of all objectives, or of each.")
    ] = None,
    lr: Annotated[
        Optional[str], _of(_HOW, "lr", "--lr", metavar="X[,X]", help="Highest learning rate of all, or of each.")
    ] = None,
    batch: Annotated[
        Optional[int], _of(_HOW, "batch", "--batch", min=1, help="Sequences of a step, of all GPUs together.")
    ] = None,
    length: Annotated[
        Optional[str],
        _of(_TEXT, "lengths", "--length", metavar="N[,N]", help="Tokens of a sequence, of all objectives or of each."),
    ] = None,
    samples: Annotated[
        Optional[str],
        _of(_TEXT, "samples", "--samples", metavar="N[,N]", help="Distinct sequences; 0: every step has new ones."),
    ] = None,
    generated: Annotated[
        Optional[float],
        _of(
            _TEXT, "generated", "--generated", min=0, max=1,
            help="Share of sequences with generated facts and questions among the pages of the books.",
        ),
    ] = None,
    held_out: Annotated[
        Optional[float],
        _of(_EVAL, "held_out", "--held-out", help="Share of each book, its end, that is measured on and never trained on."),
    ] = None,
    eval_samples: Annotated[
        Optional[int], _of(_EVAL, "eval_samples", "--eval-samples", min=1, help="Sequences that are measured on.")
    ] = None,
    budget: Annotated[
        Optional[str],
        _of(_EVAL, "budgets", "--budget", metavar="X[,X]", help="Shares of the context that are kept when measuring."),
    ] = None,
    eval_every: Annotated[
        Optional[int],
        _of(_EVAL, "eval_every", "--eval-every", min=0, help="Steps between measurements; 0: before and after only."),
    ] = None,
    patience: Annotated[
        Optional[int],
        _of(_EVAL, "patience", "--patience", min=0, help="Measurements without a gain that end an objective; 0: none do."),
    ] = None,
    kv_sinks: Annotated[
        Optional[int], _of(_WHAT, "sinks", "--kv-sinks", min=0, help="First tokens, which are never evicted.")
    ] = None,
    kv_window: Annotated[
        Optional[int], _of(_WHAT, "window", "--kv-window", min=0, help="Most recent tokens, which are never evicted.")
    ] = None,
    seed: Annotated[Optional[int], _of(_HOW, "seed", "--seed", min=0, help="Of everything random.")] = None,
    device: Annotated[Optional[str], _of(_MODEL, "device", "--device", help=f"{', '.join(DEVICES)}.")] = None,
    dtype: Annotated[
        Optional[str],
        _of(_MODEL, "dtype", "--dtype", help=f"Type of the model's weights while training: {', '.join(DTYPES)}."),
    ] = None,
    outtype: Annotated[
        Optional[str], _of(_FILE, "outtype", "--outtype", help="Type of the sidecar's matrices: f32, f16, q8_0.")
    ] = None,
    no_fingerprint: Annotated[
        bool, _option(_FILE, "--no-fingerprint", help="Leave the fingerprint out, so that fine-tunes may use the file.")
    ] = False,
    run: Annotated[
        Optional[Path],
        _option(_FILE, "--run", show_default="beside --out", help="Folder of checkpoints and figures of this training."),
    ] = None,
    checkpoint_every: Annotated[
        Optional[int],
        _of(_FILE, "checkpoint_every", "--checkpoint-every", min=1, help="Steps between checkpoints."),
    ] = None,
    resume: Annotated[
        Optional[Path],
        _option(_FILE, "--resume", metavar="FOLDER", help="Go on with the training in that folder; needs no other option."),
    ] = None,
    estimate: Annotated[
        bool,
        _option(_FILE, "--estimate", help="Say what time, memory and disk it would take, measured on a few batches, and end."),
    ] = False,
    restart: Annotated[bool, _option(_FILE, "--restart", help="Forget what the --run folder holds.")] = False,
    force: Annotated[bool, _option(_FILE, "--force", help="Overwrite a sidecar that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_FILE)] = False,
) -> None:
    """Train an indexer, and a memory if wanted, for a model, and write them as a sidecar.

    The model itself stays as it is. Needs books to read, and PyTorch (pip install torch). What is held out of the books
    says which weights are best, and when to stop. Ctrl-C saves; the same command goes on from there.
    With several GPUs and accelerate installed there is a process for each; `accelerate launch -m indexmem_edge train ...`
    does the same across machines.

    Examples:

    indexmem train -m model.gguf --text books/ --out model.indexmem.gguf

    indexmem train -m model.gguf --text books/ --objective regress,gated-kl --steps 300,100 --out model.indexmem.gguf

    indexmem train -m model.gguf --engine native --text books/ --out model.indexmem.gguf --estimate

    indexmem train --resume model.indexmem.train
    """
    given = {
        "model": model, "texts": tuple(text) if text else None, "out": out, "engine": engine, "kind": kind, "mid_dim": mid_dim,
        "decay": decay or None, "start": start, "memory": memory, "memory_slots": memory_slots, "objective": objective, "steps": steps,
        "lr": lr, "batch": batch, "lengths": length, "samples": samples, "generated": generated, "held_out": held_out,
        "eval_samples": eval_samples, "budgets": budget, "eval_every": eval_every, "patience": patience,
        "sinks": kv_sinks, "window": kv_window, "seed": seed, "device": device, "dtype": dtype, "outtype": outtype,
        "fingerprint": False if no_fingerprint else None, "run": run, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    with one_line_errors():
        from ..files.atomic import check_target

        options = _options({name: value for name, value in given.items() if value is not None}, resume, restart)
        check_target(options.out, force or estimate)  # before anything takes time
        require_torch()
        if estimate:
            _estimate(options, as_json)
            return
        result = _train(options, force, restart, as_json)
        if result is None:
            return
        if as_json:
            print(json.dumps(result.to_dict(), indent=2))
        else:
            show(result, options)
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)


def _options(given: dict[str, Any], resume: Optional[Path], restart: bool) -> TrainOptions:
    if resume is not None:
        if restart:
            raise TrainingError("--resume goes on and --restart begins anew: give one of them")
        found = options_of(resume)
        if other := [name for name in given if name != "device"]:
            raise TrainingError(
                f"--resume takes all options from {resume}: leave out {flag_of(other[0])}, or give the whole "
                "command again without --resume"
            )
        return TrainOptions(**{**vars(found), **given}).checked()
    for name, flag in (("texts", "--text books/"), ("out", "--out model.indexmem.gguf")):
        if name not in given:
            raise TrainingError(f"{flag.split()[0]} is missing: say for example {flag}, or go on with --resume FOLDER")
    if "model" not in given:
        given["model"] = demo_model()
    if "objective" in given:
        given["objective"] = tuple(name.strip() for name in given["objective"].split(","))
    for name, flag, kind in (
        ("steps", "--steps", int), ("lr", "--lr", float), ("lengths", "--length", int),
        ("samples", "--samples", int), ("budgets", "--budget", float),
    ):  # fmt: skip
        if name in given:
            given[name] = numbers(flag, given[name], kind)
    return TrainOptions(**given).checked()


def _estimate(options: TrainOptions, as_json: bool) -> None:
    from ..train.estimate import estimate

    with watching(not as_json) as watcher:
        found = estimate(options, watcher=watcher)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show_estimate(found, options)


def _train(options: TrainOptions, force: bool, restart: bool, as_json: bool) -> Optional[TrainResult]:
    """The result; None in a process that only helped, or that only started others."""
    from ..train import processes

    n = processes.to_launch(options.device, options.batch) if options.engine == TORCH else 1
    if n > 1:
        status = processes.launch(n, sys.argv[1:])
        if status:
            raise typer.Exit(status)
        return None
    from ..train.run import train

    try:
        with watching(not as_json and processes.is_main()) as watcher:
            if options.engine == TORCH and (unused := processes.unused(options.device)):
                watcher.note(unused)
            return train(options, force=force, restart=restart, watcher=watcher)
    except (TrainingStopped, KeyboardInterrupt) as stopped:
        if processes.is_main():
            print(str(stopped) or "stopped: nothing was saved yet", file=sys.stderr)
        raise typer.Exit(130) from None
