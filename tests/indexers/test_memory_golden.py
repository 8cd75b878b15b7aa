"""The centroid memory against vectors computed by the PyTorch code of the method's authors.

First the memory alone: writes one at a time, and reads beside other entries; then 80 tokens after a context of 300 with
all that happens to them, in the order of the method. Each row, a KV head of a layer, has a budget of its own there: it
is a sequence of its own for the native ops. The vectors are in golden/memory.safetensors, scores in
golden/indexer.safetensors.

The authors start from k-means over what the context evicts. We have no such step: a bounded cache never holds what that
needs, so its slots are filled by the rule of later evictions alone. Here we begin with their result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from reference.memories import CentroidMemory
from support import native_ops
from support.golden import FOLDER, GOLDEN, N_CONTEXT, SINKS, WINDOW, read_safetensors

MEMORY = read_safetensors(FOLDER / "memory.safetensors")
SCALE, D, R = 0.25, 16, 8
N_ROWS = 5  # of cmp.*; nothing ever leaves the last one
STEPS = [int(n) for n in MEMORY["cmp.snapshot_steps"]]  # entries seen at each snapshot

Slots = tuple[np.ndarray, np.ndarray]  # means [rows, 1, R, 2*D], counts [rows, 1, R]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def check_slots(slots: Slots, keys: np.ndarray, values: np.ndarray, counts: np.ndarray) -> None:
    """Of an empty slot only that it is empty."""
    means, held = slots[0][:, 0], counts > 0
    np.testing.assert_array_equal(slots[1][:, 0], counts)
    close(means[held], np.concatenate((keys, values), axis=-1)[held])


def check_snapshot(slots: Slots, i: int) -> None:
    check_slots(slots, *(MEMORY[f"cmp.{name}"][i] for name in ("centroid_keys", "centroid_values", "counts")))


def numpy_writes() -> Iterator[Slots]:
    """The slots after each step."""
    rows = [CentroidMemory(R, D, D) for _ in range(N_ROWS)]
    for keys, values, active in zip(MEMORY["cmp.keys"], MEMORY["cmp.values"], MEMORY["cmp.active"]):
        for row in np.flatnonzero(active):
            rows[row].write_one_by_one(keys[row][None], values[row][None])
        means = np.stack([np.concatenate((m.keys, m.values), axis=-1) for m in rows])
        yield means[:, None], np.stack([m.counts for m in rows])[:, None]


def native_writes() -> Iterator[Slots]:
    means = np.full((N_ROWS, 1, R, 2 * D), np.nan, np.float32)  # what an empty slot holds does not matter
    counts = np.zeros((N_ROWS, 1, R), np.float32)
    plan = native_ops.plan_of(np.zeros((N_ROWS, 1, 1), int))
    for keys, values, active in zip(MEMORY["cmp.keys"], MEMORY["cmp.values"], MEMORY["cmp.active"]):
        ctl = native_ops.ctl(N_ROWS, n_used=1, n_evict=active)
        entries = (a[:, None, None] for a in (keys, values))
        means, counts = native_ops.centroid(means, counts, *entries, plan, ctl)
        yield means, counts


@pytest.mark.parametrize("writes", [numpy_writes, native_writes])
def test_writes(writes: Callable[[], Iterator[Slots]]) -> None:
    seen = 0
    for step, slots in enumerate(writes(), 1):
        if step in STEPS:
            check_snapshot(slots, STEPS.index(step))
            seen += 1
    assert seen == len(STEPS) == 3


# ---------------------------------------------------------------------------------------------- reads


def by_row(name: str) -> np.ndarray:
    """[1, rows*G, T, ...] -> [rows, G, T, ...]"""
    a = MEMORY[f"cmp.{name}"][0]
    return a.reshape(N_ROWS, -1, *a.shape[1:])


QUERY, COUNTS = by_row("query"), MEMORY["cmp.counts"][-1]
SLOTS = [MEMORY[f"cmp.centroid_{name}"][-1] for name in ("keys", "values")]
RETAINED, NEW = ([MEMORY[f"cmp.{part}_{x}"] for x in "kv"] for part in ("retained", "new"))


def golden_memory(row: int) -> CentroidMemory:
    memory = CentroidMemory(R, D, D)
    memory.keys, memory.values, memory.counts = (a[row].astype(np.float64) for a in (*SLOTS, COUNTS))
    return memory


def native_attend(*branches: list[np.ndarray], causal: int = 0) -> np.ndarray:
    """Slots, then other branches, of which the last `causal` entries are this forward's; [rows, G, T, D]"""
    k, v = (np.concatenate([b[i] for b in (SLOTS, *branches)], axis=1) for i in range(2))
    n_tokens = QUERY.shape[2]
    mask = np.zeros((1, n_tokens, k.shape[1]))
    if causal:
        mask[0, :, -causal:] = np.where(np.tri(n_tokens, causal), 0, -np.inf)
    out = native_ops.attend(QUERY, k, v, mask, COUNTS, SCALE)
    return out.transpose(0, 2, 1, 3)


