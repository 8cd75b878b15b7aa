"""The table that LongBench is usually shown in: a line for each arm, a column for each task, in points of 100."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..quality.summary import MEAN, arm_of
from ..report import Row
from ..runner import UNBOUNDED


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, of the rows of a report; a length that is not the only one stands beside the arm's name."""
    rows = [row for row in rows if row["task"] != MEAN and row["score"] is not None]
    tasks, lengths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "length"))
    cells = []
    for length in lengths:
        here = [row for row in rows if row["length"] == length]
        for arm in dict.fromkeys(map(arm_of, here)):
            scores = {row["task"]: 100 * row["score"] for row in here if arm_of(row) == arm}
            name = arm.name + (f", {length} tokens" if len(lengths) > 1 else "")
            mean = statistics.mean(scores.values()) if len(scores) == len(tasks) else None
            kept = "all" if arm.policy == UNBOUNDED else f"{arm.ratio:.0%}"
            cells.append([name, kept, *(_points(scores.get(task)) for task in tasks), _points(mean)])
    return ["arm", "kept", *tasks, "mean"], cells


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
