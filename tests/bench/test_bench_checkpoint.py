"""Measuring copies of the state: one row a budget, and the conversation goes on after it."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from indexmem_edge.bench.runner import Model, Setup
from indexmem_edge.bench.speed import checkpoint


def test_a_row_of_each_budget(demo_model: Path) -> None:
    base = Setup(policy="streaming", window=32, ubatch=64)
    report = checkpoint.run_checkpoint(Model(demo_model), base, [96, 192], 2, text=None, progress=Progress(disable=True))
    small, large = report.rows
    assert (small["budget"], large["budget"]) == (96, 192)
    assert 1.8 < large["state_bytes"] / small["state_bytes"] < 2.2
    assert all(row[name] > 0 for row in report.rows for name in checkpoint.COLUMNS[2:])