def merge(*branches: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Outputs [..., D] and their denominators' logarithms [...]: what one softmax over all of them gives"""
    total = np.logaddexp.reduce([lse for _, lse in branches], axis=0)
    return sum(np.exp(lse - total)[..., None] * o for o, lse in branches)


def test_reads_of_the_slots_alone() -> None:
    assert not COUNTS[-1].any(), "no row is empty"
    for row in range(N_ROWS):
        o, lse = golden_memory(row).read(QUERY[row].astype(np.float64), SCALE)
        close(o, by_row("read_o")[row])
        close(lse, by_row("read_lse")[row])
    close(native_attend(), by_row("read_o"))
    assert not native_attend()[-1].any()


def test_branches_merge_into_one_softmax() -> None:
    retained, new = ((by_row(f"o_{x}").astype(np.float64), by_row(f"lse_{x}").astype(np.float64)) for x in ("S", "new"))
    reads = [golden_memory(row).read(QUERY[row].astype(np.float64), SCALE) for row in range(N_ROWS)]
    slots = tuple(np.stack(a) for a in zip(*reads))
    close(merge(slots, retained, new), by_row("merged"))
    close(merge(slots, retained), by_row("fused_two_branch"))
    close(by_row("merged"), by_row("single_softmax"))


def test_native_attention_over_entries_and_slots() -> None:
    close(native_attend(RETAINED, NEW, causal=NEW[0].shape[1]), by_row("single_softmax"))
    close(native_attend(RETAINED), by_row("fused_two_branch"))


def test_numpy_attention_over_entries_and_slots() -> None:
    n_retained, n_new = RETAINED[0].shape[1], NEW[0].shape[1]
    visible = np.tri(QUERY.shape[2], n_retained + n_new, n_retained, dtype=bool)
    for row in range(N_ROWS):
        k, v = (np.concatenate((RETAINED[i][row], NEW[i][row])).astype(np.float64) for i in range(2))
        out = golden_memory(row).attend(QUERY[row].transpose(1, 0, 2).astype(np.float64), k, v, visible, SCALE)
        close(out.transpose(1, 0, 2), by_row("single_softmax")[row])


# ---------------------------------------------------------------------------------------------- from end to end

N_FORWARD, N_NEW, AGE, SLOPE = 7, 80, 96.0, 1e-3  # tokens of the first forward; each of the others has one


def rows_of(name: str) -> np.ndarray:
    """[layers, heads, ...] -> [rows, ...]"""
    a = MEMORY[f"pipeline.{name}"]
    return a.reshape(-1, *a.shape[2:])


class Cache:
    """The caches of all rows, driven by native ops: [rows, 1, slots, ...]"""

    def __init__(self) -> None:
        self.all_k, self.all_v, self.budgets = rows_of("k"), rows_of("v"), rows_of("budget_exact")
        score, decay = (GOLDEN[f"mlp.{x}"].reshape(-1, 380) for x in ("score", "log_retention_rate"))
        self.all_terms = np.stack((score - SLOPE * np.arange(380), decay), axis=-1)
        self.n_used = np.zeros(len(self.budgets), int)
        n_slots = max(self.budgets) + 1
        self.k, self.v = (np.full((len(self.budgets), 1, n_slots, D), np.nan, np.float32) for _ in range(2))
        self.terms = np.full((len(self.budgets), 1, n_slots, 2), np.nan, np.float32)
        self.pos = np.full((len(self.budgets), 1, n_slots), -1, np.int32)
        for row, evicted in enumerate(rows_of("evicted_at_commit")):
            kept = np.flatnonzero(evicted == 0)
            self.pos[row, 0, : len(kept)], self.n_used[row] = kept, len(kept)
            self.k[row, 0, : len(kept)], self.v[row, 0, : len(kept)] = self.all_k[row, kept], self.all_v[row, kept]
            self.terms[row, 0, : len(kept)] = self.all_terms[row, kept]
        self.means = np.concatenate([MEMORY[f"pipeline.cmp_{x}_start"] for x in ("keys", "values")], axis=-1)[:, None]
        self.counts = MEMORY["pipeline.cmp_counts_start"][:, None]

    def attend(self, q: np.ndarray, first: int) -> np.ndarray:
        """The tokens from `first` on, q [rows, G, T, D]: slots, what is cached, and themselves; [rows, G, T, D]"""
        n = q.shape[2]
        new = np.s_[:, first : first + n]
        means = self.means[:, 0]
        k = np.concatenate((means[..., :D], self.k[:, 0], self.all_k[new]), axis=1)
        v = np.concatenate((means[..., D:], self.v[:, 0], self.all_v[new]), axis=1)
        mask = np.full((len(k), n, k.shape[1]), -np.inf)
        for row, n_used in enumerate(self.n_used):
            mask[row, :, : R + n_used] = 0
        mask[:, :, -n:] = np.where(np.tri(n), 0, -np.inf)
        out = native_ops.attend(q, k, v, mask, self.counts[:, 0], SCALE)
        return out.transpose(0, 2, 1, 3)

    def ingest(self, t: int) -> None:
        """Token t takes a slot, and something leaves every row that was full."""
        rows = np.arange(len(self.n_used))
        self.k[rows, 0, self.n_used], self.v[rows, 0, self.n_used] = self.all_k[:, t], self.all_v[:, t]
        self.terms[rows, 0, self.n_used] = self.all_terms[:, t]
        n_evict = (self.n_used + 1 > self.budgets).astype(int)
        ctl = native_ops.ctl(
            len(rows), n_used=self.n_used + 1, n_evict=n_evict, n_fixed=self.n_used, pos_tail=t, keep_lo=SINKS,
            keep_hi=t - WINDOW + 1, pos_last=t,
        )  # fmt: skip
        rank = native_ops.rank_terms(self.terms, self.pos, ctl, SLOPE, AGE)
        plan = native_ops.select(rank, self.pos, ctl, n_evict_max=1)
        self.means, self.counts = native_ops.centroid(self.means, self.counts, self.k, self.v, plan, ctl)
        self.k, self.v, self.terms = (native_ops.compact(a, plan, ctl) for a in (self.k, self.v, self.terms))
        self.pos = native_ops.compact_pos(self.pos, plan, ctl)
        self.n_used += 1 - n_evict


@pytest.fixture(scope="module")
def ran() -> tuple[Cache, np.ndarray]:
    """The cache at the end, and outputs [rows, G, 80, D]."""
    cache, q = Cache(), rows_of("q").reshape(6, 3, N_NEW, D)
    outputs = []
    for first, last in [(0, N_FORWARD), *((i, i + 1) for i in range(N_FORWARD, N_NEW))]:
        outputs.append(cache.attend(q[:, :, first:last], N_CONTEXT + first))
        for t in range(first, last):
            cache.ingest(N_CONTEXT + t)
    return cache, np.concatenate(outputs, axis=2)


def test_outputs_from_end_to_end(ran: tuple[Cache, np.ndarray]) -> None:
    close(ran[1], rows_of("output").reshape(6, 3, N_NEW, D))


def test_slots_from_end_to_end(ran: tuple[Cache, np.ndarray]) -> None:
    cache = ran[0]
    check_slots((cache.means, cache.counts), *(MEMORY[f"pipeline.cmp_{x}_end"] for x in ("keys", "values", "counts")))
    assert (cache.counts.sum(axis=-1)[:, 0] + cache.n_used == N_CONTEXT + N_NEW).all(), "a token is in one place"
