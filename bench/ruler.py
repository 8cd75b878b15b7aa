"""RULER samples: reading, cutting the question off the context, scoring."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# tokens to generate, by the beginning of the task's name
GENERATE = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}


@dataclass(frozen=True)
class Sample:
    task: str
    index: int
    context: str
    question: str  # with the beginning of the answer
    outputs: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The expected strings as the task prints them (see its worked examples)."""
        kind = self.task.split("_")[0]
        if kind == "cwe":
            return "".join(f" {i}. {word}" for i, word in enumerate(self.outputs, 1))
        return " " + (" " if kind == "vt" else ", ").join(self.outputs)

    @property
    def n_generate(self) -> int:
        return GENERATE.get(self.task.split("_")[0], 128)


def split_question(text: str) -> tuple[str, str]:
    """Context and question: the question is the last line."""
    cut = text.rstrip("\n").rfind("\n") + 1
    return text[:cut], text[cut:]


def score(continuation: str, outputs: Sequence[str]) -> float:
    """Share of the expected strings that occur, ignoring case."""
    text = continuation.lower()
    return sum(word.lower() in text for word in outputs) / len(outputs)


def tasks(data: Path, length: int) -> list[str]:
    return sorted(path.name.removesuffix(".jsonl.gz") for path in (data / str(length)).glob("*.jsonl.gz"))


def load(data: Path, length: int, task: str, n: int) -> list[Sample]:
    """The first `n` samples of a task."""
    samples = []
    with gzip.open(data / str(length) / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for index, line in zip(range(n), lines):
            row = json.loads(line)
            context, question = split_question(row["input"])
            samples.append(Sample(task, index, context, question + row["answer_prefix"], tuple(row["outputs"])))
    return samples
