"""qa_*: a question that some documents answer, among documents that do not, out of a file of SQuAD or HotpotQA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ..runner import BenchError
from .prompt import Material, Prompt, dice

SQUAD, HOTPOTQA = "squad", "hotpotqa"
ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class Asked:
    question: str
    answers: tuple[str, ...]  # each of them is right
    own: tuple[int, ...]  # documents that the question comes with
    near: tuple[int, ...] = ()  # others of the same article, which mislead the most


@dataclass(frozen=True)
class Questions:
    """A file of questions with the documents of all of them."""

    documents: tuple[str, ...]
    asked: tuple[Asked, ...]
    identity: str

    @classmethod
    def read(cls, path: Path, form: str) -> Questions:
        """Of the official file of SQuAD (1.1 or 2.0; what it says cannot be answered is left out), or of HotpotQA.

        Raises:
            BenchError: it cannot be read or is not of that form, or nothing is asked in it.
        """
        try:
            raw = path.read_bytes()
            documents, asked = {SQUAD: _squad, HOTPOTQA: _hotpotqa}[form](json.loads(raw))
        except OSError as error:
            raise BenchError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchError(f"{path}: expected a file of {form}, found something else ({type(error).__name__}: {error})") from None
        if not asked:
            raise BenchError(f"{path}: nothing is asked in it that has an answer")
        return cls(tuple(documents), tuple(asked), hashlib.sha256(raw).hexdigest()[:16])

    def others(self, asked: Asked, n: int, rng: Random) -> list[int]:
        """`n` documents beside the question's own: first those that are near, then any; all of them again if there are too few."""
        near = rng.sample(asked.near, min(n, len(asked.near)))
        known = {*asked.own, *asked.near}
        rest = [i for i in range(len(self.documents)) if i not in known]
        rng.shuffle(rest)
        found = (near + rest) or list(asked.own)
        return (found * -(-n // len(found)))[:n]


@dataclass(frozen=True)
class Question:
    """The size is the number of documents; there are never fewer than the question's own."""

    form: str

    @property
    def least(self) -> int:
        return 1

    def build(self, seed: str, size: int, material: Material) -> Prompt:
        questions = material.questions.get(self.form)
        if questions is None:
            raise BenchError(f"questions about documents need a file of them: name one with --{self.form}")
        asked = dice(seed, "question").choice(questions.asked)
        shown = [*asked.own, *questions.others(asked, max(size - len(asked.own), 0), dice(seed, "documents"))]
        dice(seed, f"order of {len(shown)}").shuffle(shown)
        documents = "\n\n".join(f"Document {n}:\n{questions.documents[i]}" for n, i in enumerate(shown, 1))
        text = f"{ASK}\n\nThe following are given documents.\n\n{documents}\n\n{ASK}\n\nQuestion: {asked.question}"
        return Prompt(text, " Answer:", asked.answers)


def _squad(data: Any) -> tuple[Sequence[str], list[Asked]]:
    documents: dict[str, int] = {}
    asked = []
    for article in data["data"]:
        here = [documents.setdefault(_text(part["context"]), len(documents)) for part in article["paragraphs"]]
        for own, part in zip(here, article["paragraphs"]):
            for question in part["qas"]:
                answers = tuple(dict.fromkeys(_text(answer["text"]) for answer in question["answers"]))
                if answers and not question.get("is_impossible"):
                    near = tuple(i for i in dict.fromkeys(here) if i != own)
                    asked.append(Asked(_line(question["question"]), answers, (own,), near))
    return list(documents), asked


def _hotpotqa(data: Any) -> tuple[Sequence[str], list[Asked]]:
    documents: dict[str, int] = {}
    asked = []
    if not isinstance(data, list):
        raise TypeError(f"expected a list, found {type(data).__name__}")
    for row in data:
        texts = [f"{_line(title)}\n{''.join(map(_text, sentences))}" for title, sentences in row["context"]]
        own = tuple(dict.fromkeys(documents.setdefault(text, len(documents)) for text in texts))
        asked.append(Asked(_line(row["question"]), (_text(row["answer"]),), own))
    return list(documents), asked


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _line(value: Any) -> str:
    """A question is the last line of a prompt."""
    return " ".join(_text(value).split())
