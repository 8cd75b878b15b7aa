"""Graphs that come back from earlier tokens compute what graphs that are built anew do, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import llama_cpp
from reference.indexers import random_indexer, write_sidecar
from support.comparing import EVICTING, tokens_of
from support.native_context import Context, open_model

SIZES = [32, 32, 32, 7, *[1] * 40, 32, 1, 5, *[1] * 20]  # evicts and renews positions in prefill and in decode


def run(model: Any, tokens: list[int], **options: Any) -> tuple[list[np.ndarray], Any, bytes, int]:
    """Logits, positions, state, and how many graphs came back."""
    with Context(model, budget=40, sinks=2, window=8, n_ubatch=32, n_threads=1, span=96, **options) as context:
        logits, at = [], 0
        for n in SIZES:
            logits.append(context.decode(tokens[at : at + n]).copy())
            at += n
        assert context.stats().n_rebases > 0 and context.stats().n_evicted > 0
        return logits, context.positions(), context.save(0), int(llama_cpp.llama_perf_context(context.ctx).n_reused)


@pytest.mark.parametrize("policy, memory", [*((policy, "off") for policy in EVICTING), ("indexer", "off"), ("keydiff", "centroid")])
def test_the_same_bits(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, memory: str) -> None:
    path, config = tiny("llama")
    options: dict[str, Any] = {"policy": policy}
    if policy == "indexer":
        write_sidecar(tmp_path / "s.gguf", random_indexer("retention-mlp", config.n_layer, config.n_embd, config.n_head_kv, 0))
        options["sidecar"] = tmp_path / "s.gguf"
    if memory != "off":
        options |= {"memory": memory, "memory_slots": 8}
    tokens = tokens_of(config, sum(SIZES))
    with open_model(path) as model:
        again = run(model, tokens, **options)
        monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", "1")
        anew = run(model, tokens, **options)
    assert again[3] > 30 and anew[3] == 0
    for a, b in zip(again[0], anew[0]):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_equal(again[1], anew[1])
    assert again[2] == anew[2]
