"""What of a run can be compared: the samples that all arms finished. A run may be cut off, and go on, at any time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..report import Row
from .arms import FULL_ARM, Arm
from .summary import BOOK, arm_of


class Balanced(NamedTuple):
    rows: list[Row]  # of every task and length the same samples of all arms
    samples: dict[int, dict[str, int]]  # by length and task: how many these are
    left_out: list[Row]  # arms that cannot be made at a length, and why


def balanced(rows: Iterable[Row], arms: Sequence[Arm], tasks_of: Mapping[int, Sequence[str]]) -> Balanced:
    """Of tasks that not all arms run on, the rows of the full cache are kept: they say what it can do.

    An arm that cannot be made for one sample of a length is left out of all that length's comparisons.
    """
    left: dict[tuple[int, Arm], str] = {}
    found: dict[tuple[int, str], dict[Arm, dict[int, Row]]] = {}
    for row in rows:
        arm, length = arm_of(row), row["length"]
        if why := row.get("left_out"):
            left.setdefault((length, arm), why)
        elif arm in arms:
            found.setdefault((length, row["task"]), {}).setdefault(arm, {})[row["sample"]] = row
    kept: list[Row] = []
    samples: dict[int, dict[str, int]] = {}
    for (length, task), runs in found.items():
        if task != BOOK and task not in tasks_of.get(length, ()):
            kept += runs.get(FULL_ARM, {}).values()
            continue
        expected = [arm for arm in arms if (length, arm) not in left]
        common = set.intersection(*(set(runs.get(arm, {})) for arm in expected))
        kept += [runs[arm][sample] for arm in expected for sample in sorted(common)]
        samples.setdefault(length, {})[task] = len(common)
    return Balanced(kept, samples, [{"length": n, **arm._asdict(), "why": why} for (n, arm), why in left.items()])
