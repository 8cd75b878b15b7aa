"""llama.cpp's own measuring programs, with the options of the cache."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.native.find import program

BENCH, PERPLEXITY = program("llama-bench"), program("llama-perplexity")

pytestmark = pytest.mark.skipif(BENCH is None or PERPLEXITY is None, reason="the programs have not been built (make server)")


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)


def bench(model: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return run(BENCH, "-m", model, "-t", 1, "-r", 1, "--no-warmup", *arguments)


def test_llama_bench_takes_one_budget_after_the_other(demo_model: Path) -> None:
    result = bench(demo_model, "--kv-budget", "0,128", "--kv-window", 32, "-p", 16, "-n", 2, "-d", 160, "-o", "json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["kv_budget"], row["n_prompt"], row["n_gen"]) for row in rows] == [(0, 16, 0), (0, 0, 2), (128, 16, 0), (128, 0, 2)]
    assert all(row["avg_ts"] > 0 for row in rows)


@pytest.mark.parametrize("budget", [None, 256])
def test_llama_bench_shows_a_budget_where_there_is_one(demo_model: Path, budget: int | None) -> None:
    options = ("--kv-budget", budget) if budget else ()
    result = bench(demo_model, "-p", 4, "-n", 0, *options)
    assert result.returncode == 0 and ("kv_budget" in result.stdout) == bool(budget)


@pytest.mark.parametrize(
    "arguments, wrong",
    [
        (["--kv-budget", "12x"], "found '12x'"),
        (["--kv-budget"], "--kv-budget needs a value"),
        (["--kv-window", "3"], "need a --kv-budget"),
        (["--kv-budget", "64", "--kv-policy", "keydif"], "unknown policy 'keydif'"),
        (["--kv-budget", "256", "-fa", "off"], "flash attention"),
    ],
)
def test_llama_bench_says_what_is_wrong(demo_model: Path, arguments: list[str], wrong: str) -> None:
    result = bench(demo_model, "-p", 4, "-n", 0, *arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and wrong in errors[0]


def test_perplexity(demo_model: Path, tmp_path: Path) -> None:
    """A budget that holds a whole chunk changes nothing, a smaller one little."""
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")[:4000], encoding="utf-8")

    def perplexity(*options: Any) -> float:
        result = run(PERPLEXITY, "-m", demo_model, "-f", text, "-c", 256, "-b", 256, "--chunks", 2, "-t", 2, *options)
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", result.stdout + result.stderr)
        assert result.returncode == 0 and found, result.stderr
        return float(found[1])

    whole = perplexity("-fa", "on")
    assert perplexity("--kv-budget", 512) == pytest.approx(whole, rel=2e-3)
    small = perplexity("--kv-budget", 96, "--kv-window", 32, "-ub", 32)
    assert small != whole and small == pytest.approx(whole, rel=0.3)
