"""Rows of single runs to the rows of the quality report: means, and differences to the full cache on the same samples."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from .report import Row, Verdict, series
from .stats import bootstrap

FULL, BOOK, MEAN = "full", "book", "mean"
Cell = tuple[int, str, float]  # length, policy, ratio


def summarise(rows: Iterable[Row], able: dict[int, list[str]]) -> list[Row]:
    """One row per length, policy, ratio and task; task "mean" is the mean over the tasks the full cache can do."""
    runs: dict[tuple[Cell, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        runs[(row["length"], row["policy"], row["ratio"]), row["task"]][row["sample"]] = row
    cells = sorted({cell for cell, _ in runs}, key=lambda c: (c[0], c[1] != FULL, -c[2], c[1]))
    out = []
    for cell in cells:
        reference = (cell[0], FULL, 1.0)
        tasks = [task for c, task in runs if c == cell]
        for task in sorted(tasks, key=lambda t: (t == BOOK, t)):
            mine = runs[cell, task]
            full = runs.get((reference, task), {}) if cell != reference else {}
            out.append({**_means(cell, task, mine), **_versus(mine, full, "score"), **_versus(mine, full, "nll")})
        judged = [task for task in tasks if task in able.get(cell[0], [])]
        if judged:
            out.append(
                _mean_row(
                    cell,
                    [runs[cell, t] for t in judged],
                    [runs.get((reference, t), {}) if cell != reference else {} for t in judged],
                )
            )
    return out


def _means(cell: Cell, task: str, runs: dict[int, Row]) -> Row:
    rows = list(runs.values())
    row: Row = {"length": cell[0], "policy": cell[1], "ratio": cell[2], "task": task, "n": len(rows)}
    for key in ("budget", "tokens_seen", "kv_bytes", "meta_bytes", "indexer_bytes", "sidecar_bytes", "window"):
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


def _pairs(mine: dict[int, Row], full: dict[int, Row], key: str) -> list[float]:
    """Differences on the samples that both have."""
    return [
        row[key] - full[i][key]
        for i, row in mine.items()
        if i in full and row.get(key) is not None and full[i].get(key) is not None
    ]


def _versus(mine: dict[int, Row], full: dict[int, Row], key: str) -> Row:
    return _interval([_pairs(mine, full, key)], key)


def _interval(groups: Sequence[Sequence[float]], key: str) -> Row:
    if not any(groups):
        return {}
    delta, low, high = bootstrap(groups)
    return {f"{key}_delta": delta, f"{key}_low": low, f"{key}_high": high}


def _mean_row(cell: Cell, runs: list[dict[int, Row]], full: list[dict[int, Row]]) -> Row:
    row = _means(cell, MEAN, {i: r for i, r in enumerate(r for task in runs for r in task.values())})
    for key in ("score", "nll"):
        row[key] = statistics.fmean(statistics.fmean(r[key] for r in task.values()) for task in runs)
        row.update(_interval([_pairs(mine, theirs, key) for mine, theirs in zip(runs, full)], key))
    return row


def verdicts(rows: Sequence[Row], able: dict[int, list[str]]) -> list[Verdict]:
    """Nothing is passed or failed here: the best policy of each length and budget is named."""
    out = [
        Verdict(f"tasks the full cache can do at {length}: {', '.join(tasks) or 'none'}", float(len(tasks)))
        for length, tasks in able.items()
    ]
    means = [row for row in rows if row["task"] == MEAN]
    for length, ratio in sorted(
        {(row["length"], row["ratio"]) for row in means if row["policy"] != FULL}, key=lambda k: (k[0], -k[1])
    ):
        best = max(
            (row for row in means if (row["length"], row["ratio"]) == (length, ratio) and row["policy"] != FULL),
            key=lambda row: row["score"],
        )
        full = next((row["score"] for row in means if row["length"] == length and row["policy"] == FULL), None)
        if full:
            out.append(
                Verdict(
                    f"score kept at {length} tokens with {ratio:.0%} of the entries, best policy ({best['policy']})",
                    best["score"] / full,
                )
            )
    return out


def plot(figure: Any, report: Any) -> None:
    means = next(
        (rows for task in (MEAN, BOOK) if (rows := [row for row in report.rows if row["task"] == task])), report.rows
    )
    lengths = sorted({row["length"] for row in means}) or [0]
    colours = {policy: f"C{i}" for i, policy in enumerate(sorted({row["policy"] for row in means} - {FULL}))}
    for column, axes in enumerate(figure.subplots(1, 2 * len(lengths), squeeze=False).reshape(len(lengths), 2)):
        for axis, key in zip(axes, ("score", "nll")):
            here = [row for row in means if row["length"] == lengths[column]]
            for policy in dict.fromkeys(row["policy"] for row in here):
                x, y = series(
                    sorted((row for row in here if row["policy"] == policy), key=lambda row: row["ratio"]), "ratio", key
                )
                if policy == FULL:
                    if y:
                        axis.axhline(y[0], color="black", linestyle="--", label=FULL)
                else:
                    axis.plot([100 * v for v in x], y, marker="o", color=colours[policy], label=policy)
            axis.set(xlabel="% of entries kept", ylabel=f"{key}, {lengths[column]} tokens")
            axis.grid(alpha=0.3)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
