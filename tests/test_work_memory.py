"""Memory beside the cache: it is reported before it is taken, and an eviction takes no more than that."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Tiny
from native_context import Context, open_model

from indexmem_edge import Llama

BUDGET, UBATCH = 4096, 256
SLACK = 2 << 20  # what a process takes for reasons of its own: nodes of graphs, pages of the allocator


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("policy", "memory"), [("streaming", "off"), ("keydiff", "centroid")])
def test_the_first_eviction_takes_what_was_reported(tiny: Tiny, policy: str, memory: str) -> None:
    path, config = tiny("llama", head_dim=128, n_head=2, n_head_kv=2)
    tokens = np.random.default_rng(0).integers(0, config.n_vocab, 2 * BUDGET).tolist()
    with (
        open_model(path) as model,
        Context(model, budget=BUDGET, policy=policy, memory=memory, n_ubatch=UBATCH, n_ctx=1 << 16, n_threads=2) as context,
    ):
        n = BUDGET - 256
        context.feed(tokens[:n], UBATCH)
        context.feed(tokens[n : n + 2], 1)
        before, before_bytes = context.stats(), resident()
        assert before.n_evicted == 0
        if policy == "keydiff":  # its ranks read all keys of a head in fp32, for each thread
            assert before.work_bytes > 2 * BUDGET * 128 * 4

        context.feed(tokens[n + 2 : n + 260], 1)
        context.feed(tokens[n + 260 : n + 1000], UBATCH)
        after, after_bytes = context.stats(), resident()
        assert after.n_evicted > 0 and after.work_bytes == before.work_bytes
        assert after.compute_bytes >= before.compute_bytes > 0
        took = after_bytes - before_bytes
        assert took <= after.compute_bytes - before.compute_bytes + before.work_bytes + SLACK, took

        context.feed(tokens[n + 1000 : n + 1100], 1)
        context.feed(tokens[n + 1100 : n + 3000], UBATCH)
        assert context.stats().compute_bytes == after.compute_bytes
        assert resident() - after_bytes <= SLACK


def test_kept_graphs_are_counted(tiny: Tiny) -> None:
    path, config = tiny("llama")
    tokens = np.random.default_rng(1).integers(0, config.n_vocab, 200).tolist()
    with open_model(path) as model, Context(model, budget=64) as context:
        sizes = []
        for i in range(0, 200, 4):
            context.decode(tokens[i : i + 4])
            sizes.append((context.stats().n_evictions > 0, context.stats().compute_bytes))
        reserved, first = sizes[0][1], next(size for evicted, size in sizes if evicted)
        assert {size for evicted, size in sizes if not evicted} == {reserved}
        assert first > reserved and sizes[-1][1] == first


def test_more_threads_take_more(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    with open_model(path) as model:
        work = []
        for n_threads in (1, 4):
            with Context(model, budget=512, policy="snapkv", n_threads=n_threads) as context:
                work.append(context.stats().work_bytes)
    assert work[1] > 2 * work[0] > 0


def test_they_are_in_the_statistics(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    llm = Llama(path, kv_budget=64, kv_window=8, verbose=False)
    stats = llm.kv_stats()
    assert stats.compute_bytes > 0 and stats.work_bytes > 0
    assert "work memory" in str(stats) and "compute buffers" in str(stats)
    llm.close()
