"""Graphs that come back from earlier tokens compute what graphs that are built anew do, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import llama_cpp
from reference.indexers import random_indexer, write_sidecar
from support.comparing import EVICTING, tokens_of
from support.native_context import Context, open_model

SIZES = [32, 32, 32, 7, *[1] * 40, 32, 1, 5, *[1] * 20]  # evicts and renews positions in prefill and in decode


class Run(NamedTuple):
    logits: list[np.ndarray]
    positions: Any
    state: bytes
    n_reused: int  # graphs that came back
    changed: bool  # entries left, and positions were renewed


def run(model: Any, tokens: list[int], sizes: list[int], **options: Any) -> Run:
    with Context(model, n_ubatch=32, n_threads=1, **options) as context:
        logits, at = [], 0
        for n in sizes:
            logits.append(context.decode(tokens[at : at + n]).copy())
            at += n
        stats, n_reused = context.stats(), int(llama_cpp.llama_perf_context(context.ctx).n_reused)
        return Run(logits, context.positions(), context.save(0), n_reused, stats.n_rebases > 0 and stats.n_evicted > 0)


def assert_same(again: Run, anew: Run) -> None:
    for a, b in zip(again.logits, anew.logits, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_equal(again.positions, anew.positions)
    assert again.state == anew.state


@pytest.mark.parametrize("policy, memory", [*((policy, "off") for policy in EVICTING), ("indexer", "off"), ("keydiff", "centroid")])
def test_the_same_bits(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, memory: str) -> None:
    path, config = tiny("llama")
    options: dict[str, Any] = {"policy": policy, "budget": 40, "sinks": 2, "window": 8, "span": 96}
    if policy == "indexer":
        write_sidecar(tmp_path / "s.gguf", random_indexer("retention-mlp", config.n_layer, config.n_embd, config.n_head_kv, 0))
        options["sidecar"] = tmp_path / "s.gguf"
    if memory != "off":
        options |= {"memory": memory, "memory_slots": 8}
    tokens = tokens_of(config, sum(SIZES))
    with open_model(path) as model:
        again = run(model, tokens, SIZES, **options)
        monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", "1")
        anew = run(model, tokens, SIZES, **options)
    assert again.n_reused > 30 and anew.n_reused == 0 and again.changed
    assert_same(again, anew)


# how many graphs come back: of a few sizes all but the first of each, of more sizes than are kept none
@pytest.mark.parametrize("sizes, n_reused", [([3, 5, 1, 2] * 12, 44), (list(range(2, 18)) * 2, 0)], ids=["few", "many"])
def test_drafts_come_in_several_sizes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, sizes: list[int], n_reused: int) -> None:
    path, config = tiny("llama")
    options: dict[str, Any] = {"policy": "streaming", "budget": 512}
    tokens = tokens_of(config, sum(sizes))
    with open_model(path) as model:
        again = run(model, tokens, sizes, **options)
        monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", "1")
        anew = run(model, tokens, sizes, **options)
    assert again.n_reused == n_reused and anew.n_reused == 0
    assert_same(again, anew)
