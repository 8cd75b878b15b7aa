"""The tasks of LongBench: how each is scored, and what of an answer counts."""

from __future__ import annotations

from dataclasses import dataclass

from . import scores
from .scores import Score


@dataclass(frozen=True)
class Task:
    score: Score
    first_line: bool = False  # only the first line of an answer counts


TASKS: dict[str, Task] = {
    "narrativeqa": Task(scores.qa_f1),
    "qasper": Task(scores.qa_f1),
    "multifieldqa_en": Task(scores.qa_f1),
    "multifieldqa_zh": Task(scores.qa_f1_zh),
    "hotpotqa": Task(scores.qa_f1),
    "2wikimqa": Task(scores.qa_f1),
    "musique": Task(scores.qa_f1),
    "dureader": Task(scores.rouge_zh),
    "gov_report": Task(scores.rouge),
    "qmsum": Task(scores.rouge),
    "multi_news": Task(scores.rouge),
    "vcsum": Task(scores.rouge_zh),
    "trec": Task(scores.classification, first_line=True),
    "triviaqa": Task(scores.qa_f1, first_line=True),
    "samsum": Task(scores.rouge, first_line=True),
    "lsht": Task(scores.classification, first_line=True),
    "passage_count": Task(scores.count),
    "passage_retrieval_en": Task(scores.retrieval),
    "passage_retrieval_zh": Task(scores.retrieval_zh),
    "lcc": Task(scores.code),
    "repobench-p": Task(scores.code),
}


def task_of(file: str) -> Task:
    """Of a file's name without its ending: LongBench-E has files of its own, of the same tasks (hotpotqa_e)."""
    return TASKS[file.removesuffix("_e")]


def is_task(file: str) -> bool:
    return file.removesuffix("_e") in TASKS
