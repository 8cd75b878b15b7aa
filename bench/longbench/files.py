"""The official files of LongBench, and samples made of them.

A folder has, as they are handed out, `<task>.jsonl` (there or in `data/`) with the fields input, context, answers, all_classes,
and `dataset2prompt.json` and `dataset2maxlen.json` (there or in `config/`): the prompt of each task, and how many tokens of an
answer are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..runner import BenchError, Model
from .tasks import Task, is_task, task_of

PROMPTS, LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"
_PLACE = re.compile(r"\{(input|context)\}")
FIELDS = {"input": str, "context": str, "answers": list}


@dataclass(frozen=True)
class Sample:
    """A prompt, cut where its text ends and what is asked of it begins."""

    task: Task
    context: str
    question: str
    outputs: tuple[str, ...]  # each of them is right
    classes: tuple[str, ...]
    n_generate: int

    @property
    def answer(self) -> str:
        return ("" if self.question[-1:].isspace() else " ") + self.outputs[0]

    def score(self, text: str) -> float:
        """That of the expected answer which fits best."""
        text = text.lstrip("\n").split("\n")[0] if self.task.first_line else text
        return max(self.task.score(text, expected, self.classes) for expected in self.outputs)

    def settled(self, text: str) -> bool:
        """Whether more text cannot change the score."""
        return self.task.first_line and "\n" in text.lstrip("\n")


class Folder:
    """A folder with files of LongBench.

    Raises:
        BenchError: there are none, or no prompts beside them.
    """

    def __init__(self, data: Path):
        self.data = data
        where = data / "data" if (data / "data").is_dir() else data
        self.files = {path.stem: path for path in sorted(where.glob("*.jsonl")) if is_task(path.stem)}
        if not self.files:
            raise BenchError(f"no file of LongBench in {where}: expected names such as hotpotqa.jsonl")
        self._prompts: dict[str, str] = self._config(PROMPTS, str)
        self._maxlen: dict[str, int] = self._config(LENGTHS, int)

    @property
    def identity(self) -> str:
        """Stands for the files: the same for the same names and sizes, so that a log does not mix samples of others."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return hashlib.sha256(json.dumps([sizes, self._prompts, self._maxlen]).encode()).hexdigest()[:16]

    def tasks(self, wanted: str | None) -> tuple[str, ...]:
        """Those that were asked for, or all that are there."""
        names = tuple(wanted.split(",")) if wanted else tuple(self.files)
        missing = [name for name in names if name not in self.files]
        if missing or not names:
            raise BenchError(f"not in {self.data}: {', '.join(missing) or 'any task'}; there are {', '.join(self.files)}")
        return names

    def load(self, model: Model, length: int, task: str, n: int) -> list[Sample]:
        """The first `n` samples of a task, as prompts of at most `length` tokens: what is longer loses its middle."""
        template, n_generate = (self._of(config, task) for config in (self._prompts, self._maxlen))
        with self.files[task].open(encoding="utf-8") as lines:
            rows = [self._row(task, i, line) for i, line in enumerate(islice(lines, n), 1)]
        return [_sample(model, task_of(task), row, template, n_generate, length) for row in rows]

    def _of(self, config: dict[str, Any], task: str) -> Any:
        name = task.removesuffix("_e")
        if name not in config:
            raise BenchError(f"{PROMPTS} and {LENGTHS} do not name the task {name}: take those that come with its data")
        return config[name]

    def _config(self, name: str, kind: type) -> dict[str, Any]:
        for folder in (self.data / "config", self.data, self.data.parent / "config"):
            path = folder / name
            if path.is_file():
                found = _json(path.read_text(encoding="utf-8"), str(path))
                if not isinstance(found, dict) or not all(isinstance(value, kind) for value in found.values()):
                    raise BenchError(f"{path}: expected an object of tasks with a {kind.__name__} each")
                return found
        raise BenchError(f"no {name} in {self.data} or its folder config: it is part of LongBench, beside the data")

    def _row(self, task: str, number: int, line: str) -> dict[str, Any]:
        where = f"{self.files[task].name} line {number}"
        row = _json(line, where)
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in FIELDS.items()):
            raise BenchError(f"{where}: expected the fields {', '.join(FIELDS)} of LongBench")
        if not row["answers"] or not all(isinstance(answer, str) for answer in row["answers"]):
            raise BenchError(f"{where}: expected answers, found {row['answers']!r}")
        return row


def loader(folder: Folder, model: Model) -> Callable[[Path, int, str, int], Sequence[Sample]]:
    """What a quality run loads its samples with."""
    return lambda data, length, task, n: folder.load(model, length, task, n)


def _sample(model: Model, task: Task, row: dict[str, Any], template: str, n_generate: int, length: int) -> Sample:
    places = {"input": row["input"], "context": row["context"]}
    end = template.find("{context}") + len("{context}") if "{context}" in template else 0
    before, after = (_PLACE.sub(lambda found: places[found[1]], part) for part in (template[:end], template[end:]))
    before = _without_middle(model, before, after, length)
    return Sample(task, before, after, tuple(row["answers"]), tuple(row.get("all_classes") or ()), n_generate)


def _without_middle(model: Model, before: str, after: str, length: int) -> str:
    """The text before the question, so that the whole has `length` tokens: as many at its beginning as at its end.

    Raises:
        BenchError: what is asked alone takes half of the length.
    """
    tokens, asked = model.tokens(before + after, bos=True), len(model.tokens(after))
    if len(tokens) <= length:
        return before
    half = length // 2
    if asked >= half:
        raise BenchError(f"the question has {asked} tokens, and half of {length} are kept for the end: choose a larger --length")
    own = model.tokens(before)
    return model.text(own[:half]) + model.text(own[len(own) - (half - asked) :])


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchError(f"{where}: not JSON ({error.msg})") from None
