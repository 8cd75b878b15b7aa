"""From a model and books to a sidecar that the runtime loads, with the real objectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import Tiny

torch = pytest.importorskip("torch")

import indexmem_edge
from indexmem_edge.cli.app import app
from indexmem_edge.convert import read_sidecar
from indexmem_edge.models.demo import demo_sidecar
from indexmem_edge.native import find
from support.training import write_books

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

SMALL = (
    "--length", 320, "--samples", 4, "--batch", 2, "--eval-samples", 1, "--eval-every", 0, "--kv-window", 16,
    "--mid-dim", 32, "--device", "cpu", "--generated", 0.5, "--held-out", 0.3,
)  # fmt: skip


def train(path: Path, folder: Path, *more: Any) -> Path:
    write_books(folder / "books", sizes=(6000, 3000))
    out = folder / "m.indexmem.gguf"
    words = ["train", "-m", path, "--text", folder / "books", "--out", out, *SMALL, *more]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(
    ("arch", "options", "kinds"),
    [
        ("llama", ("--objective", "regress,gated-kl,select-kl", "--steps", "12,4,2", "--decay"), ("retention", "none")),
        ("qwen3", ("--kind", "kvzap", "--steps", 4, "--memory", "centroid", "--memory-slots", 8), ("kvzap", "centroid")),
        ("qwen2", ("--kind", "pairwise", "--memory", "residual", "--steps", 3, "--lr", "1e-3,5e-2", "--length", 600), ("pairwise", "residual")),
        ("granite", ("--memory", "residual", "--steps", 3, "--lr", "1e-3,5e-2", "--length", 600), ("retention", "residual")),
        ("phi3", ("--steps", 3), ("retention", "none")),
        ("qwen3moe", ("--objective", "regress,select-kl", "--steps", "3,1"), ("retention", "none")),
        ("smollm3", ("--kind", "kvzap", "--steps", 3), ("kvzap", "none")),
        ("gemma", ("--objective", "gated-kl", "--steps", 2), ("retention", "none")),
        ("gemma3", ("--objective", "regress,gated-kl,select-kl", "--steps", "3,2,1"), ("retention", "none")),
        ("gemma3", ("--memory", "residual", "--steps", 3, "--lr", "1e-3,5e-2", "--length", 600), ("retention", "residual")),
        ("gemma3", ("--kind", "pairwise", "--memory", "centroid", "--steps", 2), ("pairwise", "centroid")),
        ("qwen3vl", ("--steps", 3), ("retention", "none")),
    ],
)  # fmt: skip
def test_what_was_trained_runs(tiny: Tiny, tmp_path: Path, arch: str, options: Any, kinds: tuple[str, str]) -> None:
    path, _ = tiny(arch)
    out = train(path, tmp_path, *options)
    c = read_sidecar(out).checkpoint
    assert (c.kind, c.memory) == kinds and c.architecture == arch and c.fingerprint
    assert c.provenance.source_format == "indexmem-edge" and "held_out_recall" in c.scores
    run = tmp_path / "m.indexmem.train"
    assert json.loads((run / "recall.json").read_text()) and (run / "metrics.jsonl").read_text().count("\n") > 3
    assert not (run / "prepared").exists()
    llm = indexmem_edge.Llama(
        str(path), kv_budget=96, kv_window=16, indexmem=str(out), n_ubatch=64, n_threads=1, n_threads_batch=1, verbose=False
    )
    llm.eval([3 + (7 * i) % 250 for i in range(300)])
    stats = llm.kv_stats()
    assert stats.evicted > 0 and stats.policy == "indexer"
    assert c.only == ((1, 3) if arch == "gemma3" else None)
    assert np.isfinite(np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),))).all()
    llm.close()


def test_a_training_goes_on_from_the_indexer_of_a_sidecar(tiny: Tiny, tmp_path: Path) -> None:
    path, _ = tiny("llama")
    first = train(path, tmp_path / "a", "--steps", 3, "--outtype", "f32")
    again = ("--objective", "select-kl", "--steps", 1, "--lr", "1e-9", "--outtype", "f32", "--from", first)
    second = train(path, tmp_path / "b", *again)
    assert "held_out_recall.start" in read_sidecar(second).checkpoint.scores
    a, b = (read_sidecar(out).tensors for out in (first, second))
    assert a.keys() == b.keys() and all(np.allclose(a[name], b[name], atol=1e-6) for name in a)
    refused = CliRunner().invoke(app, [str(word) for word in (
        "train", "-m", path, "--text", tmp_path / "a/books", "--out", tmp_path / "c.gguf", *SMALL, *again, "--kind", "kvzap",
    )])  # fmt: skip
    assert refused.exit_code and "is of kind retention" in refused.output


def test_regression_raises_recall(tiny: Tiny, tmp_path: Path) -> None:
    """Recall at half of the context, relative to the oracle, of text whose attention has an order to learn."""
    out = train(tiny("llama", n_layer=1)[0], tmp_path, "--steps", 60, "--lr", "1e-2", "--samples", 8, "--generated", 0)
    scores = read_sidecar(out).checkpoint.scores
    assert scores["held_out_recall"] > scores["held_out_recall.untrained"] + 0.005


def test_the_sidecar_of_the_demo_model(demo_model: Path) -> None:
    """It is for that model, says where it comes from and what was measured, and is small."""
    path = demo_sidecar()
    assert path.stat().st_size < 12e6
    c = read_sidecar(path).checkpoint
    assert c.kind in ("retention", "kvzap") and c.architecture == "llama" and c.geometry.block_count == 30
    assert c.provenance.trained_on and c.provenance.step and c.scores["held_out_recall"] > 0.8
    llm = indexmem_edge.Llama(str(demo_model), kv_budget=256, indexmem=str(path), n_threads=1, n_threads_batch=1, verbose=False)
    needle = "The secret number of the silver lantern is 4718206."
    hay = " ".join(f"Day {i}: it rained again, and nothing of note was written down." for i in range(60))
    text = f"{needle} {hay}\nQuestion: What is the secret number of the silver lantern?\nAnswer: The secret number of the silver lantern is"
    answer = llm.create_completion(text, max_tokens=10, temperature=0)["choices"][0]["text"]
    assert "4718206" in answer and llm.kv_stats().evicted > 500
    llm.close()
