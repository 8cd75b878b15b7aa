"""Files of samples: reading, writing, cutting the question off the context, scoring."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

# tokens to generate, by the beginning of the task's name
GENERATE = {"niah": 128, "needle": 32, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
SUFFIX = ".jsonl.gz"


def n_generate(task: str) -> int:
    return GENERATE.get(task.split("_")[0], 128)


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
        return " " + (" " if kind == "vt" else ", ").join(self.said)

    @property
    def said(self) -> tuple[str, ...]:
        """The expected strings that the answer has: all, or of a question's answers, which are all right, the first."""
        return self.outputs[:1] if self.task.startswith("qa") else self.outputs

    @property
    def n_generate(self) -> int:
        return n_generate(self.task)

    def score(self, text: str) -> float:
        """Share of the expected strings; of a question's answers, which are all right, one is enough."""
        if self.task.startswith("qa"):
            return max(score(text, [answer]) for answer in self.outputs)
        return score(text, self.outputs)

    def settled(self, text: str) -> bool:
        """Whether more text cannot raise the score: all that is expected was found."""
        return self.score(text) == 1


def split_question(text: str) -> tuple[str, str]:
    """Context and question: the question is the last line."""
    cut = text.rstrip("\n").rfind("\n") + 1
    return text[:cut], text[cut:]


def score(continuation: str, outputs: Sequence[str]) -> float:
    """Share of the expected strings that occur, ignoring case."""
    text = continuation.lower()
    return sum(word.lower() in text for word in outputs) / len(outputs)


def path_of(data: Path, length: int, task: str) -> Path:
    return data / str(length) / f"{task}{SUFFIX}"


def tasks(data: Path, length: int) -> list[str]:
    return sorted(path.name.removesuffix(SUFFIX) for path in (data / str(length)).glob(f"*{SUFFIX}"))


def rows(data: Path, length: int, task: str, n: int | None = None) -> list[dict[str, Any]]:
    """The first `n` rows of a file, or all of them."""
    with gzip.open(path_of(data, length, task), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, n)]


def sample_of(task: str, index: int, row: dict[str, Any]) -> Sample:
    context, question = split_question(row["input"])
    return Sample(task, index, context, question + row["answer_prefix"], tuple(row["outputs"]))


def load(data: Path, length: int, task: str, n: int) -> list[Sample]:
    """The first `n` samples of a task."""
    return [sample_of(task, index, row) for index, row in enumerate(rows(data, length, task, n))]


def write(data: Path, length: int, task: str, content: Sequence[dict[str, Any]]) -> Path:
    """Writes a file of samples, whole or not at all; the same samples give the same bytes.

    Raises:
        OSError: the folder cannot be written.
    """
    path = path_of(data, length, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as file:  # neither name nor time: they would differ
        file.write(text.encode())
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_bytes(packed.getvalue())
    draft.replace(path)
    return path
