"""Does a bounded cache still know? RULER questions asked after the context was compressed, and likelihood of text.

Every run is a fresh context: the context is evaluated with the cache bounded (physical eviction, the question unseen),
then the question, then the true answer is scored by likelihood, the state put back, and the answer generated greedily. With
and without a latent memory the budget is the same: the memory's slots are part of it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from indexmem_edge._parts import MEMORY_OFF

from . import effect, ruler
from .arms import FULL_ARM, Arm, Sidecars, arms, setup_for
from .machine import describe, rss_bytes
from .report import Report, Row
from .runner import BenchError, Model, Setup, System, library
from .stats import tps
from .summary import summarise, verdicts

FULL = "full"
BOOK = "book"  # the task name of held-out text
BOOK_SCORED = 512  # tokens scored after each window
ABLE = 0.6  # score of the full cache from which a task is judged


@dataclass(frozen=True)
class Job:
    task: str
    length: int
    policy: str
    ratio: float  # of the context's tokens; 1 for the full cache
    sample: int
    memory: str = MEMORY_OFF

    @property
    def key(self) -> str:
        memory = "" if self.memory == MEMORY_OFF else f"/{self.memory}"  # rows of earlier versions had none
        return f"{self.task}/{self.length}/{self.policy}/{self.ratio:g}/{self.sample}{memory}"

    @property
    def arm(self) -> Arm:
        return Arm(self.policy, self.ratio, self.memory)


@dataclass(frozen=True)
class Plan:
    data: Path
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    policies: tuple[str, ...]  # without the full cache, which always runs
    ratios: tuple[float, ...]
    samples: int
    base: Setup
    all_tasks: bool = False
    book: Path | None = None
    book_windows: int = 0
    memories: tuple[str, ...] = (MEMORY_OFF,)
    sidecars: Sidecars = field(default_factory=Sidecars)
    made: str = ""  # names the samples if they were made here: a log does not mix them with others

    def jobs(self, tasks_of: dict[int, list[str]], arms: list[Arm]) -> Iterator[Job]:
        """Sample by sample, every arm on the same sample: whatever is finished can be compared."""
        for sample in range(max(self.samples, self.book_windows)):
            for length in self.lengths:
                names = list(tasks_of[length]) if sample < self.samples else []
                for task in names + ([BOOK] if sample < self.book_windows else []):
                    for arm in arms:
                        yield Job(task, length, arm.policy, arm.ratio, sample, arm.memory)

    def bounded(self) -> list[Arm]:
        return arms(self.policies, self.ratios, self.memories, self.sidecars)

    def setup(self, job: Job, context_tokens: int, more_tokens: int) -> Setup:
        return setup_for(self.base, job.arm, self.sidecars, context_tokens, more_tokens)


def split_tokens(model: Model, before: str, after: str) -> tuple[list[int], list[int]]:
    """Tokens of the whole text, cut where `before` ends; a token across the cut goes to the second part."""
    whole, part = model.tokens(before + after, bos=True), model.tokens(before, bos=True)
    cut = next((i for i, (a, b) in enumerate(zip(whole, part)) if a != b), min(len(part), len(whole) - 1))
    return whole[:cut], whole[cut:]


def run_sample(model: Model, plan: Plan, job: Job, sample: ruler.Sample) -> Row:
    context, question = split_tokens(model, sample.context, sample.question)
    answer = split_tokens(model, sample.context + sample.question, sample.answer)[1]
    setup = plan.setup(job, len(context), len(question) + max(len(answer), sample.n_generate) + 1)
    with System(model, setup) as system:
        times = system.feed(context)
        system.feed(question, last_logits=True)
        asked = system.seen
        state = None if not setup.budget else system.save()
        logits = system.logits
        nll = float(system.nll(answer).mean())
        if state:
            system.restore(state)
        else:
            system.rollback(asked)
            system.logits = logits
        out: list[int] = []
        start = time.perf_counter()
        while len(out) < sample.n_generate and not model.is_end(token := system.greedy()):
            out.append(token)
            if ruler.score(model.text(out), sample.outputs) == 1:
                break  # more text cannot raise the score
            if len(out) < sample.n_generate:
                system.step(token)
        text = model.text(out)
        return _row(
            job,
            system,
            score=ruler.score(text, sample.outputs),
            nll=nll,
            text=text,
            prefill_tps=tps(times),
            decode_tps=len(out) / (time.perf_counter() - start) if len(out) > 8 else None,
        )


def run_book(model: Model, plan: Plan, job: Job, tokens: list[int]) -> Row:
    """Likelihood of the tokens that follow `length` tokens of a book, 128 at a time."""
    context, scored = tokens[:-BOOK_SCORED], tokens[-BOOK_SCORED:]
    with System(model, plan.setup(job, len(context), BOOK_SCORED)) as system:
        times = system.feed(context, last_logits=True)
        nll = float(system.nll(scored).mean())
        return _row(job, system, score=None, nll=nll, prefill_tps=tps(times), decode_tps=None)


def _row(job: Job, system: System, **values: Any) -> Row:
    setup = system.setup
    return {
        **asdict(job),
        "threads": setup.threads,
        "budget": setup.budget,
        "window": setup.window if setup.budget else None,
        "memory_slots": setup.memory_slots,
        "tokens_seen": system.seen,
        **system.byte_counts(),
        "rss_bytes": rss_bytes(),
        **values,
    }


class Log:
    """Finished rows on disk, so that a run can be cut off and go on. Rows of other settings are left alone and not read.

    The settings of a row are those of the run and, where one is used, the sidecar.
    """

    def __init__(self, path: Path, settings: str, sidecars: Sidecars | None = None):
        self.path, self.settings, self.sidecars = path, settings, sidecars or Sidecars()
        self.rows: dict[str, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):
            with path.open("a") as file:
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

    def add(self, job: Job, row: Row) -> None:
        settings = self._settings(job.policy, job.memory)
        row = {"key": job.key, "settings": settings, "policy": job.policy, "memory": job.memory, **row}
        self.rows[job.key] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Runner:
    def __init__(self, model: Model, plan: Plan, log: Log, seed: int = 0):
        self.model, self.plan, self.log = model, plan, log
        self.samples: dict[tuple[str, int], list[ruler.Sample]] = {}
        self.book = self._book_windows(seed) if plan.book_windows else {}

    def _book_windows(self, seed: int) -> dict[int, list[list[int]]]:
        """Windows at places drawn from the seed, the same for every policy; the shorter lengths end where the longest ends."""
        assert self.plan.book
        tokens, size = (
            self.model.tokens(self.plan.book.read_text(encoding="utf-8", errors="replace")),
            max(self.plan.lengths) + BOOK_SCORED,
        )
        if len(tokens) < size:
            raise BenchError(f"{self.plan.book.name} has {len(tokens)} tokens; {size} are needed")
        rng, bos = random.Random(seed), self.model.tokens("", bos=True)
        ends = [rng.randint(size, len(tokens)) for _ in range(self.plan.book_windows)]
        return {
            length: [bos + tokens[end - length - BOOK_SCORED : end] for end in ends] for length in self.plan.lengths
        }

    def sample(self, job: Job) -> ruler.Sample | None:
        where = job.task, job.length
        if where not in self.samples:
            self.samples[where] = ruler.load(self.plan.data, job.length, job.task, self.plan.samples)
        return self.samples[where][job.sample] if job.sample < len(self.samples[where]) else None

    def run(self, jobs: list[Job], progress: Progress | None = None, title: str = "") -> Iterator[Job]:
        """Runs what is not in the log yet; yields after every job."""
        todo = [job for job in jobs if job.key not in self.log.rows]
        task = progress.add_task(title, total=len(jobs), completed=len(jobs) - len(todo)) if progress else None
        for job in todo:
            if job.task == BOOK:
                self.log.add(job, run_book(self.model, self.plan, job, self.book[job.length][job.sample]))
            elif sample := self.sample(job):
                self.log.add(job, run_sample(self.model, self.plan, job, sample))
            if progress and task is not None:
                progress.update(task, advance=1, description=f"{title} {job.key}")
            yield job

    def able(self) -> dict[int, list[str]]:
        """Tasks that the full cache can do, by length."""
        out: dict[int, list[str]] = {}
        for length in self.plan.lengths:
            scores: dict[str, list[float]] = {task: [] for task in self.plan.tasks}
            for row in self.log.rows.values():
                if row["length"] == length and row["policy"] == FULL and row["task"] in scores:
                    scores[row["task"]].append(row["score"])
            out[length] = [task for task, values in scores.items() if values and np.mean(values) >= ABLE]
        return out


def run_quality(
    model: Model, plan: Plan, out: Path, seed: int = 0, full_only: bool = False, progress: Progress | None = None
) -> Report:
    """The full cache on every task first, then the policies on the tasks that it can do."""
    base = plan.base
    settings = f"{model.path.name} {model.path.stat().st_size} {base.cache_type} ubatch {base.ubatch} sinks {base.sinks} window {base.window} seed {base.seed}"
    if base.ratio:
        settings += f" at most {base.ratio:g} of the tokens seen"
    if plan.made:
        settings += f" samples {plan.made}"
    bounded = [] if full_only else plan.bounded()
    runner = Runner(model, plan, Log(out / "quality.rows.jsonl", settings, plan.sidecars), seed)
    how = (
        f"raw prompt; context evaluated with the cache at its budget (ubatches of {base.ubatch}), then question and answer prefix; true answer scored "
        f"teacher-forced, then greedy; score: share of expected strings found; mean: over tasks where the full cache has at least {ABLE}; "
        "intervals: paired bootstrap over samples, 95 %; book: 512 tokens after each window, 128 at a time"
    )
    report = Report(
        "quality",
        describe(
            model.path.name,
            library(),
            base.threads,
            how=how,
            settings=settings,
            sinks=base.sinks,
            window=f"min({base.window}, budget / 4)",
            samples=plan.samples,
            seed=seed,
            data=plan.data.name,
            memories=list(plan.memories),
            memory_slots="min(64 or as asked, budget / 4 in whole eights), part of the budget",
            sidecars=plan.sidecars.describe() or None,
            budget_ratio=base.ratio or None,
            text=plan.book.name if plan.book else None,
        ),
    )
    tasks: dict[int, list[str]] = {length: list(plan.tasks) for length in plan.lengths}
    jobs = list(plan.jobs(tasks, [FULL_ARM]))

    def update() -> None:
        able, keys = runner.able(), {job.key for job in jobs}
        report.meta["judged_tasks"] = {str(length): names for length, names in able.items()}
        rows = [row for key, row in runner.log.rows.items() if key in keys]
        report.rows = summarise(rows, able)
        report.verdicts = verdicts(report.rows, able)
        if changed := effect.differences(rows, able):
            report.extra["differences"] = changed
            report.meta["differences"] = effect.HOW
        report.save(out)

    def run(todo: list[Job], title: str) -> None:
        saved = time.monotonic()
        for _ in runner.run(todo, progress, title):
            if time.monotonic() - saved > 30:
                update()
                saved = time.monotonic()

    try:
        run(jobs, "full")
        if not full_only:
            more = list(plan.jobs(tasks if plan.all_tasks else runner.able(), bounded))
            jobs += more
            run(more, "policies")
    finally:
        update()
    return report
