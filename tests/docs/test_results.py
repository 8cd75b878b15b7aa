"""bench/results: what docs/results.md names is there, and holds summaries, no single samples."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
FILES = sorted(RESULTS.glob("*.json"))


def rows(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from rows(part)


def test_files_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`([\w-]+\.json)`", PAGE))
    assert len(named) > 10
    assert not [name for name in named if not (RESULTS / name).exists()]
    used = set(re.findall(r"\.\./bench/results/([\w-]+\.png)", PAGE))
    assert used == {path.name for path in RESULTS.glob("*.png")} - UNUSED, (
        "a plot that no page shows, or the other way round"
    )


UNUSED = {"endless-facts-2048.png", "endless-facts-outlive.png", "indexer-qwen3-4b.png", "soak.png"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_single_samples(path: Path) -> None:
    report = json.loads(path.read_text(encoding="utf-8"))
    assert not any(
        {"sample", "text", "tokens"} <= set(row) or isinstance(row.get("sample"), int) for row in rows(report)
    )
    assert path.stat().st_size < 200_000


def test_rows_of_single_samples_are_ignored_by_git() -> None:
    name = "bench/results/quality.rows.jsonl"
    asked = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT)
    if asked.returncode == 128:
        pytest.skip("not a clone")
    assert asked.returncode == 0


def test_what_the_readme_says_eviction_costs_is_what_was_measured() -> None:
    rows = json.loads((RESULTS / "quality-hard.json").read_text(encoding="utf-8"))["rows"]
    scores: dict[tuple[str, float], list[float]] = {}  # of all tasks, with as many samples of each
    for row in (row for row in rows if row["task"] != "mean"):
        assert row["n"] == 20 or row["ratio"] == 0.02
        scores.setdefault((row["policy"], row["ratio"]), []).append(row["score"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (a tenth|a twentieth) \| ([\d.]+) \| ([\d.]+) \|$", readme, flags=re.M)
    assert [share for share, *_ in table] == ["a tenth", "a twentieth"]
    for (_, *said), ratio in zip(table, (0.1, 0.05)):
        for policy, share in zip(("indexer", "streaming"), said):
            assert len(scores[policy, ratio]) == len(scores["full", 1.0]) == 6
            assert share == f"{sum(scores[policy, ratio]) / sum(scores['full', 1.0]):.2f}"

    report = json.loads((RESULTS / "quality-trained.json").read_text(encoding="utf-8"))
    measured = {
        (row["policy"], row["ratio"]): f"{row['retained']:.2f}"
        for row in report["standing"]
        if row["length"] == 2048 and row["cache_type"] == "q8_0"
    }
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    for policy in ("streaming", "keydiff"):
        kept = [measured[policy, share] for share in (0.5, 0.25, 0.1)]
        row = next(line for line in guide.splitlines() if line.startswith("|") and f"`{policy}`" in line.split("|")[2])
        assert re.findall(r"0\.\d\d", row)[:3] == kept, policy
