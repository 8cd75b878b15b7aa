"""Sequences and state with an indexer: tokens that wait to be scored are part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import Tiny
from indexmem_edge import llama_cpp
from indexmem_edge.native import api
from reference.indexers import random_indexer, write_sidecar
from reference.policies import BoundedReference
from support.comparing import tokens_of
from support.native_context import F16, F32, Q8_0, Context, open_model
from support.operations import N_SEQ, Operation, follow, operations

VARIANTS = ["retention-mlp", "kvzap-linear", "pairwise-mean"]
each_variant = pytest.mark.parametrize("variant", VARIANTS)
# 4 tokens wait at most, and with WIDE 32, of which a step of 30 lets nearly all wait
SETTINGS: dict[str, Any] = dict(budget=96, window=33, policy="indexer", evict_step=30)
WIDE = SETTINGS | dict(budget=1056)

Sidecar = Callable[..., Path]


@pytest.fixture(scope="session")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Sidecar:
    """sidecar(config, variant, seed) -> path; each is written once."""
    folder = tmp_path_factory.mktemp("sidecars")

    def make(config: Any, variant: str, seed: int = 0) -> Path:
        path = folder / f"{config.n_layer}-{config.n_embd}-{config.n_head_kv}-{variant}-{seed}.gguf"
        if not path.exists():
            write_sidecar(path, random_indexer(variant, config.n_layer, config.n_embd, config.n_head_kv, seed))
        return path

    return make


@each_variant
@pytest.mark.parametrize("whole", [True, False], ids=["context", "sequence"])
@pytest.mark.parametrize("cache", [F16, Q8_0], ids=["f16", "q8_0"])
@pytest.mark.parametrize("n", [20, 80, 313], ids=lambda n: f"after{n}")
def test_a_loaded_state_continues_bit_for_bit(
    tiny: Tiny, sidecar: Sidecar, variant: str, whole: bool, cache: int, n: int
) -> None:
    """Up to 4 of the last tokens have not been scored."""
    path, config = tiny("llama")
    tokens, rest = tokens_of(config, n), tokens_of(config, 80, seed=1)
    seq = None if whole else 0
    arguments = dict(sidecar=sidecar(config, variant), type_k=cache, type_v=cache, n_ubatch=60, **SETTINGS)
    with open_model(path) as model, Context(model, **arguments) as a, Context(model, **arguments) as b:
        a.feed(tokens, 60)
        b.feed(rest, 7)  # what was there is forgotten
        state = a.save(seq)
        assert b.load(state, seq)
        assert b.save(seq) == state
        assert np.array_equal(a.feed(rest, 1), b.feed(rest, 1))
        np.testing.assert_equal(a.positions(), b.positions())
        assert a.save(seq) == b.save(seq)


@each_variant
def test_a_loaded_state_of_a_large_budget_continues_bit_for_bit(tiny: Tiny, sidecar: Sidecar, variant: str) -> None:
    """21 tokens have not been scored, and their rows go around the end of the ring."""
    path, config = tiny("llama")
    arguments = dict(sidecar=sidecar(config, variant), n_ubatch=100, **WIDE)
    tokens, rest = tokens_of(config, 1150), tokens_of(config, 70, seed=1)
    with open_model(path) as model, Context(model, **arguments) as a, Context(model, **arguments) as b:
        a.feed(tokens, 100)
        a.feed(rest[:21], 1)
        b.feed(rest, 7)
        assert b.load(a.save(0), 0)
        assert b.save(0) == a.save(0)
        assert np.array_equal(a.feed(rest, 1), b.feed(rest, 1))
        np.testing.assert_equal(a.positions(), b.positions())


@each_variant
def test_a_state_goes_to_a_context_where_fewer_tokens_may_wait(tiny: Tiny, sidecar: Sidecar, variant: str) -> None:
    path, config = tiny("llama")
    wide, narrow = (dict(sidecar=sidecar(config, variant), n_ubatch=60, **s) for s in (WIDE, SETTINGS))
    tokens, rest = tokens_of(config, 80), tokens_of(config, 60, seed=1)
    with open_model(path) as model, Context(model, **wide) as a, Context(model, **narrow) as b, Context(model, **narrow) as c:
        a.feed(tokens[:60], 60)
        c.feed(tokens[:60], 60)
        for context in (a, c):
            context.feed(tokens[60:63], 1)
        assert b.load(a.save(0), 0)
        assert b.save(0) == a.save(0) == c.save(0)
        assert np.array_equal(b.feed(rest, 1), c.feed(rest, 1))
        np.testing.assert_equal(b.positions(), c.positions())
        a.feed(tokens[63:], 1)  # 20 wait by now, which are scored at once: test_state_fit.py
        assert b.load(a.save(0), 0) and b.n_seen() == 80


@each_variant
def test_states_of_another_indexer(tiny: Tiny, sidecar: Sidecar, variant: str) -> None:
    """Scores are those of one indexer; a policy without one is the matter of test_state_fit.py."""
    path, config = tiny("llama")
    own = dict(sidecar=sidecar(config, variant), **SETTINGS)
    others = [
        own | dict(sidecar=sidecar(config, variant, seed=1)),
        own | dict(sidecar=sidecar(config, next(v for v in VARIANTS if v != variant))),
    ]
    with open_model(path) as model, Context(model, **own) as a:
        a.feed(tokens_of(config, 130), 32)
        states = {seq: a.save(seq) for seq in (None, 0)}
        for other in others:
            with Context(model, **other) as b:
                b.feed(tokens_of(config, 20, seed=1), 20)
                for seq, state in states.items():
                    before, theirs = (c.save(seq) for c in (a, b))
                    assert not b.load(state, seq) and b.save(seq) == theirs
                    assert not a.load(theirs, seq) and a.save(seq) == before


@pytest.mark.parametrize("policy", ["indexer", "knorm"])
def test_more_entries_than_the_budget_of_now(tiny: Tiny, sidecar: Sidecar, policy: str) -> None:
    """A state from a larger share of the text, or a pin taken back, leaves more to evict than a ubatch brings."""
    path, config = tiny("llama")
    arguments = dict(budget=96, window=9, policy=policy)
    if policy == "indexer":
        arguments["sidecar"] = sidecar(config, "retention-mlp")
    smaller = arguments | dict(budget_ratio=0.2)
    with open_model(path) as model, Context(model, **arguments) as a, Context(model, **smaller) as b:
        a.feed(tokens_of(config, 130), 32)
        b.feed(tokens_of(config, 10), 10)
        if b.load(a.save(0), 0):
            b.decode([5])
            assert b.stats().n_seen == 131 and b.stats().n_kept <= b.stats().budget_now < 30
        else:
            assert b.n_seen() == 10
        b.clear()
        api.set_pin(b.ctx, 70)
        b.feed(tokens_of(config, 130), 32)
        assert 70 < b.stats().n_kept <= b.stats().budget_now
        api.set_pin(b.ctx, 0)
        b.decode([5])
        assert b.stats().n_kept <= b.stats().budget_now < 30


def test_truncated_and_damaged_states(tiny: Tiny, sidecar: Sidecar) -> None:
    path, config = tiny("llama", n_layer=1)
    arguments = dict(budget=40, window=8, policy="indexer", sidecar=sidecar(config, "pairwise-mean"))
    with open_model(path) as model, Context(model, **arguments) as a, Context(model, **arguments) as b:
        a.feed(tokens_of(config, 61), 10)
        state = a.save(0)
        b.feed(tokens_of(config, 7), 7)
        before = b.save(0)
        for n in [*range(1, 300, 3), *range(300, len(state), 997), len(state) - 1]:
            assert not b.load(state[:n], 0)
        for i in range(8, 160):  # a header has no byte that may be anything
            damaged = state[:i] + bytes([state[i] ^ 0xFF]) + state[i + 1 :]
            if b.load(damaged, 0):  # the first positions follow the header: any bytes that make sense are accepted
                assert b.n_seen() == 61
                assert b.load(before, 0)
        assert b.save(0) == before


@each_variant
@pytest.mark.parametrize("n_back", [1, 4, 20])
@pytest.mark.parametrize("n_single", [21, 29])
def test_taking_back_tokens_that_wait(tiny: Tiny, sidecar: Sidecar, variant: str, n_single: int, n_back: int) -> None:
    """Bit for bit what a context gives that never saw them."""
    path, config = tiny("llama")
    tokens, others = tokens_of(config, 160 + n_single), tokens_of(config, 70, seed=1)
    arguments = dict(sidecar=sidecar(config, variant), **SETTINGS)
    with open_model(path) as model, Context(model, **arguments) as c, Context(model, **arguments) as fresh:
        c.feed(tokens[:160], 32)
        c.feed(tokens[160:], 1)
        assert c.seq_rm(0, len(tokens) - n_back)
        fresh.feed(tokens[:160], 32)
        fresh.feed(tokens[160 : len(tokens) - n_back], 1)
        assert np.array_equal(c.feed(others, 1), fresh.feed(others, 1))
        np.testing.assert_equal(c.positions(), fresh.positions())
        assert c.stats().n_evictions == fresh.stats().n_evictions > 1


@each_variant
@pytest.mark.parametrize("n_back", [12, 50])
def test_taking_back_tokens_that_were_scored(tiny: Tiny, sidecar: Sidecar, variant: str, n_back: int) -> None:
    """What replaces them is scored anew. The network sees other groups of tokens then, which changes roundings."""
    path, config = tiny("llama")
    tokens, others = tokens_of(config, 70), tokens_of(config, 90, seed=1)
    arguments = dict(sidecar=sidecar(config, variant), **SETTINGS)
    with open_model(path) as model, Context(model, **arguments) as c, Context(model, **arguments) as fresh:
        c.feed(tokens, 1)
        assert c.seq_rm(0, 70 - n_back)  # however many: the queries that an eviction reads are newer than this text was long
        fresh.feed(tokens[: 70 - n_back], 1)
        np.testing.assert_allclose(c.feed(others, 1), fresh.feed(others, 1), atol=1e-4)
        np.testing.assert_equal(c.positions(), fresh.positions())
        assert c.stats().n_evictions == fresh.stats().n_evictions > 0


@each_variant
def test_a_copied_sequence_goes_its_own_way(tiny: Tiny, sidecar: Sidecar, variant: str) -> None:
    path, config = tiny("llama")
    shared, one, other = tokens_of(config, 120), tokens_of(config, 60, 1), tokens_of(config, 60, 2)
    arguments = dict(sidecar=sidecar(config, variant), **SETTINGS)
    with open_model(path) as model, Context(model, n_seq=2, **arguments) as c, Context(model, **arguments) as alone:
        c.feed(shared, 5)
        c.seq_cp(0, 1)
        first, second = c.feed(one, 5, seq=0), c.feed(other, 5, seq=1)
        alone.feed(shared, 5)
        state = alone.save(0)
        assert np.array_equal(first, alone.feed(one, 5))
        np.testing.assert_equal(c.positions(0), alone.positions())
        assert alone.load(state, 0)
        assert np.array_equal(second, alone.feed(other, 5))
        np.testing.assert_equal(c.positions(1), alone.positions())


@each_variant
def test_the_same_again_after_clearing(tiny: Tiny, sidecar: Sidecar, variant: str) -> None:
    """Results depend on nothing but the tokens: neither on what was there before, nor on the context."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 200)
    arguments = dict(sidecar=sidecar(config, variant), **SETTINGS)
    results = []
    with open_model(path) as model, Context(model, **arguments) as c, Context(model, **arguments) as another:
        for context, n_before in ((c, 0), (c, 47), (c, 190), (another, 0)):
            context.feed(tokens_of(config, n_before, seed=1), 3) if n_before else None
            context.clear()
            logits = np.concatenate([context.feed(tokens[:150], 25), context.feed(tokens[150:], 1)])
            results.append((logits, context.save(0)))
    for logits, state in results[1:]:
        assert np.array_equal(logits, results[0][0])
        assert state == results[0][1]


