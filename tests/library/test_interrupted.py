"""Ubatches that are aborted while they are computed: the cache is as it was before, or says that it is broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge.native import api
from reference.indexers import random_indexer, write_sidecar
from reference.memories import random_centroid, random_residual, write_memory_sidecar
from support.comparing import tokens_of
from support.native_context import Context, Refused, open_model

BUDGET, WINDOW, N_UBATCH = 96, 33, 32
CACHES = ["streaming", "keydiff", "snapkv", "retention-mlp", "pairwise-max", "centroid", "residual"]
each_cache = pytest.mark.parametrize("cache", CACHES)


@pytest.fixture(scope="module")
def llama(tiny: Tiny) -> Iterator[tuple[Any, Any]]:
    path, config = tiny("llama", n_layer=3)
    with open_model(path) as model:
        yield model, config


def made(llama: tuple[Any, Any], folder: Path, cache: str, **options: Any) -> Context:
    """A context of one thread, so that it is always the same node at which it stops."""
    model, config = llama
    settings: dict[str, Any] = dict(budget=BUDGET, window=WINDOW, n_ubatch=N_UBATCH, n_threads=1)
    path = folder / "sidecar.gguf"
    if cache in ("centroid", "residual"):
        memory = random_centroid(config.n_layer, 8, 0) if cache == "centroid" else random_residual(config.n_layer, config.head_dim)
        write_memory_sidecar(path, memory, None, n_embd=config.n_embd, n_head_kv=config.n_head_kv)
        settings |= dict(sidecar=path, policy="streaming")
    elif "-" in cache:
        write_sidecar(path, random_indexer(cache, config.n_layer, config.n_embd, config.n_head_kv, 0))
        settings |= dict(sidecar=path, policy="indexer", evict_step=30)
    else:
        settings |= dict(policy=cache)
    return Context(model, **settings | options)


def aborted(context: Context, tokens: list[int], after: int, seq: int = 0) -> bool:
    """Whether there were so many nodes to compute."""
    try:
        with context.aborting(after):
            context.decode(tokens, seq)
    except Refused as refused:
        assert "returned 2" in str(refused)
        return True
    return False


def goes_on_alike(a: Context, b: Context, tokens: list[int]) -> None:
    """Far enough for several evictions, which read all that was kept for them."""
    sizes = [1, 1, 7, 1, 30, 1, 1, 32, 1, 25, 1, 1, 32, 1]
    for n in sizes:
        batch, tokens = tokens[:n], tokens[n:]
        np.testing.assert_array_equal(a.decode(batch), b.decode(batch))
        assert a.stats().n_evictions == b.stats().n_evictions
        for ours, theirs in zip(a.positions(), b.positions()):
            np.testing.assert_array_equal(ours, theirs)
    assert a.stats().n_evictions > 1


@each_cache
@pytest.mark.parametrize(
    "seen, batch",
    [(40, 1), (43, 1), (40, 12), (32, 32), (10, 60)],
    ids=["one token", "one token that scores", "some", "a ubatch", "two ubatches"],
)
def test_what_does_not_evict_leaves_the_cache_as_it_was(
    llama: tuple[Any, Any], tmp_path: Path, cache: str, seen: int, batch: int
) -> None:
    tokens = tokens_of(llama[1], 300)
    for after in (0, 1, 12, 30, 70, 110):
        with made(llama, tmp_path, cache) as context, made(llama, tmp_path, cache) as twin:
            for c in (context, twin):
                c.feed(tokens[: seen - 3], N_UBATCH)
                c.feed(tokens[seen - 3 : seen], 1)
            if not aborted(context, tokens[seen : seen + batch], after):
                assert after > 0
                break
            done = context.n_seen()
            assert done in (seen, seen + N_UBATCH) and done < seen + batch  # whole ubatches count, and no others
            if done > seen:
                twin.decode(tokens[seen:done])
            assert (context.stats().n_kept, context.stats().broken) == (done, 0)
            goes_on_alike(context, twin, tokens[done:])


def test_a_long_tail_is_taken_back_exactly_with_a_ring_of_queries(llama: tuple[Any, Any], tmp_path: Path) -> None:
    tokens, others = tokens_of(llama[1], 300), tokens_of(llama[1], 60, seed=5)
    with made(llama, tmp_path, "snapkv") as context, made(llama, tmp_path, "snapkv") as twin:
        context.feed(tokens[:30], N_UBATCH)
        context.feed(others, N_UBATCH)
        assert context.seq_rm(0, 60) and context.seq_rm(0, 30)
        twin.feed(tokens[:30], N_UBATCH)
        goes_on_alike(context, twin, tokens[30:])


@each_cache
@pytest.mark.parametrize("seen, batch", [(96, 1), (96, 20), (140, 32)], ids=["first eviction, one token", "first", "later"])
def test_what_evicts_breaks_the_sequence_until_it_is_cleared(
    llama: tuple[Any, Any], tmp_path: Path, cache: str, seen: int, batch: int
) -> None:
    tokens = tokens_of(llama[1], 400)
    for after in (0, 35, 60):
        with made(llama, tmp_path, cache, n_seq=2) as context, made(llama, tmp_path, cache, n_seq=2) as twin:
            for c in (context, twin):
                c.feed(tokens[:seen], N_UBATCH, 0)
                c.feed(tokens[:50], N_UBATCH, 1)
            state, kept = context.save(0), context.stats().n_kept
            assert aborted(context, tokens[seen : seen + batch], after)
            stats = context.stats()
            assert (context.n_seen(), stats.n_kept, stats.broken) == (seen, kept, 1)

            for go_on in (context.n_seen(), seen + batch):
                assert context.decode_at([5], [go_on]) < 0
                assert "sequence 0 is broken" in api.last_error()
            assert not context.seq_rm(0, seen - 1)
            assert context.state_size(0) == 0
            with pytest.raises(Exception, match="broken"):
                context.positions()
            with pytest.raises(Exception, match="broken"):
                api.set_pin(context.ctx, 1)
            context.seq_cp(0, 1)  # copies nothing
            np.testing.assert_array_equal(context.decode(tokens[50:60], 1), twin.decode(tokens[50:60], 1))

            if after == 35:
                assert context.load(state, 0)  # mends it
                goes_on_alike(context, twin, tokens[seen:])
            else:
                assert context.seq_rm(0, 0)
                assert twin.seq_rm(0, 0)
                goes_on_alike(context, twin, tokens)


def test_a_copy_of_a_whole_sequence_mends_a_broken_one(llama: tuple[Any, Any], tmp_path: Path) -> None:
    tokens = tokens_of(llama[1], 300)
    with made(llama, tmp_path, "keydiff", n_seq=2) as context, made(llama, tmp_path, "keydiff") as twin:
        context.feed(tokens[:96], N_UBATCH, 0)
        context.feed(tokens[:80], N_UBATCH, 1)
        twin.feed(tokens[:80], N_UBATCH)
        assert aborted(context, tokens[96:120], 40)
        context.seq_cp(1, 0)
        goes_on_alike(context, twin, tokens[80:])


@pytest.mark.parametrize("full, other", [(0, 1), (1, 0)])
def test_only_the_sequences_that_evict_break(llama: tuple[Any, Any], tmp_path: Path, full: int, other: int) -> None:
    tokens = tokens_of(llama[1], 300)
    with made(llama, tmp_path, "keydiff", n_seq=2) as context, made(llama, tmp_path, "keydiff", n_seq=2) as twin:
        for c in (context, twin):
            c.feed(tokens[:96], N_UBATCH, full)
            c.feed(tokens[:50], N_UBATCH, other)
        both = dict(sorted({full: tokens[96:104], other: tokens[50:58]}.items()))  # in one ubatch
        with pytest.raises(Refused), context.aborting(70):
            context.decode_many(both)
        assert context.decode_at([5], [96], full) < 0
        with pytest.raises(Refused, match="returned -2"):  # for good: another batch would not help
            context.decode_many(both)
        np.testing.assert_array_equal(context.decode(tokens[50:60], other), twin.decode(tokens[50:60], other))


# ------------------------------------------------------------------------------- what cannot be done is said, every time


@pytest.mark.parametrize("positions", [[0, 1, 1, 2], [0, 2, 3], [3, 4, 5]])
def test_positions_come_once_and_in_order(llama: tuple[Any, Any], tmp_path: Path, positions: list[int]) -> None:
    tokens = tokens_of(llama[1], 10)
    with made(llama, tmp_path, "streaming") as context:
        assert context.decode_at(tokens[: len(positions)], positions) != 0
        assert context.n_seen() == 0
        context.decode(tokens)


def test_causal_attention_is_not_switched_off_later(llama: tuple[Any, Any], tmp_path: Path) -> None:
    from indexmem_edge import llama_cpp

    tokens = tokens_of(llama[1], 30)
    with made(llama, tmp_path, "streaming") as context, made(llama, tmp_path, "streaming") as twin:
        for c in (context, twin):
            c.decode(tokens[:10])
        llama_cpp.llama_set_causal_attn(context.ctx, False)
        assert context.decode_at(tokens[10:], list(range(10, 30))) < 0
        assert "causal attention" in api.last_error()
        llama_cpp.llama_set_causal_attn(context.ctx, True)
        np.testing.assert_array_equal(context.decode(tokens[10:]), twin.decode(tokens[10:]))
