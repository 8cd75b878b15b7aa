"""The quality report for people: a compact table, the tables of the results page, a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..report import Row
from ..runner import F16, UNBOUNDED
from .paired import FEW, NONE
from .standing import ALL
from .summary import BOOK, MEAN, arm_of

DETAILS = ("task", "length", "policy", "n", "score", "nll", "kv_bytes")  # of the full cache alone
NOTE = (
    "Bytes: of the full f16 cache for the tokens of the context; entries, all state and weights of sidecars count, the working room of "
    "one ubatch does not. Retained: mean score over the judged tasks as a share of the full cache's. NLL: nats a token, minus the "
    "full cache's; recall: words of the context that the last 256 tokens do not have. Agreement: with the full cache's own answer. "
    "Brackets: 95 % intervals, paired bootstrap over samples. Over best: retained minus that of the best training-free policy with "
    "the same share, which was chosen on these samples; bold: the interval excludes zero."
)


def table(found: Sequence[Row], versus: Sequence[Row], bold: str = "{}") -> tuple[list[str], list[list[str]]]:
    """Columns and cells: a line per arm and share. What is not retained score is of all lengths together, if there are several."""
    lengths = [n for n in dict.fromkeys(row["length"] for row in found) if n != ALL]
    last = ALL if len(lengths) > 1 else lengths[0] if lengths else None
    columns = ["arm", "kept", "bytes", *(f"retained {n}" for n in lengths)]
    columns += ["answer NLL", "agreement", "book NLL", "recall NLL", "over best"]
    cells = []
    for arm in dict.fromkeys(map(arm_of, found)):
        mine = {row["length"]: row for row in found if arm_of(row) == arm}
        whole = mine.get(last, {})
        any_row = next(iter(mine.values()))
        share = (whole or any_row).get("bytes_share")
        best = [row for row in versus if row["length"] == last and arm_of(row) == arm and row["against_best"]]
        cells.append(
            [
                arm.name,
                "all" if arm.policy == UNBOUNDED else f"{arm.ratio:.0%}",
                "-" if share is None else f"{share:.1%}",
                *(_with_ends(mine.get(n, {}), "retained", ".3f") for n in lengths),
                _with_ends(whole, "nll_delta", "+.3f"),
                _with_ends(whole, "agreement", ".3f"),
                _with_ends(whole, "book_nll_delta", "+.3f"),
                _with_ends(whole, "book_recall_delta", "+.3f"),
                _over_best(whole, best, bold),
            ]
        )
    return columns, cells


def _with_ends(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    if value is None or math.isnan(value):
        return "-"
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    if math.isnan(low) or low == high == value:
        return format(value, form)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _over_best(row: Row, versus: Sequence[Row], bold: str) -> str:
    if row.get("best_training_free"):
        return "is the best"
    return _bold_if_clear(versus[0], "retained_delta", bold) if versus else "-"


def markdown(data: Row) -> str:
    """Of a quality.json: the compact table, then one a length with a column a task."""
    out: list[str] = []
    if found := data.get("standing"):
        columns, cells = table(found, data.get("versus", []), bold="**{}**")
        out += ["### Retained", "", NOTE, "", _line(columns), "|---|" + "--:|" * (len(columns) - 1)]
        out += [*map(_line, cells), ""]
    out += _against([row for row in data.get("versus", []) if row["trained"]])
    for row in data.get("left_out", []):
        out += [f"Left out at {row['length']} tokens: {row['why']}.", ""]
    for length in sorted({row["length"] for row in data["rows"]}):
        out += _of_length(length, [row for row in data["rows"] if row["length"] == length])
    return "\n".join(out)


def _against(versus: Sequence[Row]) -> list[str]:
    """What is trained minus everything that it is held against; nothing if nothing is trained."""
    if not versus:
        return []
    columns = ["length", "arm", "kept", "minus", "its bytes", "retained", "answer NLL", "book NLL"]
    out = ["### Trained minus training-free", "", _line(columns), "|--:|---|--:|---|" + "--:|" * (len(columns) - 4)]
    for row in versus:
        arm = arm_of(row)
        told = (_bold_if_clear(row, f"{key}_delta") for key in ("retained", "nll", "book_nll"))
        against = row["against"] + (", best" if row["against_best"] else "")
        cells = [str(row["length"]), arm.name, f"{arm.ratio:.0%}", against, f"{row['against_share']:.1%}", *told]
        out.append(_line(cells))
    return [*out, ""]


def _bold_if_clear(row: Row, key: str, bold: str = "**{}**") -> str:
    text = _with_ends(row, key, "+.3f")
    return bold.format(text) if text != "-" and row[f"{key}_effect"] not in (NONE, FEW) else text


def _of_length(length: int, rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["task"] for row in rows if row["task"] not in (MEAN, BOOK)))
    columns = ["policy", "memory", "kept", "KV", "state", "mean score", "vs full", *names, "answer NLL", "book NLL"]
    out = [f"### {length} tokens", "", _line(columns), "|---|---|" + "--:|" * (len(columns) - 2)]
    for arm in dict.fromkeys(map(arm_of, rows)):
        mine = {row["task"]: row for row in rows if arm_of(row) == arm}
        mean, book = mine.get(MEAN, {}), mine.get(BOOK, {})
        delta = mean.get("score_delta")
        any_row = next(iter(mine.values()))
        state = (any_row.get("meta_bytes") or 0) + (any_row.get("sidecar_bytes") or 0)  # all but keys and values
        cells = [
            arm.kind,
            arm.memory,
            f"{arm.ratio:.0%}" if any_row["budget"] else "all",
            *(f"{size / 2**20:.1f} MiB" for size in (any_row["kv_bytes"], state)),
            _plain(mean.get("score")),
            "" if delta is None else f"{delta:+.3f} [{mean['score_low']:+.3f}, {mean['score_high']:+.3f}]",
            *(_plain(mine.get(name, {}).get("score")) for name in names),
            _plain(mean.get("nll")),
            _plain(book.get("nll")),
        ]
        out.append(_line(cells))
    counts = sorted({row["n"] for row in rows if row["task"] not in (MEAN, BOOK)})
    if counts:
        out += ["", f"Samples a cell: {counts[0]}" + (f" to {counts[-1]}" if counts[0] != counts[-1] else "") + "."]
    return [*out, ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def plot(figure: Any, report: Any) -> None:
    """Retained score and NLL of the answers (without judged tasks, NLL of the book) over bytes: a panel a length."""
    found = report.extra.get("standing", [])
    lengths = [n for n in dict.fromkeys(row["length"] for row in found) if n != ALL]
    keys = ("retained", "nll_delta") if any("retained" in row for row in found) else ("book_nll_delta",)
    names = {"retained": "retained score", "nll_delta": "answer NLL - full", "book_nll_delta": "book NLL - full"}
    bounded = [row for row in found if row["policy"] != UNBOUNDED]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["policy"] for row in bounded))}
    styles = list(dict.fromkeys(arm_of(row)[2:] for row in bounded))  # memory and type of the entries
    figure.set_size_inches(5.5 * max(len(lengths), 1), 3.8 * len(keys) + 0.8)
    panels = figure.subplots(len(keys), max(len(lengths), 1), squeeze=False)
    for key, axes in zip(keys, panels):
        for length, axis in zip(lengths, axes):
            here = [row for row in found if row["length"] == length and row.get(key) is not None]
            for name in dict.fromkeys(arm_of(row).name for row in here):
                mine = sorted((row for row in here if arm_of(row).name == name), key=lambda row: row["bytes_share"])
                _draw(axis, mine, key, name, colours, styles)
            axis.axhline(1 if key == "retained" else 0, color="black", linestyle="--", linewidth=0.8)
            axis.set(xlabel="% of the bytes of the full f16 cache", ylabel=f"{names[key]}, {length} tokens")
            axis.grid(alpha=0.3)
    handles = {label: h for axis in panels.flat for h, label in zip(*axis.get_legend_handles_labels())}
    if handles:
        columns = 3 if len(lengths) < 2 else 5
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def _draw(
    axis: Any, rows: Sequence[Row], key: str, name: str, colours: dict[str, str], styles: Sequence[tuple[Any, ...]]
) -> None:
    """A line for a policy, a marker for a full cache."""
    x, y = [100 * row["bytes_share"] for row in rows], [row[key] for row in rows]
    ends = [[_reach(row[key], row[f"{key}_{end}"]) for row in rows] for end in ("low", "high")]
    arm = arm_of(rows[0])
    if arm.policy == UNBOUNDED:
        mark = {F16: "*", "q8_0": "s", "q4_0": "D"}.get(arm.cache_type, "^")
        look = {"fmt": mark, "color": "black", "markerfacecolor": "black" if arm.cache_type == F16 else "white"}
    else:
        line = ("-", "--", ":", "-.")[styles.index(arm[2:]) % 4]
        look = {"fmt": "o", "linestyle": line, "color": colours[arm.policy]}
    axis.errorbar(x, y, yerr=ends, label=name, markersize=5, capsize=3, linewidth=1.2, **look)


def _reach(value: float, end: float) -> float:
    return 0.0 if math.isnan(end) else abs(value - end)
