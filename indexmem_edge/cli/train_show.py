"""What `indexmem train` shows: bars while it goes on, a table at its end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Optional

from ..train.options import TrainOptions
from ..train.watch import Watcher
from .console import console, progress, shows_bars
from .terminal import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..train.estimate import Estimate
    from ..train.run import TrainResult


@contextlib.contextmanager
def watching(wanted: bool) -> Iterator[Watcher]:
    """Bars on standard error for a person at a terminal, a line now and then for a log file; nothing if not wanted."""
    if not wanted:
        yield Watcher()
    elif not shows_bars(console(error=True)):
        yield Lines()
    else:
        with progress(True, figures=True) as bars:
            yield Bars(bars)


class Lines(Watcher):
    """For a log: beginnings, evaluations and notes."""

    def __init__(self) -> None:
        self._name, self._steps, self._loss = "", 0, ""
        self._work: set[str] = set()  # that was told of this objective

    def note(self, text: str) -> None:
        self.say(f"note: {text}")

    def stage(self, objective: str, steps: int, done: int) -> None:
        self._name, self._steps, self._loss = objective, steps, ""
        self._work.clear()
        self.say(f"{objective}: {f'after {done} of ' if done else ''}{steps} steps")

    def work(self, done: int, total: int, what: str) -> None:
        if what not in self._work:
            self._work.add(what)
            self.say(f"{what} ...")

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        self._loss = f"loss {figures['loss']:.4g}, "

    def evaluated(self, step: int, recall: float, best: bool) -> None:
        self.say(
            f"{self._name}: step {step} of {self._steps}, {self._loss}recall {recall:.4f}{', the best so far' if best else ''}"
        )

    def say(self, text: str) -> None:
        """One line."""
        print(printable(text), file=sys.stderr, flush=True)


class Bars(Lines):
    """For a person: a bar of the steps, one of what has to be done beside them, and the lines above."""

    def __init__(self, bars: Progress) -> None:
        super().__init__()
        self._bars = bars
        self._steps_bar: Optional[TaskID] = None
        self._work_bar: Optional[TaskID] = None

    def stage(self, objective: str, steps: int, done: int) -> None:
        super().stage(objective, steps, done)
        if self._steps_bar is not None:
            self._bars.remove_task(self._steps_bar)
        self._steps_bar = self._bars.add_task(objective, total=steps, completed=done, figures="")

    def work(self, done: int, total: int, what: str) -> None:
        if self._work_bar is None:
            self._work_bar = self._bars.add_task(what, figures="")
        self._bars.update(self._work_bar, description=what, completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._work_bar)
            self._work_bar = None

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        super().step(step, figures)
        if self._steps_bar is not None:
            told = f"loss {figures['loss']:.4g}, {figures['tokens_per_second']:,.0f} tokens/s"
            self._bars.update(self._steps_bar, completed=step, figures=told)

    def say(self, text: str) -> None:
        self._bars.console.print(printable(text), markup=False)


def show(result: TrainResult, options: TrainOptions) -> None:
    """What was trained and how well, where it is, and how to use it."""
    from rich import box
    from rich.table import Table

    out = console()
    table = Table(title="Training", title_justify="left", title_style="bold", box=box.SIMPLE)
    for name in ("objective", "steps", "loss", "held-out recall", "of step"):
        table.add_column(name, justify="left" if name == "objective" else "right")
    for stage in result.stages:
        early = f"{stage['done']:,}" + (f" of {stage['steps']:,}" if stage["done"] < stage["steps"] else "")
        table.add_row(stage["objective"], early, _number(stage["loss"]), _number(stage.get("recall")), _count(stage))
    out.print(table)
    if result.recall is not None:
        out.print(
            f"held-out recall {_number(result.recall_before)} before, {_number(result.recall)} after: of the attention "
            "that the best choice of entries keeps, this share"
        )
    out.print(f"{result.tokens:,} tokens in {result.seconds:,.0f} s of steps")
    for what, path in (*(("report", path) for path in result.reports), ("run", result.run)):
        out.print(f"{what}: {printable(path)}", markup=False)
    out.print(f"{printable(result.path)}: {result.bytes:,} bytes", markup=False)
    out.print(
        f"indexmem chat -m {printable(str(options.model))} --indexmem {printable(result.path)}", markup=False
    )


def show_estimate(found: Estimate, options: TrainOptions) -> None:
    """What a training would take."""
    from rich import box
    from rich.table import Table

    out = console()
    table = Table(title="Estimate", title_justify="left", title_style="bold", box=box.SIMPLE)
    for name in ("objective", "sequences", "preparing", "steps", "training", "measuring", "disk"):
        table.add_column(name, justify="left" if name == "objective" else "right")
    for stage in found.stages:
        seconds = (_duration(s) for s in (stage.preparing, stage.training, stage.measuring))
        preparing, training, measuring = seconds
        table.add_row(
            stage.objective, f"{stage.sequences:,}", preparing, f"{stage.steps:,}", training, measuring, _size(stage.disk)
        )
    out.print(table)
    memory = f"{_size(found.memory)} of memory" if found.memory else "memory unknown"
    out.print(f"{_duration(found.seconds)} at most, {memory}, {_size(found.disk)} of disk in {printable(str(options.run))}", markup=False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(n: int) -> str:
    return f"{n / (1 << 30):.2f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.0f} MiB"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _count(stage: Mapping[str, Any]) -> str:
    return f"{stage['best_step']:,}" if "best_step" in stage else "-"
