"""Data that the tests of the benchmarks share, and how they run a command."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from indexmem_edge.bench import synthetic
from indexmem_edge.bench.runner import Model
from indexmem_edge.bench.text import builtin_text


def single_runs() -> list[dict[str, Any]]:
    """Full cache and one policy on tasks a (half lost) and b (full cannot), four samples."""
    rows = []
    for policy, ratio in (("full", 1.0), ("knorm", 0.25)):
        for task in ("a", "b", "book"):
            for i in range(4):
                score = None if task == "book" else float(task == "a" and (policy == "full" or i < 2))
                rows.append(
                    {"task": task, "length": 64, "policy": policy, "ratio": ratio, "sample": i, "score": score}
                    | {
                        "nll": 1.0 + (policy != "full"),
                        "budget": 16,
                        "tokens_seen": 64,
                        "kv_bytes": 2**20,
                        "meta_bytes": 2**18,
                        "sidecar_bytes": 2**18,
                        "rss_bytes": 9,
                        "bytes_share": ratio,
                    }
                )
    return rows


def invoke(*words: Any) -> Any:
    from typer.testing import CliRunner

    from indexmem_edge.bench.cli.app import app

    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def ruler_folder(folder: Path, seed: int = 0) -> Path:
    """Two samples of two tasks, in the form of the official generators."""
    (folder / "256").mkdir(parents=True)
    for task in ("niah_single_1", "vt"):
        row = {"input": builtin_text(250, seed) + "\nWhich one?", "answer_prefix": " It is", "outputs": ["pears", "key"]}
        with gzip.open(folder / "256" / f"{task}.jsonl.gz", "wt") as file:
            file.write((json.dumps(row) + "\n") * 2)
    return folder


def sidecar_shape(path: Path) -> synthetic.Shape:
    model = Model(path)
    try:
        return synthetic.shape_of(model)
    finally:
        model.close()
