"""Rows of single runs to the rows of the quality report: means, and differences to the full cache on the same samples."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from indexmem_edge._parts import MEMORY_OFF

from .report import Row, Verdict, series
from .runner import BYTE_KEYS
from .stats import bootstrap

FULL, BOOK, MEAN = "full", "book", "mean"
Runs = dict[int, Row]  # by sample


class Cell(NamedTuple):
    length: int
    policy: str
    ratio: float
    memory: str = MEMORY_OFF


def by_cell(rows: Iterable[Row]) -> dict[tuple[Cell, str], Runs]:
    """Runs by cell and task. Runs of earlier versions do not say that they had no memory."""
    runs: dict[tuple[Cell, str], Runs] = defaultdict(dict)
    for row in rows:
        cell = Cell(row["length"], row["policy"], row["ratio"], row.get("memory") or MEMORY_OFF)
        runs[cell, row["task"]][row["sample"]] = row
    return dict(runs)


def summarise(rows: Iterable[Row], able: dict[int, list[str]]) -> list[Row]:
    """One row per length, policy, ratio, memory and task; task "mean" is the mean over the tasks the full cache can do."""
    runs = by_cell(rows)
    cells = sorted({cell for cell, _ in runs}, key=_place)
    out = []
    for cell in cells:
        reference = Cell(cell.length, FULL, 1.0)
        tasks = [task for c, task in runs if c == cell]
        for task in sorted(tasks, key=lambda t: (t == BOOK, t)):
            mine = runs[cell, task]
            full = runs.get((reference, task), {}) if cell != reference else {}
            out.append({**_means(cell, task, mine), **_versus(mine, full, "score"), **_versus(mine, full, "nll")})
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
    return cell.length, cell.policy != FULL, -cell.ratio, cell.policy, cell.memory != MEMORY_OFF, cell.memory


def _means(cell: Cell, task: str, runs: Runs) -> Row:
    rows = list(runs.values())
    row: Row = {**cell._asdict(), "task": task, "n": len(rows)}
    for key in ("budget", "memory_slots", "tokens_seen", *BYTE_KEYS, "window"):
        values = [r[key] for r in rows if r.get(key) is not None]
        row[key] = round(statistics.fmean(values)) if values else None
    for key, how in (
        ("rss_bytes", max),
        ("prefill_tps", statistics.median),
        ("decode_tps", statistics.median),
        ("score", statistics.fmean),
        ("nll", statistics.fmean),
    ):
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


def _versus(mine: Runs, full: Runs, key: str) -> Row:
    return _interval([pairs(mine, full, key)], key)


def _interval(groups: Sequence[Sequence[float]], key: str) -> Row:
    if not any(groups):
        return {}
    delta, low, high = bootstrap(groups)
    return {f"{key}_delta": delta, f"{key}_low": low, f"{key}_high": high}


def _mean_row(cell: Cell, runs: list[Runs], full: list[Runs]) -> Row:
    row = _means(cell, MEAN, {i: r for i, r in enumerate(r for task in runs for r in task.values())})
    for key in ("score", "nll"):
        row[key] = statistics.fmean(statistics.fmean(r[key] for r in task.values()) for task in runs)
        row.update(_interval([pairs(mine, theirs, key) for mine, theirs in zip(runs, full)], key))
    return row


def verdicts(rows: Sequence[Row], able: dict[int, list[str]]) -> list[Verdict]:
    """Nothing is passed or failed here: the best policy of each length and budget is named."""
    out = [
        Verdict(f"tasks the full cache can do at {length}: {', '.join(tasks) or 'none'}", float(len(tasks)))
        for length, tasks in able.items()
    ]
    means = [row for row in rows if row["task"] == MEAN]
    bounded = [row for row in means if row["policy"] != FULL]
    for length, ratio in sorted({(row["length"], row["ratio"]) for row in bounded}, key=lambda k: (k[0], -k[1])):
        here = [row for row in bounded if (row["length"], row["ratio"]) == (length, ratio)]
        best = max(here, key=lambda row: row["score"])
        full = next((row["score"] for row in means if row["length"] == length and row["policy"] == FULL), None)
        if full:
            out.append(
                Verdict(
                    f"score kept at {length} tokens with {ratio:.0%} of the entries, best policy ({name_of(best)})",
                    best["score"] / full,
                )
            )
    return out


def name_of(row: Row) -> str:
    return row["policy"] + ("" if row["memory"] == MEMORY_OFF else f" with memory {row['memory']}")


def plot(figure: Any, report: Any) -> None:
    means = next(
        (rows for task in (MEAN, BOOK) if (rows := [row for row in report.rows if row["task"] == task])), report.rows
    )
    lengths = sorted({row["length"] for row in means}) or [0]
    memories = list(dict.fromkeys(row["memory"] for row in means))  # off first
    colours = {policy: f"C{i}" for i, policy in enumerate(sorted({row["policy"] for row in means} - {FULL}))}
    for column, axes in enumerate(figure.subplots(1, 2 * len(lengths), squeeze=False).reshape(len(lengths), 2)):
        for axis, key in zip(axes, ("score", "nll")):
            here = [row for row in means if row["length"] == lengths[column]]
            for policy, memory in dict.fromkeys((row["policy"], row["memory"]) for row in here):
                mine = [row for row in here if (row["policy"], row["memory"]) == (policy, memory)]
                x, y = series(sorted(mine, key=lambda row: row["ratio"]), "ratio", key)
                if policy == FULL:
                    if y:
                        axis.axhline(y[0], color="black", linestyle="--", label=FULL)
                    continue
                line = ("-", "--", ":", "-.")[memories.index(memory) % 4]
                axis.plot([100 * v for v in x], y, line, marker="o", color=colours[policy], label=name_of(mine[0]))
            axis.set(xlabel="% of entries kept", ylabel=f"{key}, {lengths[column]} tokens")
            axis.grid(alpha=0.3)
    columns = 8 if len(memories) == 1 else 5
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)
