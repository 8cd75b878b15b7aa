"""`bench report`: one page of all results of a model, which holds whatever a report says, safely."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.bench import page
from indexmem_edge.bench.report import Report, Verdict
from indexmem_edge.bench.runner import BenchError
from support.bench_data import invoke

DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def save(folder: Path, name: str, model: str = "small.gguf", rows: Any = (), **more: Any) -> None:
    report = Report(name, {"model": model, "cpu": "a <fast> one", "command": "bench x"}, list(rows), **more)
    report.save(folder)


class Reader(HTMLParser):
    """Tags that are open must be closed in order; collects cells and the words of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_a_page_has_everything_and_nothing_is_markup_by_accident(tmp_path: Path) -> None:
    rows = [
        {"policy": "streaming<b>", "budget": 64, "kv_bytes": 2**20, "nothing": None, "interval": [1, 2], "decode_tps": float(tps)}
        for tps in (10, 20)
    ]
    verdicts = [Verdict("fast & small", 2.0, 1), Verdict("slow", 0.5, 1), Verdict("told", None)]
    save(tmp_path, "speed", rows=rows, verdicts=verdicts, extra={"latency": [{"p50_ms": 1.5}]})
    (tmp_path / "speed.png").write_bytes(DOT)
    save(tmp_path, "quality", "small-as-bf16.gguf", rows=[{"task": "vt", "score": 0.5}])
    invoke("report", tmp_path, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    found = read(text)
    assert text.index('id="quality"') < text.index('id="speed"')
    assert base64.b64encode(DOT).decode() in text and "<b>" not in text and "a &lt;fast&gt; one" in text
    assert found.cells == ["vt", "0.500", "10.0", "20.0", "1.500"]  # what all rows share stands above them
    assert "in all rows: policy streaming<b>, budget 64, kv bytes 1.00 MiB" in found.words
    said = " ".join(found.words)
    assert "✓ fast & small: 2.000 (at least 1)" in said and "✗ slow: 0.500" in said and "told: not measured" in said


def test_many_rows_are_folded(tmp_path: Path) -> None:
    save(tmp_path, "memory", rows=[{"tokens_seen": n} for n in range(page.FOLDED + 1)])
    assert f"<summary>{page.FOLDED + 1} rows</summary>" in page.page("x", page.collect(tmp_path, None)[1], tmp_path)


def test_scores_are_those_of_the_indexer_alone() -> None:
    def row(**values: Any) -> dict[str, Any]:
        return {"length": 2048, "policy": "indexer", "ratio": 0.25, "memory": "off", "cache_type": "f16", "retained": 0.91234, **values}

    rows = [row(), row(policy="streaming", ratio=0.5), row(memory="centroid", ratio=0.1), row(length="all", retained=None)]
    assert page.scores({"quality": {"standing": rows}}) == {"retained.2048.0.25": 0.9123}
    text = page.page("x", {"quality": {"meta": {"model": "x"}, "standing": rows}}, Path())
    assert "--score retained.2048.0.25=0.9123" in text


def test_folders_that_make_no_page(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="^no results in"):
        page.collect(tmp_path, None)
    (tmp_path / "other.json").write_text(json.dumps({"path": "not a report"}))
    save(tmp_path, "speed", "a.gguf", rows=[{"x": 1}])
    save(tmp_path, "memory", "b.gguf", rows=[{"x": 1}])
    with pytest.raises(BenchError, match="several models: name one with --model, such as . or "):
        page.collect(tmp_path, None)
    assert page.collect(tmp_path, "b")[0] == "b"
    with pytest.raises(BenchError, match=r"no results of c in .*: there are those of b.gguf, a.gguf"):
        page.collect(tmp_path, "c")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(BenchError, match="broken.json: expected a report"):
        page.collect(tmp_path, "a")
