"""What a quality run is made of: which samples, with which arms, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from indexmem_edge.runtime.choice import MEMORY_OFF

from .. import ruler
from ..runner import F16, Setup
from .arms import FULL_ARM, Arm, Sidecars, arms
from .summary import BOOK

ABLE = 0.6  # score of the full cache from which a task of RULER is judged
RAW = "raw prompt; score: share of expected strings found"


class Sample(Protocol):
    """A text, what is asked of it, and what an answer is worth."""

    @property
    def context(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def n_generate(self) -> int: ...

    def score(self, text: str) -> float: ...

    def settled(self, text: str) -> bool: ...


Load = Callable[[Path, int, str, int], Sequence[Sample]]  # folder, length, task, how many


@dataclass(frozen=True)
class Job:
    """One arm on one sample."""

    task: str
    length: int
    policy: str
    ratio: float  # of what the full cache takes for the context; 1 for a full cache
    sample: int
    memory: str = MEMORY_OFF
    cache_type: str = F16

    @property
    def key(self) -> str:
        more = "".join(f"/{v}" for v, usual in ((self.memory, MEMORY_OFF), (self.cache_type, F16)) if v != usual)
        return f"{self.task}/{self.length}/{self.policy}/{self.ratio:g}/{self.sample}{more}"

    @property
    def arm(self) -> Arm:
        return Arm(self.policy, self.ratio, self.memory, self.cache_type)


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
    cache_types: tuple[str, ...] = (F16,)  # of the policies
    full_types: tuple[str, ...] = ()  # of full caches beside that in f16
    budget_in: str = "bytes"
    full_only: bool = False
    made: str = ""  # names the samples if they were made here: a log does not mix them with others
    load: Load = ruler.load
    name: str = "quality"  # of the report
    able: float = ABLE  # score of the full cache from which a task is judged
    scored: str = RAW  # for the report

    @property
    def rounds(self) -> int:
        return max(self.samples, self.book_windows)

    def jobs(
        self, tasks_of: Mapping[int, Sequence[str]], arms: Sequence[Arm], samples: Iterable[int] | None = None
    ) -> Iterator[Job]:
        """Sample by sample, every arm on the same sample: whatever is finished can be compared."""
        for sample in range(self.rounds) if samples is None else samples:
            for length in self.lengths:
                names = list(tasks_of[length]) if sample < self.samples else []
                for task in names + ([BOOK] if sample < self.book_windows else []):
                    for arm in arms:
                        yield Job(task, length, arm.policy, arm.ratio, sample, arm.memory, arm.cache_type)

    def others(self) -> list[Arm]:
        """All but the full cache in f16, which everything is compared with."""
        if self.full_only:
            return []
        return [FULL_ARM._replace(cache_type=name) for name in self.full_types if name != F16] + self.bounded()

    def bounded(self) -> list[Arm]:
        return arms(self.policies, self.ratios, self.memories, self.sidecars, self.cache_types)
