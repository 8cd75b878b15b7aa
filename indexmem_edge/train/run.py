"""A whole training: model and books in, sidecar and figures out.

    from indexmem_edge.train.run import train
    from indexmem_edge.train.options import TrainOptions

    result = train(TrainOptions(Path("model.gguf"), (Path("books"),), Path("model.indexmem.gguf")))
    print(result.recall_before, result.recall)

What it needs from elsewhere, the objectives, the generator of text, the measure of recall and its report, are `Tools`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from indexmem_edge.convert.basemodel import BaseModel, read_base_model
from indexmem_edge.convert.sources import file_sha256
from indexmem_edge.convert.writer import write_sidecar

from ..errors import TrainingCheckpointError, TrainingError, TrainingStopped
from ..files.atomic import check_target, replacing, same_file
from ..files.gguffile import GGUFFile
from ..files.modelfile import check_model_file, fingerprint
from .checkpoints import NAME as CHECKPOINT, Position, load_snapshot, remove_snapshot, save_snapshot
from .data.books import books_digest, find_books, read_books
from .data.sample import Sample
from .data.stream import Data, Generate
from .export import to_checkpoint
from .judge.metrics import NAME as METRICS, Metrics
from .loop import Evaluate, Loop
from .model.architectures import architecture
from .model.frozen import Frozen, Geometry
from .model.load import fast_dtype, load_decoder
from .model.tokenizer import open_tokenizer
from .objectives.objective import Objective, Progress
from .observed.library import check_bounded, open_library_model
from .options import NATIVE, RUN_FILE, TrainOptions
from .parts import Parts, build_parts, trains_memory
from .processes import Processes, open_processes
from .watch import Interrupt, Watcher

PREPARED = "prepared"
_PREPARED_BY = (  # options that decide what objectives prepare
    "kind", "batch", "steps", "lengths", "samples", "generated", "held_out", "sinks", "window", "seed", "dtype", "engine", "model",
    "text", "start", "objective", "lr",
)  # fmt: skip

Report = Callable[[Frozen, nn.ModuleList, Sequence[Sample], Path, Progress], Sequence[Path]]


@dataclass(frozen=True)
class Tools:
    """What a training works with; all but objectives and generator may be missing."""

    objectives: Mapping[str, type[Objective]]
    generate: Generate
    check: Optional[Callable[[Sequence[Sample]], None]] = None  # raises what `evaluate` would raise, before anything takes time
    evaluate: Optional[Evaluate] = None  # -> figures, with `recall`, which says which weights are best
    report: Optional[Report] = None  # writes files into the run folder and returns their paths


@dataclass(frozen=True)
class TrainResult:
    """What was trained, how well, and where it is."""

    path: str
    bytes: int
    run: str
    stages: tuple[Mapping[str, Any], ...]  # objective, steps, done, loss; recall and best_step where it chose
    recall_before: Optional[float]
    recall: Optional[float]
    tokens: int
    seconds: float
    reports: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes."""
        return asdict(self)


def default_tools(options: TrainOptions) -> Tools:
    """The objectives, the generator and the measure of this package."""
    from .data.generated import generate
    from .judge import recall_report
    from .judge.recall import check, held_out_recall
    from .objectives import OBJECTIVES

    how = options.budgets, options.sinks, options.window

    def evaluate(decoder: Frozen, modules: nn.ModuleList, samples: Sequence[Sample]) -> dict[str, float]:
        return {"recall": held_out_recall(decoder, modules, samples, *how)}

    def report(
        decoder: Frozen, modules: nn.ModuleList, samples: Sequence[Sample], folder: Path, progress: Progress
    ) -> list[Path]:
        recall_report.report(decoder, modules, samples, folder, *how, progress)
        return [path for name in (recall_report.JSON, recall_report.PLOT) if (path := folder / name).exists()]

    return Tools(OBJECTIVES, generate, lambda samples: check(samples, *how), evaluate, report)


