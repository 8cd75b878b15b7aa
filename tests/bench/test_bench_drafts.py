"""`indexmem bench drafts`: passages and tasks, and a short run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from indexmem_edge.bench.cli.app import app
from indexmem_edge.bench.runner import BenchError
from indexmem_edge.bench.speed.drafts import PASSAGE, passages_of, task_of
from indexmem_edge.bench.text import builtin_text


def test_passages_are_whole_sentences_and_do_not_overlap() -> None:
    text = builtin_text(9000)
    passages = passages_of(text, 4)
    assert all(PASSAGE // 2 < len(passage) <= PASSAGE and passage.endswith(".") for passage in passages)
    places = [text.index(passage) for passage in passages]
    assert all(place + len(passage) <= following for place, passage, following in zip(places, passages, places[1:]))
    with pytest.raises(BenchError, match="longer"):
        passages_of(text, 40)


def test_the_most_frequent_word_is_replaced() -> None:
    assert "write 'MAPLE' wherever it says 'maple'" in task_of("A maple and a maple beside an aspen")


def test_a_run(demo_model: Path, tmp_path: Path) -> None:
    arguments = "drafts --kv-budget 400 --kv-policy streaming --passages 1 --tokens 40 --repeats 1 -t 1 --json".split()
    result = CliRunner().invoke(app, [*arguments, "-m", str(demo_model), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "drafts.json").read_text())
    (row,) = report["rows"]
    assert row["tokens"] == 40 and row["evicted"] > 0 and row["tokens_a_batch"] > 1 and row["same"]
    assert [verdict["threshold"] for verdict in report["verdicts"]] == [1.8, 1.0]
