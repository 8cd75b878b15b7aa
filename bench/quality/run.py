"""Does a bounded cache still know? RULER questions asked after the context was compressed, and likelihood of text.

Runs go in rounds: sample 0 of every task with every arm, then sample 1, and so on. Wherever a run is cut off, all arms have
finished the same samples but for those of the last round, and only samples that all of them finished are judged.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.progress import Progress

from indexmem_edge.runtime.choice import MEMORY_OFF

from ..machine import describe
from ..report import Report, Row
from ..runner import BenchError, Model, library
from ..text import read_text
from . import byte_budget, effect, standing as standings
from .arms import FULL_ARM, Sidecars
from .balance import balanced
from .byte_budget import Budgets, DoesNotFit
from .plan import Job, Plan, Sample
from .recall import recalled
from .summary import BOOK, summarise
from .trial import AGREED, BOOK_SCORED, run_book, run_sample

SAVE_SECONDS = 30  # a report is written as often


class Logged(Protocol):
    """What a log has to know of a job."""

    @property
    def key(self) -> str: ...

    @property
    def policy(self) -> str: ...

    @property
    def memory(self) -> str: ...


class Log:
    """Finished rows on disk, so that a run can be cut off and go on. Rows of other settings are left alone and not read.

    The settings of a row are those of the run and, where one is used, the sidecar.
    """

    def __init__(self, path: Path, settings: str, sidecars: Sidecars | None = None):
        self.path, self.settings, self.sidecars = path, settings, sidecars or Sidecars()
        self.rows: dict[str, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off while it was written
            if row.get("settings") == self._settings(row.get("policy", ""), row.get("memory", MEMORY_OFF)):
                self.rows[row["key"]] = row

    def _settings(self, policy: str, memory: str) -> str:
        sidecar = self.sidecars.of(policy, memory)
        return f"{self.settings} sidecar {sidecar.identity}" if sidecar else self.settings

    def add(self, job: Logged, row: Row) -> None:
        settings = self._settings(job.policy, job.memory)
        row = {"key": job.key, "settings": settings, "policy": job.policy, "memory": job.memory, **row}
        self.rows[job.key] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Runner:
    """Runs what is not in the log yet, until all is done or `seconds` are over."""

    def __init__(self, model: Model, plan: Plan, log: Log, seed: int = 0, seconds: float | None = None):
        self.model, self.plan, self.log = model, plan, log
        self.budgets = Budgets(model, plan.base, plan.sidecars, plan.budget_in)
        self.others = plan.others()
        self.tasks = {length: list(plan.tasks) for length in plan.lengths}
        self.planned = {job.key for job in plan.jobs(self.tasks, [FULL_ARM, *self.others])}
        self.samples: dict[tuple[str, int], Sequence[Sample]] = {}
        self.book = self._book_windows(seed) if plan.book_windows else {}
        self._forget_others()
        self.marked: dict[tuple[int, int], np.ndarray] = {}  # of a window: which scored tokens are recalled
        self.deadline = time.monotonic() + seconds if seconds else None
        self.cut = False  # the time was over before the work

    def _book_windows(self, seed: int) -> dict[int, list[list[int]]]:
        """Windows at places drawn from the seed, the same for every policy; the shorter lengths end where the longest ends."""
        assert self.plan.book
        tokens, size = (
            self.model.tokens(read_text(self.plan.book)),
            max(self.plan.lengths) + BOOK_SCORED,
        )
        if len(tokens) < size:
            raise BenchError(f"{self.plan.book.name} has {len(tokens)} tokens; {size} are needed")
        rng, bos = random.Random(seed), self.model.tokens("", bos=True)
        ends = [rng.randint(size, len(tokens)) for _ in range(self.plan.book_windows)]
        return {
            length: [bos + tokens[end - length - BOOK_SCORED : end] for end in ends] for length in self.plan.lengths
        }

    def _forget_others(self) -> None:
        """Rows of other text under the same name: another folder of samples, or another book."""
        for key, row in list(self.log.rows.items()):
            if key in self.planned and row.get("read") != self._identity(row["task"], row["length"], row["sample"]):
                del self.log.rows[key]

    def _identity(self, task: str, length: int, sample: int) -> str | None:
        """The same for the same text; None if there is none."""
        if task == BOOK:
            return _digest(self.book[length][sample])
        found = self.sample(task, length, sample)
        return _digest((found.context, found.question, found.answer)) if found else None

    def sample(self, task: str, length: int, sample: int) -> Sample | None:
        where = task, length
        if where not in self.samples:
            self.samples[where] = self.plan.load(self.plan.data, length, task, self.plan.samples)
        return self.samples[where][sample] if sample < len(self.samples[where]) else None

    def run(self, progress: Progress | None = None) -> Iterator[Job]:
        """Yields after every job. The full cache goes first in each round: it decides which tasks the others run on. A task
        that it turns out to be able to do later than in the first round catches up.
        """
        bar = progress.add_task("quality") if progress else None
        for n in range(self.plan.rounds):
            for what in ("full", "arms"):
                tasks, arms, samples = (
                    (self.tasks, [FULL_ARM], [n]) if what == "full" else (self.able(), self.others, range(n + 1))
                )
                for job in self._run(self.plan.jobs(tasks, arms, samples)):
                    if progress and bar is not None:
                        done = sum(key in self.planned for key in self.log.rows)
                        progress.update(bar, total=max(self._total(), done), completed=done, description=job.key)
                    yield job
                if self.cut:
                    return

    def _run(self, jobs: Iterable[Job]) -> Iterator[Job]:
        for job in jobs:
            if job.key in self.log.rows:
                continue
            if self.deadline and time.monotonic() >= self.deadline:
                self.cut = True
                return
            try:
                row = self._trial(job)
            except DoesNotFit as error:
                row = {**job.arm._asdict(), "task": job.task, "length": job.length, "sample": job.sample}
                row["left_out"] = str(error)
            if row:
                self.log.add(job, {**row, "read": self._identity(job.task, job.length, job.sample)})
                yield job

    def _trial(self, job: Job) -> Row | None:
        """None if there is no such sample."""
        if job.task == BOOK:
            where = job.length, job.sample
            window = self.book[job.length][job.sample]
            if where not in self.marked:
                pieces = [self.model.piece(token) for token in window]
                self.marked[where] = recalled(pieces, len(window) - BOOK_SCORED)
            return run_book(self.model, self.budgets, job, window, self.marked[where])
        sample = self.sample(job.task, job.length, job.sample)
        if not sample:
            return None
        full = Job(job.task, job.length, FULL_ARM.policy, FULL_ARM.ratio, job.sample)
        reference = None if job.arm == FULL_ARM else self.log.rows[full.key]["tokens"]
        return run_sample(self.model, self.budgets, job, sample, reference)

    def _total(self) -> int:
        """Jobs in all, if the tasks that the full cache can do stay the same."""
        jobs = [(self.tasks, [FULL_ARM]), (self.able(), self.others)]
        return sum(sum(1 for _ in self.plan.jobs(tasks, arms)) for tasks, arms in jobs)

    def rows(self) -> list[Row]:
        """Of this plan: the log may hold rows of others."""
        return [row for key, row in self.log.rows.items() if key in self.planned]

    def able(self, judged: bool = False) -> dict[int, list[str]]:
        """Tasks that all arms run on, by length: those that the full cache can do, or all. `judged`: the first in any case."""
        if self.plan.all_tasks and not judged:
            return self.tasks
        scores: dict[tuple[int, str], list[float]] = {}
        for row in self.rows():
            if (row["policy"], row["cache_type"]) == (FULL_ARM.policy, FULL_ARM.cache_type) and row["task"] != BOOK:
                scores.setdefault((row["length"], row["task"]), []).append(row["score"])
        return {
            length: [t for t in self.plan.tasks if (of := scores.get((length, t))) and np.mean(of) >= self.plan.able]
            for length in self.plan.lengths
        }


def _digest(text: Any) -> str:
    return hashlib.sha256(repr(text).encode()).hexdigest()[:12]


def run_quality(
    model: Model,
    plan: Plan,
    out: Path,
    seed: int = 0,
    seconds: float | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """All that is planned, or what `seconds` allow. `weights`: as what those of the model were written out, for the report."""
    base = plan.base
    settings = (
        f"{model.path.name} {model.identity} {base.cache_type} ubatch {base.ubatch} sinks {base.sinks} "
        f"window {base.window} seed {base.seed} budgets in {plan.budget_in}"
    )
    if base.budget_ratio:
        settings += f" at most {base.budget_ratio:g} of the tokens seen"
    if plan.made:
        settings += f" samples {plan.made}"
    runner = Runner(model, plan, Log(out / f"{plan.name}.rows.jsonl", settings, plan.sidecars), seed, seconds)
    how = (
        f"{plan.scored}; context evaluated with the cache at its budget (ubatches of {base.ubatch}), then question and "
        "answer prefix; true answer scored teacher-forced, then greedy; judged: "
        f"tasks where the full cache has at least {plan.able:g}, on samples that all arms finished; agreement over at most "
        f"{AGREED} tokens; book: {BOOK_SCORED} tokens after each window, 128 at a time; {byte_budget.HOW[plan.budget_in]}"
    )
    report = Report(
        plan.name,
        describe(
            model.path.name,
            library(),
            base.threads,
            how=how,
            intervals=standings.HOW,
            settings=settings,
            weights=weights or "as in the file",
            budget_in=plan.budget_in,
            sinks=base.sinks,
            window=base.window_says,
            samples=plan.samples,
            seed=seed,
            data=plan.data.name,
            memories=list(plan.memories),
            memory_slots="min(64 or as asked, budget / 4 in whole eights), part of the budget",
            cache_types=list(plan.cache_types),
            sidecars=plan.sidecars.describe() or None,
            budget_ratio=base.budget_ratio,
            text=plan.book.name if plan.book else None,
        ),
    )

    def update() -> None:
        able = runner.able(judged=True)
        found = balanced(runner.rows(), [FULL_ARM, *runner.others], runner.able())
        placed = standings.standing(found.rows, able)
        report.meta |= {
            "judged_tasks": {str(length): names for length, names in able.items()},
            "finished_samples": {str(length): counts for length, counts in found.samples.items()},
            "cut_off": f"after {seconds:g} seconds" if runner.cut else None,
        }
        report.rows = summarise(found.rows, able)
        report.extra = {"standing": placed.rows, "versus": placed.versus}
        if found.left_out:
            report.extra["left_out"] = found.left_out
        report.verdicts = standings.verdicts(placed, able, plan.budget_in)
        if changed := effect.differences(found.rows, able):
            report.extra["differences"] = changed
            report.meta["differences"] = effect.HOW
        report.save(out)

    saved = time.monotonic()
    try:
        for _ in runner.run(progress):
            if time.monotonic() - saved > SAVE_SECONDS:
                update()
                saved = time.monotonic()
    finally:
        update()
    return report