# ---------------------------------------------------------------------------------------------- any order


@given(
    variant=st.sampled_from(VARIANTS),
    room=st.integers(1, 50),
    window=st.integers(1, 9),
    step=st.integers(0, 40),
    ratio=st.sampled_from([0.0, 0.4, 0.8]),
    n_ubatch=st.sampled_from([1, 7, 16, 40]),
    todo=operations,
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_operations(
    tiny: Tiny, sidecar: Sidecar, variant: str, room: int, window: int, step: int, ratio: float, n_ubatch: int,
    todo: list[Operation],
) -> None:  # fmt: skip
    """The reference of every sequence goes through the same; what is kept follows it after every ubatch."""
    path, config = tiny("llama", n_head=4, head_dim=32)
    options: dict[str, Any] = dict(
        budget=3 + window + room, sinks=3, window=window, evict_step=step, policy="indexer", budget_ratio=ratio
    )
    indexer = random_indexer(variant, config.n_layer, config.n_embd, config.n_head_kv)
    new = BoundedReference(config, indexer=indexer, **options)
    exact = dict(type_k=F32, type_v=F32, sidecar=sidecar(config, variant))
    with open_model(path) as model, Context(model, n_ubatch=n_ubatch, n_seq=N_SEQ, **exact, **options) as c:
        follow(c, new, todo, n_ubatch, config.n_vocab)


@pytest.mark.parametrize("options", [dict(policy="streaming"), SETTINGS, SETTINGS | dict(memory="centroid", memory_slots=8)], ids=str)
def test_graphs_of_decode_are_built_once(tiny: Tiny, sidecar: Sidecar, options: dict[str, Any]) -> None:
    """Scoring, evicting and neither: each of the three comes back, whichever was before it."""
    path, config = tiny("llama")
    weights = sidecar(config, "retention-mlp") if options["policy"] == "indexer" else None
    settings = dict(budget=96, window=33, evict_step=7) | options
    with open_model(path) as model, Context(model, sidecar=weights, n_ubatch=32, **settings) as c:
        c.feed(tokens_of(config, 150), 32)
        c.feed(tokens_of(config, 70), 1)
        before = llama_cpp.llama_perf_context(c.ctx).n_reused
        c.feed(tokens_of(config, 130), 1)
        assert llama_cpp.llama_perf_context(c.ctx).n_reused == before + 130
        assert c.stats().n_evictions > 5
