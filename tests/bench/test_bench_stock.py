"""`bench stock`: which library it takes, what its workers answer, and a run in which our own library stands in for the stock one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.bench.report import Verdict
from indexmem_edge.bench.runner import BenchError, Setup
from indexmem_edge.bench.stock import environment, remote, run, worker
from indexmem_edge.native.find import library_dir
from support.bench_data import invoke

LIBRARY = "llama.dll" if sys.platform == "win32" else "libllama.so"


@pytest.mark.parametrize("place", ["", "bin", "lib/python3.11/site-packages/llama_cpp/lib"])
def test_the_libraries_are_found_where_people_have_them(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LIBRARY).write_bytes(b"a stock library")
    assert environment.stock_library(tmp_path, print) == folder.resolve()


def test_our_own_library_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="found neither"):
        environment.stock_library(tmp_path, print)
    with pytest.raises(BenchError, match="has the bounded cache"):
        environment.stock_library(library_dir(), print)


def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(environment.venv, "create", lambda *args, **keywords: None)
    failed = subprocess.CompletedProcess([], 1, stdout="Collecting\nERROR: no compiler\n\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **keywords: failed)
    with pytest.raises(BenchError, match=r"ERROR: no compiler.*--stock"):
        environment.stock_library(None, said.append)
    assert len(said) == 1 and str(tmp_path) in said[0]


def test_a_worker_answers_and_survives_what_it_cannot_do() -> None:
    out = io.StringIO()
    requests = [
        {"do": "figures"},
        {"do": "dance"},
        {},
        {"do": "open", "model": "none", "setup": {}, "shift": False, "text": None},
    ]
    worker.serve(io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), out)
    answers = [json.loads(line)["error"] for line in out.getvalue().splitlines()]
    assert [word in answer for word, answer in zip(("open a model", "'dance'", "None", "no model file"), answers)] == [True] * 4


def test_a_worker_that_ends_is_an_error_with_its_name(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "START", "pass")
    with pytest.raises(BenchError, match="^mine: "):
        remote.Remote("mine", tiny("llama")[0], Setup(), library=None, shift=False, text=None)


def test_each_contender_has_what_it_needs() -> None:
    ours = Setup(policy="streaming", budget=64, ubatch=32)
    found = run.contenders([ours], 500)
    assert [c.name for c in found] == [run.FLASH, run.NO_FLASH, run.SHIFT, "streaming 64"]
    assert [c.unbounded for c in found] == [True, True, False, False]
    assert [c.setup.budget for c in found] == [0, 0, 0, 64] and found[2].setup.n_ctx == 64 and found[2].setup.ubatch == 8
    assert all(c.setup.n_ctx > 500 + run.QUESTION for c in found[:2])
    quantised = run.contenders([Setup(policy="streaming", budget=64, cache_type="q8_0")], 500)
    assert [c.name for c in quantised] == [run.FLASH, run.SHIFT, "streaming 64"]


def test_the_verdicts_take_our_slowest_and_their_best() -> None:
    def row(system: str, stock: bool, tps: float, ms: float, peak: float, seconds: float, depth: int = 100) -> dict[str, Any]:
        return {
            "system": system, "stock": stock, "depth": depth, "decode_tps": tps, "first_token_ms": ms, "peak_bytes": peak,
            "prompt_seconds": seconds,
        }  # fmt: skip

    rows = [
        row(run.FLASH, True, 10, 8, 50, 4), row(run.NO_FLASH, True, 20, 6, 40, 9), row(run.SHIFT, True, 30, 1, 10, 1),
        row("a", False, 60, 2, 20, 2), row("b", False, 40, 3, 10, 1), row("a", False, 1, 99, 99, 99, depth=500),
    ]  # fmt: skip
    found = {verdict.name: verdict for verdict in run.verdicts(rows)}
    values = [round(float(verdict.value or 0), 3) for verdict in found.values()]
    assert values == [40 / 20, 4 / 2, round(40 / 30, 3), 6 / 3, 20 / 40]
    assert all(verdict.ok for verdict in found.values())
    assert run.verdicts([row("a", False, 1, 1, 1, 1)]) == []
    assert Verdict("x", 2, 1, at_most=True).ok is False


def test_a_whole_run_with_our_library_in_place_of_the_stock_one(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "stock_library", lambda folder, say: library_dir())
    sizes = ["--depths", "0,200,400", "--unbounded-max", 200, "--repeats", 2]
    invoke(
        "stock", "-m", tiny("llama")[0], "-b", 128, "--kv-window", 32, "-ub", 32, "-t", 1, *sizes, "--out", tmp_path, "--json"
    )
    data = json.loads((tmp_path / "stock.json").read_text())
    plain, everything = "streaming 128", "indexer 128, memory centroid"
    stock, all_along = [run.FLASH, run.NO_FLASH], [run.SHIFT, plain, everything]
    expected = [(s, d) for d in (0, 200) for s in (*stock, *all_along)] + [(s, 400) for s in all_along]
    assert [(row["system"], row["depth"]) for row in data["rows"]] == expected
    assert all(row["seen"] == row["depth"] for row in data["rows"] if row["system"] in stock)
    assert all(row["seen"] >= row["depth"] and row["peak_bytes"] > 0 for row in data["rows"])
    assert all(row["decode_vs_stock"] > 0 for row in data["rows"] if row["depth"] <= 200)
    assert [row.get("decode_vs_stock") for row in data["rows"] if row["depth"] == 400] == [None] * 3
    assert {row["prompt_seconds"] for row in data["rows"] if not row["depth"]} == {None}
    longer = {row["system"]: row["prompt_seconds"] for row in data["rows"] if row["depth"] == 400}
    assert all(
        longer[row["system"]] > row["prompt_seconds"] for row in data["rows"] if row["depth"] == 200 and row["system"] in longer
    )
    assert len(data["verdicts"]) == 5 and data["meta"]["stock"] and data["meta"]["library"]
