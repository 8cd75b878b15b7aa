"""Tables and plot of `endless`: an arm a line; windows, distances and turns to the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..report import Report, Row, series, show
from .arms import SHIFT
from .summary import Arm, by_arm, label

Table = tuple[str, list[str], list[list[str]]]  # title, columns, cells
COST = (
    "budget", "policy", "span", "span_in_force", "tokens_between", "prefill_ratio", "prefill_share", "decode_ratio",
    "decode_share", "rebase_ms", "slowest_ms", "slowest_without_ms",
)  # fmt: skip
FAR = ("budget", "policy", "span", "tokens_seen", "rebases", "near", "far", "far_delta", "far_low", "far_high", "kv_bytes")
MOST_COLUMNS = 16  # windows beside each other; with more, every second is shown, every third, ...


def tables(report: Report) -> list[Table]:
    """Those of the parts that were run."""
    meta, extra = report.meta, report.extra
    machine = f"{meta['model']}, {meta['threads']} threads, {meta['cpu']}"
    out = []
    if report.rows:
        title = f"endless: NLL of book text, windows of {meta['per']} up to so many tokens; {machine}"
        out.append(_wide(title, report.rows, "tokens_seen", _tokens, lambda row: show("nll", row["nll"])))
    if facts := extra.get("facts"):
        title = f"facts found, after so many tokens since they were told (likelihood per token, nats); {machine}"
        out.append(_wide(title, facts, "distance", _tokens, _found))
        kinds = extra["fact_kinds"]
        out.append(_wide("facts found by kind, at all distances together", kinds, "kind", str, _share))
    if talk := extra.get("talk"):
        title = f"NLL of scripted answers, up to so many turns (of those from earlier pieces); {machine}"
        out.append(_wide(title, talk, "turns", str, _talked))
    if far := extra.get("far"):
        cells = [[show(name, row.get(name)) for name in FAR] for row in far]
        out.append((f"NLL of the same passages near the beginning and at the end; {machine}", [n.replace("_", " ") for n in FAR], cells))
    if cost := extra.get("cost"):
        cells = [[show(name, row.get(name)) for name in COST] for row in cost]
        out.append((f"cost of renewing positions; {machine}", [name.replace("_", " ") for name in COST], cells))
    return out


def _wide(title: str, rows: Sequence[Row], x: str, name: Callable[[Any], str], cell: Callable[[Row], str]) -> Table:
    places = sorted({row[x] for row in rows})
    step = -(-len(places) // MOST_COLUMNS)
    places = places[step - 1 :: step]
    cells = []
    for arm, mine in by_arm(rows):
        at = {row[x]: row for row in mine}
        cells.append([label(arm), *(cell(at[place]) if place in at else "-" for place in places)])
    return title, ["arm", *map(name, places)], cells


def _tokens(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def _share(row: Row) -> str:
    return f"{round(row['found'] * row['n'])}/{row['n']}"


def _found(row: Row) -> str:
    return f"{row['found']:.2f} [{row['found_low']:.2f}, {row['found_high']:.2f}] {_share(row)} ({row['nll']:.2f})"


def _talked(row: Row) -> str:
    return f"{show('nll', row['nll'])} ({show('nll', row['nll_back'])})"


def plot(figure: Any, report: Report) -> None:
    """Likelihood, facts and talk, each over how far the conversation has come; the largest budget in full lines."""
    panels = [
        ("nll", report.rows, "tokens_seen", "nll", "tokens seen", "NLL of book text, nats"),
        ("facts", report.extra.get("facts", []), "distance", "found", "tokens since it was told", "share of facts answered"),
        ("talk", report.extra.get("talk", []), "turns", "nll", "turns", "NLL of scripted answers, nats"),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return
    colours = _colours(report)
    budgets = sorted({row["budget"] for panel in panels for row in panel[1]}, reverse=True)
    for axis, (name, rows, x, y, below, beside) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for arm, mine in by_arm(rows):
            style = ("-", "--", ":", "-.")[budgets.index(arm[0]) % 4]
            axis.plot(*series(mine, x, y), style, color=colours[arm[1:]], marker=".", label=label(arm))
            if name == "facts":
                axis.fill_between(
                    *series(mine, x, "found_low"), series(mine, x, "found_high")[1], color=colours[arm[1:]], alpha=0.1
                )
        axis.set(xlabel=below, ylabel=beside)
        if name == "facts":
            axis.set(xscale="log", ylim=(-0.02, 1.02))
        if name == "nll" and (trained := report.meta.get("trained_length")):
            axis.axvline(trained, color="grey", linestyle=":", linewidth=1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)


def _colours(report: Report) -> dict[tuple[str, str], str]:
    """One for each policy with each span; the shift is black."""
    rows = [*report.rows, *(row for name in ("facts", "talk") for row in report.extra.get(name, []))]
    arms: list[Arm] = [arm for arm, _ in by_arm(rows)]
    others = dict.fromkeys(arm[1:] for arm in arms if arm[1] != SHIFT)
    return {(SHIFT, "-"): "black"} | {arm: f"C{i % 10}" for i, arm in enumerate(others)}
