"""One objective after the other: steps, evaluations, early stopping, checkpoints.

A step is complete or not there: Ctrl-C waits for its end, and a training that goes on from a checkpoint computes, bit for
bit, what it would have computed without the interruption.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..errors import TrainingCheckpointError, TrainingError
from .checkpoints import Position, Snapshot, optimizer_tensors, restore_optimizer
from .data.sample import Sample
from .data.stream import Data
from .judge.metrics import Metrics
from .model.frozen import Frozen
from .objectives.objective import Objective
from .options import TrainOptions
from .parts import Parts, digest, make_objective, trains_memory
from .processes import Processes
from .schedule import lr_multiplier
from .watch import Interrupt, Watcher

BETAS, CLIP = (0.9, 0.95), 1.0  # method section 7.4
STAGE_SEEDS = 1_000_003  # between the seeds of objectives, so that processes of one do not meet those of another

Evaluate = Callable[[Frozen, nn.ModuleList, Sequence[Sample]], Mapping[str, float]]


@dataclass(frozen=True)
class Stage:
    """One objective of a training."""

    number: int
    objective: Objective
    modules: nn.ModuleList
    steps: int
    lr: float
    chooses: bool  # whether recall on held-out text says which weights are best

    @property
    def name(self) -> str:
        return self.objective.name


def overrides(objective: Objective) -> bool:
    """Whether an objective has a held-out loss of its own, which cannot be compared with that of another."""
    return type(objective).held_out_loss is not Objective.held_out_loss


class Loop:
    """Trains `parts`. What is saved, and how, is for `save`; a run folder has the prepared files and the figures."""

    def __init__(
        self,
        decoder: Frozen,
        parts: Parts,
        data: Data,
        options: TrainOptions,
        *,
        objectives: Mapping[str, type[Objective]],
        evaluate: Optional[Evaluate],
        processes: Processes,
        prepared: Path,
        metrics: Metrics,
        save: Callable[[Snapshot], None],
        watcher: Watcher,
        interrupt: Interrupt,
    ) -> None:
        self.decoder, self.parts, self.data, self.options = decoder, parts, data, options
        self.objectives, self.evaluate, self.processes = objectives, evaluate, processes
        self.prepared, self.metrics, self.save, self.watcher = prepared, metrics, save, watcher
        self.interrupt = interrupt
        self.position, self.best, self.before = Position(), dict[str, Tensor](), dict[str, Tensor]()
        self.saved = "nothing was saved before"
        self._held_out: Optional[list[Sample]] = None

    def run(self, snapshot: Optional[Snapshot]) -> Position:
        """All objectives that are not through; returns where that ends, with the best weights in `parts`.

        Raises:
            KeyboardInterrupt: after Ctrl-C; `saved` says what is saved, in words.
            TrainingError: an objective cannot train this, or its loss is no number.
            TrainingCheckpointError: a checkpoint could not be written.
        """
        if snapshot is not None:
            self.position, self.best, self.before = snapshot.position, snapshot.best, snapshot.before
            self.parts.load(snapshot.weights)
            self.saved = self._where()
        names = self.options.objective
        stages = [self._stage(i, name) for i, name in enumerate(names)]  # all of them: a mistake in the last is told now
        if self.processes.main:
            self.metrics.begin(self.position.stage, self.position.step)
        optimizer_state = snapshot.optimizer if snapshot is not None else {}
        for stage in stages[self.position.stage :]:
            self._train(stage, optimizer_state)
            optimizer_state = {}
        return self.position

    def held_out(self) -> list[Sample]:
        """The sequences that are measured on."""
        if self._held_out is None:
            self._held_out = self.data.held_out()
        return self._held_out

    def _stage(self, number: int, name: str) -> Stage:
        kind = self.objectives[name]
        objective = make_objective(kind, self.decoder, self.parts, self.options, self.options.length_of(number))
        memory = trains_memory(kind)
        modules = self.parts.memory if memory else self.parts.indexer
        assert modules is not None
        chooses = not memory and self.evaluate is not None
        return Stage(number, objective, modules, self.options.steps_of(number), self.options.lr_of(number), chooses)

    def _train(self, stage: Stage, optimizer_state: dict[str, Tensor]) -> None:
        p, o = self.position, self.options
        self.watcher.stage(stage.name, stage.steps, p.step)
        for part in (self.parts.indexer, self.parts.memory):
            if part is not None:
                part.requires_grad_(part is stage.modules)
        parameters = list(stage.modules.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=BETAS, weight_decay=0.0)
        restore_optimizer(optimizer, optimizer_state)
        self._prepare(stage)
        if stage.chooses and p.step == 0:
            if p.value is None or overrides(stage.objective):
                p.value = None
                self._measure(stage)
            if p.first_recall is None:
                p.first_recall = p.recall
            self.best = self.parts.weights()
        while p.step < stage.steps and not self._spent():
            agreed = self._step(stage, parameters, optimizer)
            if stage.chooses and (p.step == stage.steps or (o.eval_every and p.step % o.eval_every == 0)):
                self._measure(stage)
            stop = agreed or (self.processes.world == 1 and self.interrupt.wanted)
            if stop or p.step % o.checkpoint_every == 0:
                self._save(optimizer)
            if stop:
                raise KeyboardInterrupt
        self._finish(stage)

    def _prepare(self, stage: Stage) -> None:
        """Each process prepares the sequences that it trains on, in a folder of its own."""
        rank, world = self.processes.rank, self.processes.world
        pool = self.data.pool(self.options.batch, rank, world, stage.steps, stage.number)
        name = f"{stage.number}-{stage.name}-{rank}of{world}"
        now: dict[str, Tensor] = {}
        if stage.objective.from_before:
            now = self.parts.weights()
            self.before = self.before if self.position.step else now
            if not self.before:
                raise TrainingCheckpointError(f"the checkpoint does not say what {stage.name} began with, as it is of an earlier version: begin anew with --restart")
            name += f"-{digest(self.before)}"
            self.parts.load(self.before)
        else:
            self.before = {}
        try:
            stage.objective.prepare(pool, self.prepared / name, self._work)
        except OSError as error:
            raise TrainingCheckpointError(
                f"cannot make {self.prepared / name}, for what {stage.name} prepares: {error.strerror or error}. Name another --run folder"
            ) from None
        if now:
            self.parts.load(now)
        stage.objective.agree(lambda values: self.processes.average([], values))

    def _step(self, stage: Stage, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> bool:
        """The next step; whether some process was asked to stop before its end."""
        p, o, world, begun = self.position, self.options, self.processes, time.monotonic()
        rate = stage.lr * lr_multiplier(p.step, stage.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        samples = self.data.batch(p.step, o.batch, world.rank, world.world, stage.steps, stage.number)
        seed = o.seed + STAGE_SEEDS * stage.number + world.rank
        torch.manual_seed(seed + p.step)  # whatever draws without being told how repeats itself, too
        optimizer.zero_grad()
        figures = dict(stage.objective.backward(samples, p.step, seed))
        tokens = sum(len(sample.tokens) for sample in samples) * world.world
        loss, stop = world.average(parameters, [figures.pop("loss"), float(self.interrupt.wanted)])
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"{stage.name} broke down in step {p.step + 1}: loss {loss:g}, norm of the gradient {norm:g}. Try a lower "
                f"--lr than {stage.lr:g}, or --dtype float32; {self.saved}"
            )
        optimizer.step()
        seconds = time.monotonic() - begun
        p.step, p.loss, p.tokens, p.seconds = p.step + 1, loss, p.tokens + tokens, p.seconds + seconds
        told = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_second": tokens / max(seconds, 1e-9)}
        self._log(stage, **told, **figures)
        self.watcher.step(p.step, told)
        return stop > 0

    def _measure(self, stage: Stage) -> None:
        """Recall on held-out text; the weights are kept if it, or the objective's own measure, is the best so far."""
        assert self.evaluate is not None
        p, figures = self.position, dict[str, float]()
        if self.processes.main:
            self.watcher.work(0, 1, "recall on held-out text")
            with torch.no_grad():
                figures = dict(self.evaluate(self.decoder, self.parts.indexer, self.held_out()))
                own = stage.objective.held_out_loss(self.held_out())
            if own is not None:
                figures["held_out_loss"] = own
            self.watcher.work(1, 1, "recall on held-out text")
        recall = self.processes.from_main(figures.pop("recall", math.nan))
        value = self.processes.from_main(-figures["held_out_loss"] if "held_out_loss" in figures else recall)
        better = not math.isnan(value) and (p.value is None or value > p.value)
        if better:
            p.value, p.recall, p.recall_step, p.waited = value, recall, p.step, 0
            self.best = self.parts.weights()
        else:
            p.waited += 1
        self._log(stage, held_out_recall=recall, best=better, **figures)
        self.watcher.evaluated(p.step, recall, better)

    def _spent(self) -> bool:
        return 0 < self.options.patience <= self.position.waited

    def _finish(self, stage: Stage) -> None:
        """The best weights go on to the next objective."""
        p = self.position
        result: dict[str, Any] = {"objective": stage.name, "steps": stage.steps, "done": p.step, "loss": p.loss}
        if stage.chooses and p.recall is not None:
            self.parts.load(self.best)
            result |= {"recall": p.recall, "best_step": p.recall_step}
        if (found := stage.objective.found()) is not None:
            result["found"] = found
        if (needs := stage.objective.needs()) is not None:
            result["needs"] = [[layer, shares] for layer, shares in needs.items()]
        measure = getattr(stage.objective, "measure", None)
        if measure is not None:  # of a memory: layer by layer, the errors with it and without, and whether it helps
            errors = measure(self.held_out())
            result["enabled"] = [bool(e.helps) for e in errors]
            result["errors"] = [[float(error) for error in e.relative] for e in errors]
        p.stages.append(result)
        p.stage, p.step, p.loss, p.recall_step, p.waited, p.value = p.stage + 1, 0, None, 0, 0, p.recall
        self._save(None)

    def _save(self, optimizer: Optional[torch.optim.Optimizer]) -> None:
        if self.processes.main:
            state = optimizer_tensors(optimizer) if optimizer is not None else {}
            self.save(Snapshot(self.position, self.parts.weights(), self.best, self.before, state))
        self.saved = self._where()

    def _where(self) -> str:
        p, names = self.position, self.options.objective
        if p.step or not p.stage:
            return f"{p.step} of {self.options.steps_of(p.stage)} steps of {names[p.stage]} are saved"
        return f"all steps of {names[p.stage - 1]} are saved"

    def _work(self, done: int, total: int, what: str) -> None:
        self.watcher.work(done, total, what)
        self.interrupt.check()

    def _log(self, stage: Stage, **values: Any) -> None:
        if self.processes.main:
            self.metrics.add(objective=stage.name, stage=stage.number, step=self.position.step, **values)
