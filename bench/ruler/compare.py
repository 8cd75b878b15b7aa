"""Are the samples of two folders built alike? Ours against official ones, task by task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..report import Row
from ..runner import BenchError
from .anatomy import Anatomy, take_apart
from .generate import answer_position
from .prompt import Count
from .samples import n_generate, rows, tasks

COLUMNS = ("task", "length", "n", "parts", "depths", "ours", "official", "tokenizer", "problems")
HOW = (
    "text with names, values and hay masked; parts; Kolmogorov-Smirnov distance of depths (at most what chance gives in "
    "999 of 1000 cases); lengths at most what was asked for and no shorter than 5 % or 100 tokens below; answers solved "
    "from the text; positions of answers counted again"
)
SHORTER = 0.05  # of the length, that a sample may lack; a line of two UUIDs has some 90 tokens
SHORTER_TOKENS = 100


@dataclass
class Check:
    """What was found at one task and length; `problems` is empty if all is well."""

    task: str
    length: int
    n: int
    parts: str = ""
    depths: float | None = None  # distance of the two distributions, 0 to 1
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)  # shortest and longest, tokens
    same_tokenizer: bool = True
    problems: list[str] = field(default_factory=list)

    def to_row(self) -> Row:
        ours, official = (f"{low}-{high}" for low, high in (self.lengths["ours"], self.lengths["official"]))
        tokenizer = "same" if self.same_tokenizer else "other"
        found = "; ".join(self.problems) or "none"
        return {
            **{"task": self.task, "length": self.length, "n": self.n, "parts": self.parts, "depths": self.depths},
            **{"ours": ours, "official": official, "tokenizer": tokenizer, "problems": found},
        }


def compare(
    ours: Path, official: Path, lengths: Sequence[int], names: Sequence[str], count: Count, n: int | None = None
) -> list[Check]:
    """
    Args:
        count: tokens of a text, by the tokenizer that ours were made for.
        n: so many samples of each of ours at most.

    Raises:
        BenchError: files are missing.
    """
    for folder in (ours, official):
        missing = [f"{length}/{name}" for length in lengths for name in names if name not in tasks(folder, length)]
        if missing:
            raise BenchError(f"not in {folder}: {', '.join(missing)}; name lengths and tasks that are there")
    return [
        compare_task(name, length, rows(ours, length, name, n), rows(official, length, name), count)
        for length in lengths
        for name in names
    ]


def compare_task(task: str, length: int, ours: list[Row], official: list[Row], count: Count) -> Check:
    check = Check(task, length, len(ours))
    try:
        apart = {
            name: [take_apart(task, row["input"], row["answer_prefix"]) for row in group]
            for name, group in (("ours", ours), ("official", official))
        }
    except BenchError as error:
        check.problems.append(str(error))
        apart = {"ours": [], "official": []}
    check.lengths = {
        name: (min(row["length"] for row in group), max(row["length"] for row in group))
        for name, group in (("ours", ours), ("official", official))
    }
    check.same_tokenizer = all(_recount(task, row, count) for row in official)
    _compare_parts(check, apart["ours"], apart["official"])
    _compare_depths(check, apart["ours"], apart["official"])
    _judge(check, "ours", task, ours, apart["ours"], count)
    _judge(check, "official", task, official, apart["official"], count if check.same_tokenizer else None)
    shortest, longest = check.lengths["ours"]
    if longest > length or shortest < length - max(SHORTER * length, SHORTER_TOKENS):
        check.problems.append(f"lengths {shortest} to {longest} where {length} were asked for")
    return check


def _compare_parts(check: Check, ours: list[Anatomy], official: list[Anatomy]) -> None:
    for what in ("template", "parts"):
        mine, theirs = ({getattr(one, what) for one in group} for group in (ours, official))
        if mine != theirs:
            check.problems.append(f"{what}: {_first_difference(mine, theirs)}")
    check.parts = " or ".join(sorted({one.parts for one in ours}))


def _first_difference(ours: set[str], official: set[str]) -> str:
    """Both texts around the first letter that differs."""
    a, b = (min(group or {""}) for group in (ours - official or ours, official - ours or official))
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return f"expected {b[max(at - 20, 0) : at + 40]!r}, found {a[max(at - 20, 0) : at + 40]!r}"


def _compare_depths(check: Check, ours: list[Anatomy], official: list[Anatomy]) -> None:
    a, b = ([depth for one in group for depth in one.depths] for group in (ours, official))
    if not a or not b:
        return
    check.depths = distance(a, b)
    # those of one sample are not independent, and official samples repeat some: count samples
    most = 1.95 * math.sqrt(1 / len(ours) + 1 / len(official))
    if check.depths > most:
        check.problems.append(f"depths differ by {check.depths:.2f}, expected at most {most:.2f}")


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference of the two empirical distribution functions."""
    return max(abs(sum(v <= x for v in a) / len(a) - sum(v <= x for v in b) / len(b)) for x in {*a, *b})


def _recount(task: str, row: dict[str, Any], count: Count) -> bool:
    return count(row["input"] + row["answer_prefix"]) == int(row["length"]) - n_generate(task)


def _judge(check: Check, whose: str, task: str, group: list[Row], apart: list[Anatomy], count: Count | None) -> None:
    """What must hold of every sample by itself. Without `count`, tokens are not counted."""
    wrong = sum(sorted(one.answers) != sorted(row["outputs"]) for row, one in zip(group, apart))
    lost = sum(any(text not in row["input"] for text in row["outputs"]) for row in group)
    badly = misplaced = 0
    if count:
        badly = sum(not _recount(task, row, count) for row in group)
        misplaced = sum(
            answer_position(row["input"], row["outputs"][0], count) != row["token_position_answer"]
            for row in group
            if "token_position_answer" in row and row["outputs"][0] in row["input"]
        )
    for n, what in (
        (wrong, "outputs that are not the answer"),
        (lost, "outputs that are not in the text"),
        (badly, "a wrong length"),
        (misplaced, "a wrong position of the answer"),
    ):
        if n:
            check.problems.append(f"{n} of {len(group)} {whose} have {what}")
