"""Samples of all tasks into a folder, for the tokenizer of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.progress import Progress

from ..cached import cache_folder
from ..runner import BenchError
from .chains import Chain
from .essay import Essay
from .lists import CommonWords, FrequentWords
from .needles import ESSAY, LINES, NEEDLES, Needles
from .prompt import Count, Material, Prompt, Task, largest
from .questions import HOTPOTQA, SQUAD, Question, Questions
from .samples import n_generate, path_of, write
from .words import Words

VERSION = 1  # of what the same seed gives; other samples need another, for they are found again by it
TASKS: dict[str, Task] = {
    "niah_single_1": Needles(LINES),
    "niah_single_2": Needles(ESSAY),
    "niah_single_3": Needles(ESSAY, kind="uuid"),
    "niah_multikey_1": Needles(ESSAY, keys=4),
    "niah_multikey_2": Needles(NEEDLES),
    "niah_multikey_3": Needles(NEEDLES, kind="uuid", key_kind="uuid"),
    "niah_multivalue": Needles(ESSAY, values=4),
    "niah_multiquery": Needles(ESSAY, keys=4, queries=4),
    "vt": Chain(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": Question(SQUAD),
    "qa_2": Question(HOTPOTQA),
}
NEEDS_QUESTIONS = {name: task.form for name, task in TASKS.items() if isinstance(task, Question)}
NEEDS_ESSAY = frozenset(name for name, task in TASKS.items() if isinstance(task, Needles) and task.haystack == ESSAY)


class Tokenizer(Protocol):
    """What of a model counts here."""

    def tokens(self, text: str, bos: bool = False) -> list[int]: ...

    def tokenizer_identity(self) -> str: ...


@dataclass(frozen=True)
class Order:
    """Which samples: lengths in tokens, those to generate included, without a BOS token."""

    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    samples: int  # of each task at each length
    seed: int = 0
    text: Path | None = None  # the book of the tasks that need one
    questions: Mapping[str, Path] = field(default_factory=dict)  # files of the tasks that need them, by their form

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        tasks: Sequence[str] | None,
        samples: int,
        seed: int = 0,
        text: Path | None = None,
        questions: Mapping[str, Path] | None = None,
    ) -> Order:
        """Without tasks: all that can be made.

        Raises:
            BenchError: a task is unknown or needs a text that is not named; a number makes no sense.
        """
        questions = questions or {}
        lacks = {t for t in NEEDS_ESSAY if not text} | {t for t, form in NEEDS_QUESTIONS.items() if form not in questions}
        names = tuple(tasks) if tasks else tuple(t for t in TASKS if t not in lacks)
        if unknown := [name for name in names if name not in TASKS]:
            raise BenchError(f"unknown task {', '.join(unknown)}: choose from {', '.join(TASKS)}")
        for name in names:
            if name in lacks and name in NEEDS_QUESTIONS:
                form = NEEDS_QUESTIONS[name]
                raise BenchError(f"{name}: its questions come from a file of {form}; name one with --{form}, or leave it out")
        if lacking := [name for name in names if name in lacks]:
            raise BenchError(
                f"{', '.join(lacking)}: the haystack is an essay; name a text file with --text, or leave them out"
            )
        if samples < 1 or not lengths or min(lengths) < 1:
            raise BenchError(f"expected lengths and samples above 0, found {samples} samples at {list(lengths)}")
        return cls(tuple(dict.fromkeys(lengths)), tuple(dict.fromkeys(names)), samples, seed, text, questions)


def identity(
    model: Tokenizer, seed: int, essay: Essay | None, words: Words, questions: Mapping[str, Questions] | None = None
) -> str:
    """Stands for everything that samples depend on, beside task, length and index: different samples never share it."""
    parts: tuple[object, ...] = (VERSION, model.tokenizer_identity(), seed, essay.identity if essay else "", words.source)
    if questions:
        parts += tuple(sorted((form, found.identity) for form, found in questions.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def row_of(task: str, index: int, prompt: Prompt, n_tokens: int, count: Count) -> dict[str, Any]:
    """A sample with the fields of the official files."""
    row: dict[str, Any] = {
        "index": index,
        "input": prompt.input,
        "outputs": list(prompt.outputs),
        "length": n_tokens + n_generate(task),
        "answer_prefix": prompt.answer_prefix,
    }
    if task.startswith("niah"):
        row["token_position_answer"] = answer_position(prompt.input, prompt.outputs[0], count)
    return row


def answer_position(text: str, value: str, count: Count) -> int:
    """Tokens before the first of the expected values, where its needle tells it."""
    return count(text[: text.index(f" is: {value}.") + len(" is: ")])


def make(task: str, index: int, seed: int, material: Material, count: Count) -> dict[str, Any]:
    """One sample, as long as it can be. It does not depend on how many others are made.

    Raises:
        BenchError: the length is too small for the task.
    """
    key = f"{seed}/{task}/{material.length}/{index}"
    recipe = TASKS[task]
    try:
        prompt, n = largest(
            lambda size: recipe.build(key, size, material), count, material.length - n_generate(task), recipe.least
        )
    except BenchError as error:
        raise BenchError(f"{task} at {material.length} tokens: {error}") from None
    return row_of(task, index, prompt, n, count)


def generate(
    model: Tokenizer,
    order: Order,
    folder: Path | None = None,
    words: Words | None = None,
    progress: Progress | None = None,
) -> tuple[Path, str]:
    """Writes FOLDER/<length>/<task>.jsonl.gz and gives FOLDER, and what its samples depend on as a short name.

    Without a folder they go to one for temporary files, named after all of that, where they are found again.

    Raises:
        BenchError: a length is too small for a task, the text or the words are missing, or nothing can be written.
    """
    essay = Essay.read(order.text) if order.text else None
    words = words or Words.installed()
    questions = {form: Questions.read(path, form) for form, path in order.questions.items()}
    name = identity(model, order.seed, essay, words, questions)
    where = folder or cache_folder() / f"ruler-{name}-{order.samples}"
    todo = [(n, t) for n in order.lengths for t in order.tasks if folder or not path_of(where, n, t).is_file()]
    bar = progress.add_task("samples", total=len(todo) * order.samples) if progress and todo else None

    def count(text: str) -> int:
        return len(model.tokens(text))

    for length, task in todo:
        material, rows = Material(length, words, essay, questions), []
        for index in range(order.samples):
            rows.append(make(task, index, order.seed, material, count))
            if progress and bar is not None:
                progress.update(bar, advance=1, description=f"samples {length} {task}")
        try:
            write(where, length, task, rows)
        except OSError as error:
            raise BenchError(
                f"cannot write to {where}: {error.strerror or error}; choose a folder with --out"
            ) from None
    return where, name
