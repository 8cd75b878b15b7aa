"""What a latent memory changes: the same policy at the same budget with it and without it, on the same samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from indexmem_edge.runtime.choice import MEMORY_OFF

from ..report import Row
from ..runner import WHOLE_KEYS
from ..stats import bootstrap, standard_error
from .paired import FEW, LEAST, NONE
from .summary import BOOK, MEAN, Runs, arm_of, by_cell, pairs

BETTER = {"score": 1, "nll": -1, "nll_recall": -1}  # which sign of a difference is good
COLUMNS = ("length", "policy", "kept", "memory", "slots", "task", "n") + tuple(
    f"{what}, memory - off" for what in ("score", "NLL", "recall NLL")
)
HOW = (
    "score and NLL with the memory minus without it, same policy, budget and sample; recall: words of the book that the context has, "
    "but not the last 256 tokens; mean, standard error, 95 % interval "
    f"by paired bootstrap; helps or hurts: the interval excludes zero, with {LEAST} pairs or more, two of each task; "
    "where a memory changes nothing, about one interval in twenty excludes zero by chance"
)


def differences(rows: Iterable[Row], able: dict[int, list[str]]) -> list[Row]:
    """A row per length, policy, ratio, memory and task; task "mean" is over the tasks the full cache can do."""
    runs = by_cell(rows)
    out = []
    for cell in sorted({cell for cell, _ in runs if cell.memory != MEMORY_OFF}, key=lambda c: (c.length, -c.ratio, c)):
        without = cell._replace(memory=MEMORY_OFF)
        tasks = {task: (runs[c, task], runs.get((without, task), {})) for c, task in runs if c == cell}
        judged = [tasks[task] for task in tasks if task in able.get(cell.length, [])]
        for task, groups in [(MEAN, judged), *((t, [tasks[t]]) for t in sorted(tasks, key=lambda t: (t != BOOK, t)))]:
            if row := _difference(groups):
                out.append({**cell._asdict(), "task": task, **row})
    return out


def _difference(groups: Sequence[tuple[Runs, Runs]]) -> Row:
    """Of the samples that both have, group by group; empty if there are none."""
    both = [(mine[i], theirs[i]) for mine, theirs in groups for i in mine if i in theirs]
    if not both:
        return {}
    row: Row = {"n": len(both)}
    for key in ("budget", "memory_slots", "memory_bytes"):
        row[key] = round(statistics.fmean(mine[key] for mine, _ in both))
    row["bytes_delta"] = round(statistics.fmean(_bytes(mine) - _bytes(theirs) for mine, theirs in both))
    for key, sign in BETTER.items():
        found = [values for mine, theirs in groups if (values := pairs(mine, theirs, key))]
        if found:
            delta, low, high = bootstrap(found)
            if math.isnan(se := standard_error(found)):
                low = high = math.nan  # single values cannot be drawn again
            row |= {f"{key}_delta": delta, f"{key}_se": se, f"{key}_low": low, f"{key}_high": high}
            row[f"{key}_effect"] = effect(found, sign * low, sign * high)
    return row


def _bytes(row: Row) -> int:
    """What counts; in rows of earlier versions, what is allocated."""
    return row.get("used_bytes") or sum(row.get(key) or 0 for key in WHOLE_KEYS)


def effect(groups: Sequence[Sequence[float]], one_end: float, other_end: float) -> str:
    """In a word, from the ends of an interval in which positive is good."""
    if sum(map(len, groups)) < LEAST or min(map(len, groups)) < 2:
        return FEW
    low, high = sorted((one_end, other_end))
    return "helps" if low > 0 else "hurts" if high < 0 else NONE


def table(rows: Sequence[Row], tasks: bool = True) -> list[list[str]]:
    """For people: the cells of COLUMNS; without `tasks` only means and the book."""
    return [
        [
            str(row["length"]),
            arm_of(row).kind,
            f"{row['ratio']:.0%}",
            row["memory"],
            str(row["memory_slots"]),
            row["task"],
            str(row["n"]),
            _told(row, "score"),
            *(_told(row, key) for key in ("nll", "nll_recall")),
        ]
        for row in rows
        if tasks or row["task"] in (MEAN, BOOK)
    ]


def _told(row: Row, key: str) -> str:
    if f"{key}_delta" not in row:
        return ""
    delta, se, low, high, word = (row[f"{key}_{name}"] for name in ("delta", "se", "low", "high", "effect"))
    error = "" if math.isnan(se) else f" ± {se:.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{delta:+.3f}{error} {word}"


def markdown(rows: Sequence[Row]) -> str:
    """The table with all tasks; empty without a memory."""
    if not rows:
        return ""
    lines = ["### Memory minus off", "", HOW[0].upper() + HOW[1:] + ".", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|--:|---|--:|---|--:|---|--:|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in table(rows)]) + "\n"


def plot(figure: Any, report: Any) -> None:
    """Differences of means (else of the book) with their intervals: a panel per length and measure."""
    rows = report.extra["differences"]
    shown = next((found for task in (MEAN, BOOK) if (found := [r for r in rows if r["task"] == task])), rows)
    lengths, ratios = sorted({r["length"] for r in shown}), sorted({r["ratio"] for r in shown}, reverse=True)
    arms = list(dict.fromkeys(sorted((arm_of(r).kind, r["memory"]) for r in shown)))
    several = len({memory for _, memory in arms}) > 1
    names = [f"{policy}\n{memory}" if several else policy for policy, memory in arms]
    panels = figure.subplots(len(lengths), 2, squeeze=False)
    for length, axes in zip(lengths, panels):
        for axis, key in zip(axes, ("score", "nll")):
            for i, ratio in enumerate(ratios):
                mine = [r for r in shown if (r["length"], r["ratio"]) == (length, ratio) and f"{key}_delta" in r]
                x = [arms.index((arm_of(r).kind, r["memory"])) + 0.2 * (i - (len(ratios) - 1) / 2) for r in mine]
                y = [r[f"{key}_delta"] for r in mine]
                errors = [[abs(r[f"{key}_delta"] - r[f"{key}_{end}"]) for r in mine] for end in ("low", "high")]
                axis.errorbar(
                    x, y, yerr=errors, fmt="o", markersize=4, capsize=3, color=f"C{i}", label=f"{ratio:.0%} kept"
                )
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_xticks(range(len(arms)), names, fontsize=8)
            axis.set(
                ylabel=f"{key}, memory - off\n{length} tokens, {'higher' if BETTER[key] > 0 else 'lower'} is better"
            )
            axis.grid(alpha=0.3, axis="y")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
