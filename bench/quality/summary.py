"""Rows of single runs to the rows of the quality report: means, and differences to the full cache on the same samples."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from indexmem_edge.runtime.choice import MEMORY_OFF

from ..report import Row
from ..runner import BYTE_KEYS, F16, UNBOUNDED
from ..stats import bootstrap
from .arms import FULL_ARM, Arm

FULL, BOOK, MEAN = UNBOUNDED, "book", "mean"  # BOOK: the task name of held-out text
MEASURES = ("score", "nll", "nll_recall", "nll_rest")
Runs = dict[int, Row]  # by sample


class Cell(NamedTuple):
    length: int
    policy: str
    ratio: float
    memory: str = MEMORY_OFF
    cache_type: str = F16


def by_cell(rows: Iterable[Row]) -> dict[tuple[Cell, str], Runs]:
    """Runs by cell and task."""
    runs: dict[tuple[Cell, str], Runs] = defaultdict(dict)
    for row in rows:
        runs[Cell(row["length"], *arm_of(row)), row["task"]][row["sample"]] = row
    return dict(runs)


def summarise(rows: Iterable[Row], able: dict[int, list[str]]) -> list[Row]:
    """One row per length, policy, ratio, memory and task; task "mean" is the mean over the tasks the full cache can do."""
    runs = by_cell(rows)
    cells = sorted({cell for cell, _ in runs}, key=_place)
    out = []
    for cell in cells:
        reference = Cell(cell.length, *FULL_ARM)
        tasks = [task for c, task in runs if c == cell]
        for task in sorted(tasks, key=lambda t: (t == BOOK, t)):
            mine = runs[cell, task]
            full = runs.get((reference, task), {}) if cell != reference else {}
            row = _means(cell, task, mine)
            for key in MEASURES:
                row |= _interval([pairs(mine, full, key)], key)
            out.append(row)
        judged = [task for task in tasks if task in able.get(cell.length, [])]
        if judged:
            out.append(
                _mean_row(
                    cell,
                    [runs[cell, t] for t in judged],
                    [runs.get((reference, t), {}) if cell != reference else {} for t in judged],
                )
            )
    return out


def _place(cell: Cell) -> tuple[Any, ...]:
    kind = cell.cache_type != F16, cell.cache_type, cell.memory != MEMORY_OFF, cell.memory
    return cell.length, cell.policy != FULL, -cell.ratio, cell.policy, *kind


def _means(cell: Cell, task: str, runs: Runs) -> Row:
    rows = list(runs.values())
    row: Row = {**cell._asdict(), "task": task, "n": len(rows)}
    for key in ("budget", "memory_slots", "tokens_seen", *BYTE_KEYS, "used_bytes", "room_bytes", "window"):
        values = [r[key] for r in rows if r.get(key) is not None]
        row[key] = round(statistics.fmean(values)) if values else None
    hows: dict[str, Callable[[Sequence[float]], float]] = {
        "rss_bytes": max,
        "prefill_tps": statistics.median,
        "decode_tps": statistics.median,
        **dict.fromkeys(("bytes_share", *MEASURES, "agreement", "prefix"), statistics.fmean),
    }
    for key, how in hows.items():
        values = [r[key] for r in rows if r.get(key) is not None]
        row[key] = how(values) if values else None
    return row


def pairs(mine: Runs, full: Runs, key: str) -> list[float]:
    """Differences on the samples that both have."""
    return [
        row[key] - full[i][key]
        for i, row in mine.items()
        if i in full and row.get(key) is not None and full[i].get(key) is not None
    ]


def _interval(groups: Sequence[Sequence[float]], key: str) -> Row:
    if not any(groups):
        return {}
    delta, low, high = bootstrap(groups)
    return {f"{key}_delta": delta, f"{key}_low": low, f"{key}_high": high}


def _mean_row(cell: Cell, runs: list[Runs], full: list[Runs]) -> Row:
    row = _means(cell, MEAN, dict(enumerate(r for task in runs for r in task.values())))
    for key in ("score", "nll"):
        row[key] = statistics.fmean(statistics.fmean(r[key] for r in task.values()) for task in runs)
        row.update(_interval([pairs(mine, theirs, key) for mine, theirs in zip(runs, full)], key))
    return row


def arm_of(row: Row) -> Arm:
    """Rows of earlier versions do not say that there was no memory, nor that the cache was f16."""
    return Arm(row["policy"], row["ratio"], row.get("memory") or MEMORY_OFF, row.get("cache_type") or F16)