def train(
    options: TrainOptions,
    *,
    force: bool = False,
    restart: bool = False,
    tools: Optional[Tools] = None,
    watcher: Watcher = Watcher(),
) -> Optional[TrainResult]:
    """Trains, or goes on where the run folder is, and writes the sidecar. Of several processes the others return None.

    Args:
        force: overwrite `options.out`.
        restart: forget what the run folder holds.

    Raises:
        TrainingStopped: Ctrl-C; the message says how to go on.
        TrainingCheckpointError: a checkpoint cannot be written, or is of another training.
        IndexMemError: an option, the model or the text cannot be used. Nothing is written then.
    """
    options = options.checked()
    run = _run(options)
    check_target(options.out, force)
    tools = tools or default_tools(options)
    with opened(options, tools, watcher) as setup, contextlib.ExitStack() as stack:
        processes, decoder, parts = setup.processes, setup.decoder, setup.parts
        if processes.main:
            _open_folder(run, options, restart)
        processes.wait()
        snapshot = load_snapshot(run, setup.deciding)
        if snapshot is not None and not restart:
            watcher.note(f"going on with the training in {run}")
        interrupt = stack.enter_context(
            Interrupt(processes.world == 1, lambda: watcher.note("stopping after this step; Ctrl-C again: at once"))
        )
        loop = Loop(
            decoder,
            parts,
            setup.data,
            options,
            objectives=tools.objectives,
            evaluate=tools.evaluate,
            processes=processes,
            prepared=run / PREPARED / _digest({k: v for k, v in setup.deciding.items() if k in _PREPARED_BY}),
            metrics=Metrics(run),
            save=lambda snapshot: save_snapshot(run, snapshot, setup.deciding),
            watcher=watcher,
            interrupt=interrupt,
        )
        try:
            position = loop.run(snapshot)
        except KeyboardInterrupt:
            raise TrainingStopped(
                f"stopped: {loop.saved}. Go on with the same command, or with: indexmem train --resume {run}"
            ) from None
        if not processes.main:
            return None
        return _write(options, setup.base, parts, position, setup.texts, loop, tools, force, watcher)


@dataclass(frozen=True)
class Setup:
    """All that a training works with, opened."""

    base: BaseModel
    texts: Sequence[str]  # names of the books
    data: Data
    decoder: Frozen
    parts: Parts
    processes: Processes
    deciding: Mapping[str, Any]  # what decides the weights beside the code


@contextlib.contextmanager
def opened(options: TrainOptions, tools: Tools, watcher: Watcher) -> Iterator[Setup]:
    """Reads the model and the books. `options` are checked ones.

    Raises:
        IndexMemError: an option, the model or the text cannot be used.
    """
    if unknown := [name for name in options.objective if name not in tools.objectives]:
        raise TrainingError(f"unknown objective {unknown[0]!r}: expected one of {', '.join(tools.objectives)}")
    _check_memory(options, tools)
    processes = open_processes(options.device)
    # before minutes are spent on reading
    if options.engine == NATIVE:
        check_bounded(options.model)
    else:
        _check_architecture(options.model)
    base = read_base_model(options.model, options.fingerprint)
    files = find_books(options.texts)
    if any(same_file(path, options.out) for path in (options.model, *files)):
        raise TrainingError(f"{options.out} is to be read as well: name another file to write")
    deciding = {**options.deciding(), "model": fingerprint(options.model), "text": books_digest(files)}
    if options.start is not None:
        deciding["start"] = file_sha256(options.start)
    with contextlib.ExitStack() as stack:
        tokenizer = stack.enter_context(open_tokenizer(options.model))
        books = read_books(files, tokenizer.tokenize, options.held_out, lambda done, total: watcher.work(done, total, "books"))
        data = Data(books, tokenizer, tools.generate, options)
        if tools.check is not None:
            tools.check(data.held_out())
        readings = max(tools.objectives[name].readings for name in options.objective)
        decoder = stack.enter_context(_loaded(options, base, processes, readings * max(options.lengths)))
        parts = build_parts(decoder.geometry, options, processes.device)
        yield Setup(base, [book.name for book in books], data, decoder, parts, processes, deciding)


def _check_memory(options: TrainOptions, tools: Tools) -> None:
    """A memory with weights learns, at last, what a trained indexer evicts; untrained it would be written as if it were one."""
    if options.memory != "residual":
        return
    memory = [trains_memory(tools.objectives[name]) for name in options.objective]
    if not memory[-1] or memory != sorted(memory):
        raise TrainingError(
            f"--memory residual is trained after the indexer: end --objective with residual-mse, and train no indexer after it, found "
            f"{','.join(options.objective)}"
        )
    if all(memory) and options.start is None:
        raise TrainingError(
            f"a memory learns what a trained indexer evicts: put an objective for the indexer before {options.objective[0]}, or name a sidecar with --from"
        )


def _check_architecture(model: Path) -> None:
    name = check_model_file(model)
    with GGUFFile(name) as file:
        found = file.get("general.architecture", "string")
    if found is not None:  # without it, what is read next says what is wrong
        architecture(name, found)


def _run(options: TrainOptions) -> Path:
    assert options.run is not None  # filled in by checked()
    return options.run


@contextlib.contextmanager
def _loaded(options: TrainOptions, base: BaseModel, processes: Processes, longest: int) -> Iterator[Frozen]:
    """The model, by the engine that was asked for; `longest`: tokens of a text."""
    if options.engine == NATIVE:
        with open_library_model(options.model, base, longest, processes.device, torch.get_num_threads()) as model:
            yield model
    else:
        dtype = fast_dtype(processes.device) if options.dtype == "auto" else getattr(torch, options.dtype)
        yield load_decoder(options.model, dtype, processes.device)


