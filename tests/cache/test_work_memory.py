"""Memory beside the cache: it is reported before it is taken, and an eviction takes no more than that."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import Llama
from support.native_context import Context, open_model

BUDGET, UBATCH = 4096, 32
SLACK = 2 << 20  # what a process takes for reasons of its own: nodes of graphs, pages of the allocator


@dataclass(frozen=True)
class Moment:
    """What the library reports, and what the process has in memory."""

    n_evicted: int
    compute: int
    work: int
    resident: int


def measure(path: Path, n_vocab: int, policy: str, memory: str) -> list[Moment]:
    """Before the first eviction, after some, and after many more: of single tokens and of ubatches."""
    tokens = np.random.default_rng(0).integers(0, n_vocab, 2 * BUDGET).tolist()
    n, moments = BUDGET - 96, []
    options = {"budget": BUDGET, "policy": policy, "memory": memory, "n_ubatch": UBATCH, "n_threads": 1}
    with open_model(path) as model, Context(model, n_ctx=1 << 16, **options) as context:
        context.feed(tokens[:n], UBATCH)
        done = n
        for single, more in ((2, 0), (20, 600), (10, 600)):
            context.feed(tokens[done : done + single], 1)
            if more:
                context.feed(tokens[done + single : done + single + more], UBATCH)
            done += single + more
            stats = context.stats()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = pages * os.sysconf("SC_PAGESIZE")
            moments.append(Moment(stats.n_evicted, stats.compute_bytes, stats.work_bytes, resident))
    return moments


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("policy", "memory"), [("streaming", "off"), ("keydiff", "centroid"), ("snapkv", "off")])
def test_the_first_eviction_takes_what_was_reported(tiny: Tiny, policy: str, memory: str) -> None:
    path, config = tiny("llama", head_dim=256, n_head=1, n_head_kv=1)
    fresh = multiprocessing.get_context("spawn")  # a process with nothing to take from what others freed
    with ProcessPoolExecutor(1, fresh) as pool:
        before, after, later = pool.submit(measure, path, config.n_vocab, policy, memory).result()

    assert before.n_evicted == 0 < after.n_evicted < later.n_evicted
    assert 0 < before.work < BUDGET * 256 * 4  # ranks do not take all keys of a head in fp32
    assert before.work == after.work == later.work
    assert 0 < before.compute <= after.compute == later.compute

    took = after.resident - before.resident
    assert took <= after.compute - before.compute + before.work + SLACK
    assert later.resident - after.resident <= SLACK


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
    assert work[1] > work[0] > 0


def test_they_are_in_the_statistics(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    llm = Llama(path, kv_budget=64, kv_window=8, verbose=False)
    stats = llm.kv_stats()
    assert stats.compute_bytes > 0 and stats.work_bytes > 0
    assert "work memory" in str(stats) and "compute buffers" in str(stats)
    llm.close()
