"""All results of a model on one page: an HTML file that holds its pictures, to be kept, sent and opened anywhere."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .report import Row, Verdict, show
from .runner import BenchError

# the order of the page, by what a report's name begins with: what a cache keeps, how fast it is, what it takes; then all others
ORDER = ("quality", "longbench", "needle", "ceiling", "endless", "background", "speed", "stock", "memory", "checkpoint", "serve")
FOLDED = 40  # rows above which a table is closed until somebody opens it
SHARES = ("indexer",)  # arms whose retained scores are worth a line in their sidecar
_HEAD = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }}
table {{ border-collapse: collapse; font-size: 13px; margin: .5rem 0 }}
th, td {{ padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th {{ border-bottom: 2px solid #888 }}
td:first-child, th:first-child {{ text-align: left }}
.wide {{ overflow-x: auto }}  img {{ max-width: 100% }}  .ok {{ color: #176b2c }}  .miss {{ color: #a11 }}  .how {{ color: #555; font-size: 13px }}
</style></head><body>
"""


def collect(folder: Path, model: str | None) -> tuple[str, dict[str, Row]]:
    """The name of the model, and its reports by the names of their files, in the order of the page.

    Args:
        model: a part of the name, where the folder has results of several.

    Raises:
        BenchError: there are none, or of several models.
    """
    found: dict[str, Row] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(f"{path}: expected a report of indexmem bench, found something else ({error})") from None
        if isinstance(data, dict) and isinstance(data.get("meta"), dict) and "benchmark" in data and "model" in data["meta"]:
            found[path.stem] = data
    names = list(dict.fromkeys(str(report["meta"]["model"]) for report in found.values()))
    wanted = [name for name in names if model is None or model in name]
    if not wanted:
        of = f" of {model}" if model else ""
        raise BenchError(f"no results{of} in {folder}" + (f": there are those of {', '.join(names)}" if names else ""))
    stem = min(wanted, key=len).removesuffix(".gguf")
    if others := [name for name in wanted if not name.startswith(stem)]:
        raise BenchError(f"results of several models: name one with --model, such as {stem} or {others[0]}")
    chosen = {name: report for name, report in found.items() if report["meta"]["model"] in wanted}
    return stem, {name: chosen[name] for name in sorted(chosen, key=_place)}


def _place(name: str) -> tuple[int, str]:
    return next((i for i, word in enumerate(ORDER) if name.startswith(word)), len(ORDER)), name


def page(title: str, reports: dict[str, Row], folder: Path) -> str:
    """The page as text."""
    parts = [_HEAD.format(title=_text(f"{title}: results")), f"<h1>{_text(title)}</h1>\n", _contents(reports)]
    if named := scores(reports):
        words = " ".join(f"--score {name}={value:g}" for name, value in named.items())
        parts.append(f"<p>For the sidecar, as options of <code>indexmem-convert</code>: <code>{_text(words)}</code></p>\n")
    for name, report in reports.items():
        parts.append(_section(name, report, folder / f"{name}.png"))
    return "".join(parts) + "</body></html>\n"


def scores(reports: dict[str, Row]) -> dict[str, float]:
    """What an indexer retains of the full cache's score, by length and share, as names of numbers."""
    found = {}
    for report in reports.values():
        for row in report.get("standing", []):
            plain = row.get("memory", "off") == "off" and row.get("cache_type", "f16") == "f16"
            if row.get("policy") in SHARES and plain and row.get("retained") is not None:
                found[f"retained.{row['length']}.{row['ratio']:g}"] = round(float(row["retained"]), 4)
    return found


def _contents(reports: dict[str, Row]) -> str:
    items = "".join(f'<li><a href="#{_text(name)}">{_text(name)}</a></li>' for name in reports)
    return f"<ul>{items}</ul>\n"


def _section(name: str, report: Row, image: Path) -> str:
    meta = report["meta"]
    ran = ", ".join(str(meta[key]) for key in ("model", "cpu", "date") if meta.get(key))
    parts = [f'<h2 id="{_text(name)}">{_text(name)}</h2>\n<p>{_text(ran)}</p>\n']
    if meta.get("command"):
        parts.append(f"<p><code>{_text(meta['command'])}</code></p>\n")
    if meta.get("how"):
        parts.append(f'<p class="how">{_text(meta["how"])}</p>\n')
    if report.get("verdicts"):
        parts.append("<ul>" + "".join(_verdict(verdict) for verdict in report["verdicts"]) + "</ul>\n")
    if image.is_file():
        data = base64.b64encode(image.read_bytes()).decode("ascii")
        parts.append(f'<p><img alt="{_text(name)}" src="data:image/png;base64,{data}"></p>\n')
    for key, rows in report.items():
        if key not in ("meta", "verdicts") and isinstance(rows, list) and rows and isinstance(rows[0], dict):
            parts.append(("" if key == "rows" else f"<h3>{_text(key)}</h3>\n") + _table(rows))
    return "".join(parts)


def _verdict(values: Row) -> str:
    known = {key: values[key] for key in ("name", "value", "threshold", "at_most", "strictly") if key in values}
    verdict = Verdict(**known)
    kind = {True: "ok", False: "miss", None: ""}[verdict.ok]
    mark = {True: "✓ ", False: "✗ ", None: ""}[verdict.ok]
    return f'<li class="{kind}">{mark}{_text(verdict.text)}</li>'


def _table(rows: Sequence[Row]) -> str:
    """Rows as a table; what is the same in all of them stands above it, what is nowhere is left out."""
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if _told(row.get(name) for row in rows)]
    same = [name for name in names if len(rows) > 1 and len({json.dumps(row.get(name)) for row in rows}) == 1]
    shown = [name for name in names if name not in same]
    lines = [f"<tr>{''.join(f'<th>{_text(_words(name))}</th>' for name in shown)}</tr>"]
    cells = ("".join(f"<td>{_text(show(name, row.get(name)))}</td>" for name in shown) for row in rows)
    lines += [f"<tr>{line}</tr>" for line in cells]
    table = f'<div class="wide"><table>{"".join(lines)}</table></div>\n'
    if len(rows) > FOLDED:
        table = f"<details><summary>{len(rows)} rows</summary>{table}</details>\n"
    above = ", ".join(f"{_words(name)} {show(name, rows[0][name])}" for name in same)
    return (f'<p class="how">in all rows: {_text(above)}</p>\n' if above else "") + table


def _told(values: Iterable[Any]) -> bool:
    """Whether a column of these says something in a table: a number or a short word at least once."""
    found = [value for value in values if value is not None]
    return bool(found) and not any(isinstance(value, (list, dict)) for value in found)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    return html.escape(str(value))