def _open_folder(run: Path, options: TrainOptions, restart: bool) -> None:
    """Makes the run folder, with the options in it for --resume."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingCheckpointError(f"cannot make the run folder {run}: {error.strerror or error}") from None
    if restart:
        remove_snapshot(run)
    if not (run / CHECKPOINT).exists():
        with replacing(run / RUN_FILE, force=True) as temporary:
            Path(temporary).write_text(json.dumps(options.to_dict(), indent=1) + "\n", encoding="utf-8")


def _digest(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _shares(needs: Sequence[tuple[int, Sequence[float]]], geometry: Geometry) -> tuple[float, ...]:
    """Of each KV head of each layer, those of layers that are not bounded with them."""
    of_layers = dict(needs)
    return tuple(share for il in range(geometry.n_layer) for share in of_layers.get(il, [1.0] * geometry.n_head_kv))


def _write(
    options: TrainOptions,
    base: BaseModel,
    parts: Parts,
    position: Position,
    texts: Sequence[str],
    loop: Loop,
    tools: Tools,
    force: bool,
    watcher: Watcher,
) -> TrainResult:
    """The report and the sidecar."""
    run = _run(options)
    enabled, scores = _measured(position, "untrained" if options.start is None else "start")
    bounded = loop.decoder.geometry.bounded
    for stage in position.stages:
        if "needs" in stage:
            parts = replace(parts, shares=_shares(stage["needs"], loop.decoder.geometry), least=None)
    checkpoint = to_checkpoint(
        parts,
        base,
        options,
        texts=texts,
        step=sum(stage["done"] for stage in position.stages),
        source=run / CHECKPOINT,
        bounded=bounded,
        enabled=enabled,
        scores=scores,
    )
    written = write_sidecar(options.out, checkpoint, options.outtype, force)
    reports: Sequence[Path] = []
    if tools.report is not None:
        reports = tools.report(loop.decoder, parts.indexer, loop.held_out(), run, watcher.work)
    with contextlib.suppress(OSError):  # large, and of no use any more
        shutil.rmtree(run / PREPARED)
    return TrainResult(
        path=os.fspath(options.out),
        bytes=written.size,
        run=os.fspath(run),
        stages=tuple(position.stages),
        recall_before=position.first_recall,
        recall=position.recall,
        tokens=position.tokens,
        seconds=position.seconds,
        reports=tuple(map(os.fspath, [*reports, run / METRICS])),
        notes=tuple(_notes(options, base, position, bounded, enabled, written.fallbacks)),
    )


def _measured(position: Position, before: str) -> tuple[Optional[list[bool]], dict[str, float]]:
    """Which bounded layers use a residual memory, None if all do, and the scores of the sidecar; `before`: what training
    began with.
    """
    enabled, scores = None, dict[str, float]()
    for name, value in ((f"held_out_recall.{before}", position.first_recall), ("held_out_recall", position.recall)):
        if value is not None:
            scores[name] = value
    for stage in position.stages:
        if "enabled" in stage:
            enabled = stage["enabled"]
            used = [a if on else b for on, (a, b) in zip(enabled, stage["errors"])]
            scores["attention_error.with_memory"] = sum(used) / len(used)
            scores["attention_error.without_memory"] = sum(b for _, b in stage["errors"]) / len(used)
    return enabled, scores


def _notes(
    options: TrainOptions,
    base: BaseModel,
    position: Position,
    bounded: Sequence[int],
    enabled: Optional[Sequence[bool]],
    fallbacks: Sequence[str],
) -> list[str]:
    """What should not pass unnoticed."""
    notes = []
    if len(bounded) < base.geometry.block_count:
        layers = ", ".join(map(str, bounded))
        notes.append(
            f"the sidecar is for {len(bounded)} of {base.geometry.block_count} layers, {layers}: no budget bounds the "
            "others, which have sliding windows or recurrent states"
        )
    notes += [f"{stage['objective']}: {stage['found']}" for stage in position.stages if "found" in stage]
    best_steps = [stage["best_step"] for stage in position.stages if "best_step" in stage]
    if best_steps and not any(best_steps):
        notes.append("no step did better on held-out text: the sidecar has the weights that training began with")
    if enabled is not None and not all(enabled):
        off = ", ".join(str(il) for il, on in zip(bounded, enabled) if not on)
        notes.append(f"the memory is off in layer {off}: there held-out text is read better without")
    if options.memory == "centroid":
        notes.append(
            "the memory is on in all layers with gate 1; measure where it helps with: indexmem calibrate-memory "
            f"--indexmem {options.out}"
        )
    if fallbacks:
        notes.append(f"F16 instead of {options.outtype}, because rows are no multiple of 32: {', '.join(fallbacks)}")
    return notes
