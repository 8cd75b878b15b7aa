"""`bench stock`: which library it takes, what its workers answer, and a run in which our own library stands in for the stock one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress

from indexmem_edge.bench.report import Verdict
from indexmem_edge.bench.runner import BenchError, Model, Setup, System
from indexmem_edge.bench.stock import copies, environment, remote, run, worker
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
            "prompt_seconds": seconds, "everything": stock and system != run.SHIFT,
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


@pytest.mark.parametrize("flash", [True, False])
def test_a_cache_filled_with_copies_is_that_of_the_text_said_again(tiny: Any, flash: bool) -> None:
    """In a model of one layer keys and values depend on nothing but the token and its position."""
    model = Model(tiny("llama", n_layer=1)[0])
    setup = Setup(n_ctx=256, flash=flash, cache_type="f32", threads=1, ubatch=16, sequences=2)
    said = [int(t) for t in np.random.default_rng(3).integers(3, 60, 30)]
    with System(model, setup) as filled, System(model, setup) as read:
        filled.feed(said, last_logits=True)
        copies.fill_with_copies(filled, 70)
        read.feed([*said, *said, *said[:10]], last_logits=True)
        for token in (5, 6):
            filled.step(token)
            read.step(token)
        assert filled.seen == read.seen == 72 and filled.logits is not None and read.logits is not None
        np.testing.assert_allclose(filled.logits, read.logits, atol=1e-4)
        with pytest.raises(BenchError, match="room"):
            copies.fill_with_copies(filled, 1000)


def test_a_whole_run_with_our_library_in_place_of_the_stock_one(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "stock_library", lambda folder, say: library_dir())
    sizes = ["--depths", "0,200,400", "--unbounded-max", 200, "--repeats", 2, "--own"]
    invoke(
        "stock", "-m", tiny("llama")[0], "-b", 128, "--kv-window", 32, "-ub", 32, "-t", 1, *sizes, "--out", tmp_path, "--json"
    )
    data = json.loads((tmp_path / "stock.json").read_text())
    plain, everything = "streaming 128", "indexer 128, memory centroid"
    unbounded, bounded = [run.FLASH, run.NO_FLASH, run.OWN], [run.SHIFT, plain, everything]
    expected = [(s, d) for d in (0, 200, 400) for s in (run.FLASH, run.NO_FLASH, run.SHIFT, run.OWN, plain, everything)]
    assert [(row["system"], row["depth"]) for row in data["rows"]] == expected
    assert all(row["seen"] == row["depth"] for row in data["rows"] if row["system"] in unbounded)
    assert all(row["seen"] >= row["depth"] and row["peak_bytes"] > 0 for row in data["rows"])
    assert all(row["decode_vs_stock"] > 0 for row in data["rows"])
    assert {row["system"] for row in data["rows"] if row["copied"]} == set(unbounded)
    assert {row["depth"] for row in data["rows"] if row["copied"]} == {400}
    assert {row["prompt_seconds"] for row in data["rows"] if not row["depth"]} == {None}
    seconds = {(row["system"], row["depth"]): row["prompt_seconds"] for row in data["rows"]}
    assert all(seconds[s, 400] > seconds[s, 200] > 0 for s in (*unbounded, *bounded))
    assert len(data["verdicts"]) == 5 and data["meta"]["stock"] and data["meta"]["library"]


def test_bounded_caches_stop_where_they_are_told_to_and_what_a_longer_prompt_takes_is_computed(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "stock_library", lambda folder, say: library_dir())
    arguments = ("stock", "-m", tiny("llama")[0], "-b", 128, "--kv-window", 32, "-ub", 32, "-t", 1, "--repeats", 1)
    sizes = ("--depths", "260,1200,2400", "--unbounded-max", 100, "--bounded-max", 260)
    invoke(*arguments, *sizes, "--out", tmp_path, "--json")
    data = json.loads((tmp_path / "stock.json").read_text())
    bounded = [row for row in data["rows"] if not row["everything"]]
    assert len(bounded) == 9 and all(260 <= row["seen"] < 1200 for row in bounded)
    assert {row["depth"] for row in bounded if row["computed"]} == {1200, 2400}
    for name in {row["system"] for row in bounded}:
        first, second, third = (row["prompt_seconds"] for row in bounded if row["system"] == name)
        assert 0 < first < second < third  # the rest of the way at the pace of the end
    assert "260 tokens" in data["meta"]["how"]


def test_a_cache_that_is_not_full_does_not_stand_for_one_that_is(tiny: Any) -> None:
    bounded = [Setup(policy="streaming", budget=128)]
    with pytest.raises(BenchError, match="--bounded-max 200 of a budget of 128.*at least 256"), Progress() as progress:
        run.run_stock(
            tiny("llama")[0], bounded, [1200], library_dir(), unbounded_max=100, bounded_max=200, rounds=1, text=None, progress=progress
        )
