"""What is a conversation far past the trained length worth? Likelihood, facts and talk, with and without a span, and of a shift.

A unit is one arm with one budget on one sample of one part, read in one pass that serves all of its measuring points. Units go
in rounds: every arm on sample 0, then on sample 1. Each is written down when it is done; the same command goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.progress import Progress

from indexmem_edge.native.memory import resident_memory
from indexmem_edge.runtime.choice import MEMORY_OFF

from ..machine import describe
from ..quality.arms import Sidecars
from ..quality.run import Log
from ..report import Report, Row
from ..runner import BenchError, Model, Setup, System, library
from . import (
    cost as endless_cost,
    facts as endless_facts,
    far as endless_far,
    summary as endless_summary,
    talk as endless_talk,
)
from .arms import SHIFT, EndlessArm, counts, open_system, setup_of
from .reading import Books

NLL, FACTS, TALK, COST, FAR = PARTS = ("nll", "facts", "talk", "cost", "far")
T = TypeVar("T")  # what is made once a sample: a story, a script
FINE = 1024  # tokens of a point of the fine curve
HOW = (
    "nll: book text, 128 tokens at a time, mean over windows (--per); delta: minus the shift's on the same tokens; facts: "
    "sentences of our own, told once between sentences of the text, asked from a copy of the state that is put back; found: a "
    "greedy answer has the value (95 % interval by Wilson); nll of the value, teacher-forced (95 % by bootstrap over facts); "
    "talk: the scripted answers, teacher-forced, which stay in the history; shift: the stock f16 cache with as many cells as "
    "the budget, read an eighth of that at a time: when it is full, the sinks stay, the older half of the rest is removed and "
    "the remainder moves up"
)


@dataclass(frozen=True)
class Plan:
    parts: tuple[str, ...]
    budgets: tuple[int, ...]
    arms: tuple[EndlessArm, ...]
    base: Setup
    tokens: int = 262144  # that nll and facts read
    per: int = 16384  # of them in a row of the table
    distances: tuple[int, ...] = (256, 8192, 16384, 32768, 65536)
    fact_first: int = 2000
    fact_every: int = 2500
    turns: int = 200
    turn_tokens: int = 300
    samples: int = 1
    sidecars: Sidecars = field(default_factory=Sidecars)

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise BenchError(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
        if not (self.parts and self.budgets and self.arms) or min(self.budgets) < 64 or self.samples < 1:
            raise BenchError("expected at least one part, arm and sample, and budgets of 64 or more")
        if self.tokens < FINE or self.per < FINE or self.per % FINE:
            raise BenchError(f"--tokens and --per are {FINE} or more, --per a multiple of it: found {self.tokens}, {self.per}")
        if FACTS in self.parts and (
            not self.distances or min(self.distances) < 1 or self.tokens < self.fact_first + min(self.distances) + 100
        ):
            raise BenchError(f"in {self.tokens} tokens no fact can be asked for: choose more, or smaller distances")
        if FAR in self.parts and self.tokens < endless_far.LEAST:
            raise BenchError(f"the part {FAR} reads at least {endless_far.LEAST} tokens, --tokens is {self.tokens}")

    def jobs(self) -> Iterator[Job]:
        for sample in range(self.samples):
            for part in self.parts:
                for budget in self.budgets:
                    for arm in self.arms:
                        if part != COST or (sample == 0 and arm.policy != SHIFT and arm.span != 0):
                            yield Job(part, self.what(part), budget, arm, sample)

    def what(self, part: str) -> str:
        """What a part reads and asks: rows of other settings are not taken for these."""
        if part == FACTS:
            asked = ",".join(map(str, self.distances))
            about = endless_facts.identity()
            return f"{self.tokens} facts {about} every {self.fact_every} from {self.fact_first} asked {asked}"
        return {NLL: str(self.tokens), FAR: str(self.tokens), TALK: f"{self.turns} x {self.turn_tokens}", COST: ""}[part]

    def reads(self) -> int:
        """The longest text that is read at a time."""
        return max(self.tokens, endless_talk.reads(self.turns, self.turn_tokens) if TALK in self.parts else 0)


@dataclass(frozen=True)
class Job:
    part: str
    what: str
    budget: int
    arm: EndlessArm
    sample: int

    @property
    def key(self) -> str:
        return f"{self.part}/{self.what}/{self.budget}/{self.arm.name}/{self.sample}"

    # what a log tells the settings of a row by
    @property
    def policy(self) -> str:
        return self.arm.policy

    @property
    def memory(self) -> str:
        return MEMORY_OFF


class Runner:
    """Runs jobs; stories and scripts are made once a sample."""

    def __init__(self, model: Model, plan: Plan, books: Books, seed: int):
        self.model, self.plan, self.books, self.seed = model, plan, books, seed
        self._made: dict[tuple[str, int], Any] = {}

    def run(self, job: Job, advance: Callable[[float], None]) -> Row:
        """`advance` gets the share of the job that is done."""
        plan = self.plan
        start = time.monotonic()
        if job.part == COST:
            found = self._cost(job, advance)
        elif job.part == FAR:
            found = endless_far.run_far(lambda: self._open(job), self.books.passage(job.sample, plan.tokens), advance)
        else:
            with self._open(job) as system:
                found = {NLL: self._nll, FACTS: self._facts, TALK: self._talk}[job.part](job, system, advance)
        return {
            "part": job.part, "budget": job.budget, "span": job.arm.span_name, "sample": job.sample,
            "seconds": time.monotonic() - start, "rss_bytes": resident_memory(), **found,
        }  # fmt: skip

    def _open(self, job: Job) -> System:
        return open_system(self.model, self.plan.base, job.arm, self.plan.sidecars, job.budget)

    def _nll(self, job: Job, system: System, advance: Callable[[float], None]) -> Row:
        return run_nll(system, self.books.passage(job.sample, self.plan.tokens), advance)

    def _facts(self, job: Job, system: System, advance: Callable[[float], None]) -> Row:
        plan = self.plan
        told = self._of(
            job,
            lambda: endless_facts.story(
                self.books, plan.tokens, plan.fact_first, plan.fact_every, plan.distances, self.seed, job.sample
            ),
        )
        return endless_facts.run_facts(system, told, lambda n: advance(n / len(told.tokens)))

    def _talk(self, job: Job, system: System, advance: Callable[[float], None]) -> Row:
        plan = self.plan
        turns = self._of(
            job, lambda: endless_talk.script(self.books, plan.turns, plan.turn_tokens, self.seed, job.sample)
        )
        return endless_talk.run_talk(system, turns, lambda n: advance(n / len(turns)))

    def _of(self, job: Job, make: Callable[[], T]) -> T:
        key = job.part, job.sample
        if key not in self._made:
            self._made = {old: made for old, made in self._made.items() if old[1] == job.sample}
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def _cost(self, job: Job, advance: Callable[[float], None]) -> Row:
        setup = setup_of(self.plan.base, job.arm, self.plan.sidecars, job.budget)
        corpus = self.books.passage(0, min(self.plan.tokens, len(self.books.tokens)))
        return endless_cost.cost(self.model, setup, corpus, advance)


def run_nll(system: System, text: Sequence[int], advance: Callable[[float], None]) -> Row:
    """Mean NLL of every FINE tokens; without a token that begins a text, the first is not scored."""
    head = system.model.tokens("", bos=True)
    if not head:
        head, text = list(text[:1]), text[1:]
    system.feed(head, last_logits=True)
    began, means = time.monotonic(), []
    for i in range(0, len(text), FINE):
        means.append(float(np.mean(system.nll(text[i : i + FINE]))))
        advance(min((i + FINE) / len(text), 1.0))
    return {"nll": means, "tokens": len(text), "prefill_tps": len(text) / (time.monotonic() - began), **counts(system)}


def run_endless(
    model: Model,
    plan: Plan,
    out: Path,
    texts: Sequence[Path] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Every unit of the plan that is not in the log of an earlier run yet.

    Raises:
        BenchError: a part cannot be had with this model or text.
    """
    books, base = Books(model, texts, seed, plan.reads()), plan.base
    settings = (
        f"{model.path.name} {model.identity} {base.cache_type} ubatch {base.ubatch} sinks {base.sinks} "
        f"window {base.window} seed {seed} text {books.identity}"
    )
    log = Log(out / "endless.rows.jsonl", settings, plan.sidecars)
    report = Report(
        "endless",
        describe(
            model.path.name,
            library(),
            base.threads,
            how=f"{HOW}; {endless_cost.HOW}; {endless_far.HOW}",
            settings=settings,
            sinks=base.sinks,
            window=base.window_says,
            ubatch=base.ubatch,
            samples=plan.samples,
            seed=seed,
            text=books.names,
            text_repeated=books.repeated(plan.reads()),
            trained_length=model.trained_length(),
            sidecars=plan.sidecars.describe() or None,
            parts={part: plan.what(part) for part in plan.parts},
            per=plan.per,
        ),
    )
    jobs, runner = list(plan.jobs()), Runner(model, plan, books, seed)
    todo = [job for job in jobs if job.key not in log.rows]
    bar = progress.add_task("endless", total=len(jobs), completed=len(jobs) - len(todo)) if progress else None

    def update() -> None:
        endless_summary.fill(report, [log.rows[job.key] for job in jobs if job.key in log.rows], plan.per, FINE)
        report.save(out)

    try:
        for i, job in enumerate(todo, len(jobs) - len(todo)):

            def advance(share: float, done: int = i, name: str = f"{job.part} {job.budget} {job.arm.name}") -> None:
                if progress and bar is not None:
                    progress.update(bar, completed=done + share, description=name)

            advance(0.0)
            log.add(job, runner.run(job, advance))
            update()
    finally:
        update()
    if progress and bar is not None:
        progress.update(bar, completed=len(jobs), description="endless")
    return report
