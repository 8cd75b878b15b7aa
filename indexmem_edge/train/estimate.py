"""What a training will take, measured on a few of its sequences and steps before it begins.

    from indexmem_edge.train.estimate import estimate

    print(estimate(options).seconds / 60, "minutes")
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from ..native.memory import peak_memory
from .objectives.objective import Objective
from .options import TrainOptions
from .parts import Parts, make_objective, trains_memory
from .run import Setup, Tools, default_tools, opened
from .watch import Watcher

_SEQUENCES, _STEPS = 2, 2  # that are measured, after one of each that warms up
_REPORT = 3  # measurements of recall that the report costs: it ranks by all policies


@dataclass(frozen=True)
class StageEstimate:
    """One objective. Seconds: for all of its sequences, all of its steps, all of its measurements."""

    objective: str
    sequences: int
    steps: int
    preparing: float
    training: float
    measuring: float
    disk: int  # bytes that it keeps in the run folder until the training ends

    @property
    def seconds(self) -> float:
        return self.preparing + self.training + self.measuring


@dataclass(frozen=True)
class Estimate:
    """The whole. `memory`: bytes in the host's memory at most, the weights that are mapped among them; 0: the system does not say."""

    stages: tuple[StageEstimate, ...]
    loading: float  # seconds: model and books
    report: float
    memory: int

    @property
    def seconds(self) -> float:
        """At most: an objective that stops early takes less."""
        return self.loading + self.report + sum(stage.seconds for stage in self.stages)

    @property
    def disk(self) -> int:
        """Bytes in the run folder at most, but for the checkpoint."""
        return sum(stage.disk for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes."""
        return {**asdict(self), "seconds": self.seconds, "disk": self.disk}


def estimate(options: TrainOptions, *, tools: Optional[Tools] = None, watcher: Watcher = Watcher()) -> Estimate:
    """Loads the model, prepares a few sequences, does a few steps and a measurement; writes nothing that stays.

    Raises:
        IndexMemError: as `train` before its first step.
    """
    options = options.checked()
    tools = tools or default_tools(options)
    begun = time.monotonic()
    with opened(options, tools, watcher) as setup, tempfile.TemporaryDirectory(prefix="indexmem-") as folder:
        loading = time.monotonic() - begun
        stages, recall = [], _recall(setup, tools)
        for number, name in enumerate(options.objective):
            objective = make_objective(tools.objectives[name], setup.decoder, setup.parts, options, options.length_of(number))
            chooses = not trains_memory(tools.objectives[name])
            stages.append(_stage(setup, options, objective, number, Path(folder), recall if chooses else None))
        report = _REPORT * recall * options.eval_samples if tools.report is not None and recall is not None else 0.0
        return Estimate(tuple(stages), loading, report, peak_memory())


def _recall(setup: Setup, tools: Tools) -> Optional[float]:
    """Seconds of a measurement on one held-out sequence; None where there is none."""
    evaluate = tools.evaluate
    if evaluate is None:
        return None
    with torch.no_grad():
        return _seconds(lambda: evaluate(setup.decoder, setup.parts.indexer, setup.data.held_out()[:1]))


def _stage(
    setup: Setup, options: TrainOptions, objective: Objective, number: int, folder: Path, recall: Optional[float]
) -> StageEstimate:
    """`recall`: seconds of measuring it on one sequence; None if nothing is measured."""
    steps, world, data = options.steps_of(number), setup.processes.world, setup.data
    pool = data.pool(options.batch, setup.processes.rank, world, steps, number)
    own = folder / str(number)

    first = next((i for i, sample in enumerate(pool) if objective.teaches(sample)), 0)
    few = [pool[(first + i) % len(pool)] for i in range(min(1 + _SEQUENCES, len(pool)))]

    def prepare(n: int) -> float:
        return _seconds(lambda: objective.prepare(few[:n], own, lambda *_: None))

    preparing, n = prepare(1), min(_SEQUENCES, len(pool) - 1)
    if n:  # the first one takes longer
        preparing = prepare(1 + n) / n
    kept = _size(own) // (1 + n)
    samples = data.batch(0, options.batch, setup.processes.rank, world, steps, number)
    with _gradients(setup.parts, objective):
        objective.backward(samples, 0, options.seed)
        training = _seconds(lambda: [objective.backward(samples, step, options.seed) for step in range(_STEPS)]) / _STEPS
    measuring = 0.0
    if recall is not None:
        some = sorted(data.held_out(), key=objective.teaches)[-1:]
        once, again = (_seconds(lambda: objective.held_out_loss(some)) for _ in range(2))
        measurements = 1 + (-(-steps // options.eval_every) if options.eval_every else 1)
        measuring = options.eval_samples * (max(once - again, 0) + measurements * (recall + again))
    return StageEstimate(
        objective.name, len(pool), steps, preparing * len(pool), training * steps, measuring,
        (_size(own) - kept * (1 + n)) * options.eval_samples + kept * len(pool) * world,
    )  # fmt: skip


@contextmanager
def _gradients(parts: Parts, objective: Objective) -> Iterator[None]:
    """Only in what the objective trains, as in the loop; none are left."""
    for part in (parts.indexer, parts.memory):
        if part is not None:
            part.requires_grad_(part is objective.modules)
    yield
    objective.modules.zero_grad(set_to_none=True)


def _size(folder: Path) -> int:
    """Bytes of the files of a folder; 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun
