"""What a benchmark leaves: a table for people, JSON for programs, a plot."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from indexmem_edge.cli.console import console

Row = dict[str, Any]
ROW_KEYS = ("policy", "budget", "tokens_seen", "kv_bytes", "rss_bytes", "prefill_tps", "decode_tps")
PIPE_WIDTH = 160  # columns of a table where there is no terminal
WORDS = ("action", "arm", "policy", "task", "system", "memory")  # columns of text
QUALITY_KEYS = ("task", "length", "score", "nll", "n")


@dataclass
class Verdict:
    """A claim with a number: `value` is to be at least (or at most, or above) `threshold`; no threshold: it is only told."""

    name: str
    value: float | None
    threshold: float | None = None
    at_most: bool = False
    strictly: bool = False  # above

    @property
    def ok(self) -> bool | None:
        if self.threshold is None or self.value is None:
            return None
        if self.strictly:
            return self.value > self.threshold
        return self.value <= self.threshold if self.at_most else self.value >= self.threshold

    def to_dict(self) -> Row:
        return {
            "name": self.name,
            "value": self.value,
            "threshold": self.threshold,
            "at_most": self.at_most,
            "strictly": self.strictly,
            "ok": self.ok,
        }

    def __str__(self) -> str:
        word = {True: "[green]ok[/]  ", False: "[red]MISS[/]", None: "    "}[self.ok]
        return f"{word} {self.text}"

    @property
    def text(self) -> str:
        """The claim, its number and the goal."""
        bound = "at most" if self.at_most else "above" if self.strictly else "at least"
        bound = "" if self.threshold is None else f" ({bound} {self.threshold:g})"
        return f"{self.name}: {'not measured' if self.value is None else format(self.value, '.3f')}{bound}"


@dataclass
class Report:
    name: str
    meta: Row
    rows: list[Row] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    extra: dict[str, list[Row]] = field(default_factory=dict)  # rows of another kind, by name
    singles: list[Row] = field(default_factory=list)  # of single samples: large, and kept beside the report

    def add(self, **values: Any) -> Row:
        """Adds a row; the keys that every row has are there even when nothing was measured for them."""
        row: Row = dict.fromkeys(ROW_KEYS + (QUALITY_KEYS if self.name == "quality" else ()))
        row.update(values)
        self.rows.append(row)
        return row

    def to_dict(self) -> Row:
        return {
            "benchmark": self.name,
            "meta": self.meta,
            "rows": self.rows,
            "verdicts": [v.to_dict() for v in self.verdicts],
            **self.extra,
        }

    def save(self, out: Path, plot: Callable[[Any, Report], None] | None = None) -> list[Path]:
        """Writes `name`.json, and `name`.png when matplotlib is there. Safe to repeat while a run goes on.

        What is known of single samples goes to `name`.rows.jsonl, which stays out of the repository.
        """
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{self.name}.json"
        _replace(path, as_text(self.to_dict()))
        if self.singles:
            _replace(path.with_suffix(".rows.jsonl"), "".join(json.dumps(_plain(row)) + "\n" for row in self.singles))
        image = draw(out / f"{self.name}.png", self, plot) if plot else None
        return [path] + ([image] if image else [])

    def print(self, columns: Sequence[str], rows: Sequence[Row] | None = None) -> None:
        """The table, of all rows or of some, and the verdicts."""
        title = f"{self.name}: {self.meta['model']}, {self.meta['threads']} threads, {self.meta['cpu']}"
        print_rows(title, columns, self.rows if rows is None else rows)
        for verdict in self.verdicts:
            console(width_in_pipes=PIPE_WIDTH).print(str(verdict))


def report_name(kind: str, geometry: str | None, cache_type: str) -> str:
    """A report of its own for each geometry and each type of cache."""
    words = [kind, *([geometry] if geometry else []), *([] if cache_type == "f16" else [cache_type.replace("/", "-")])]
    return "-".join(words)


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """A table of the keys `columns` of rows, those left out for which none has a value; nothing without rows."""
    if not rows:
        return
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    names = [name.replace("_", " ") for name in columns]
    print_table(title, names, [[show(name, row.get(name)) for name in columns] for row in rows])


def print_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in WORDS else "right")
    for row in cells:
        table.add_row(*row)
    console(width_in_pipes=PIPE_WIDTH).print(table)


def show(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 2**20:.2f} MiB"
    if name.endswith("_tps"):
        return f"{value:.1f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def as_text(report: Row) -> str:
    """JSON with a line for each row, so that changes can be read."""
    lines = []
    for key, value in _plain(report).items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]" if rows else json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def draw(path: Path, report: Report, plot: Callable[[Any, Report], None]) -> Path | None:
    try:
        import matplotlib
    except ImportError:
        console(error=True).print(
            f"no {path.name}: it takes matplotlib (pip install matplotlib); the table and the JSON are complete"
        )
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 4.2), layout="constrained")
    plot(figure, report)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def series(rows: Sequence[Row], x: str, y: str) -> tuple[list[Any], list[Any]]:
    points = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    return [p[0] for p in points], [p[1] for p in points]
