"""Sequences of a cache with a span: taking back, copying, saving and loading around rebases, and ubatches that are aborted."""

from __future__ import annotations

import copy
import struct
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import llama_cpp
from support.comparing import tokens_of
from support.native_context import F16, Q8_0, Context, Refused, open_model
from support.spanned import SETTINGS, both, compare
from support.states import N_HEAD, N_HEADER


def arrive(c: Context, tokens: list[int], seq: int = 0) -> int:
    """Feeds until just after a rebase; returns the number of tokens before it."""
    c.feed(tokens[:50], 10, seq)
    n = c.stats(seq).n_rebases
    while c.stats(seq).n_rebases == n:
        seen = c.n_seen(seq)
        c.decode(tokens[seen : seen + 1], seq)
    return seen


@pytest.mark.parametrize("policy", ["streaming", "knorm", "snapkv"])
def test_taking_back(tiny: Tiny, policy: str) -> None:
    """What came before a rebase stays; a tail after it can go, and what follows is as if it had never been."""
    path, config = tiny("llama")
    tokens, other = tokens_of(config, 200), tokens_of(config, 40, seed=1)
    arguments = SETTINGS | dict(span=62, policy=policy, n_ubatch=24, evict_step=8)
    with open_model(path) as model, Context(model, **arguments) as c, Context(model, **arguments) as straight:
        first = arrive(c, tokens)
        assert first == arrive(straight, tokens)
        before = c.save(0)
        assert not c.seq_rm(0, first - 1) and not c.seq_rm(0, 1)
        assert c.save(0) == before and c.n_seen() == first + 1
        n_evictions = c.stats().n_evictions
        for token in other[:2]:
            c.decode([token])
        assert c.stats().n_evictions == n_evictions, "an eviction would refuse for its own reason"
        assert c.seq_rm(0, first + 1)
        np.testing.assert_equal(c.rotary(), straight.rotary())
        np.testing.assert_array_equal(c.feed(other, 1), straight.feed(other, 1))
        assert c.save(0) == straight.save(0)
        assert c.stats().n_rebases > 1
        assert c.seq_rm(0, 0) and c.stats().next_position == 0 and c.stats().n_rebases == 0


def test_all_that_came_after_a_rebase_can_go(tiny: Tiny) -> None:
    """The rebase stands: positions go on from where it ended."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 200)
    with open_model(path) as model:
        native, reference = both(model, config, policy="knorm", evict_step=8)
        with native:
            first = arrive(native, tokens)
            reference.feed_all(tokens[:50], 10)
            reference.feed_all(tokens[50 : first + 1], 1)
            compare(native, reference)
            assert native.seq_rm(0, first) and reference.truncate(first)
            compare(native, reference)
            for n in (1, 20, 24, 24, 3):
                i = reference.n_seen
                np.testing.assert_allclose(native.decode(tokens[i : i + n]), reference.feed(tokens[i : i + n]), atol=0.05)
                assert compare(native, reference) < 2e-2


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
@pytest.mark.parametrize("cache", [F16, Q8_0], ids=["f16", "q8_0"])
@pytest.mark.parametrize("memory", [None, "centroid"])
@pytest.mark.parametrize("whole", [True, False], ids=["context", "sequence"])
def test_a_loaded_state_continues_bit_for_bit(tiny: Tiny, policy: str, cache: int, memory: Any, whole: bool) -> None:
    path, config = tiny("llama")
    tokens, rest = tokens_of(config, 150), tokens_of(config, 90, seed=1)
    arguments = SETTINGS | dict(policy=policy, type_k=cache, type_v=cache, n_ubatch=24)
    arguments |= dict(memory=memory, memory_slots=8, budget=40) if memory else {}
    seq = None if whole else 0
    with open_model(path) as model, Context(model, **arguments) as a, Context(model, **arguments) as b:
        arrive(a, tokens)
        a.feed(tokens[a.n_seen() : 120], 1)
        b.feed(rest, 7)
        state = a.save(seq)
        assert a.stats().n_rebases > 1 and b.load(state, seq)
        assert b.save(seq) == state
        assert (b.stats().n_rebases, b.stats().next_position) == (a.stats().n_rebases, a.stats().next_position)
        np.testing.assert_equal(b.rotary(), a.rotary())
        np.testing.assert_array_equal(a.feed(rest, 5), b.feed(rest, 5))
        assert a.save(seq) == b.save(seq)


def test_a_copy_goes_its_own_way(tiny: Tiny) -> None:
    path, config = tiny("llama")
    tokens, one, other = tokens_of(config, 100), tokens_of(config, 60, 1), tokens_of(config, 60, 2)
    arguments = SETTINGS | dict(policy="tova", n_ubatch=24)
    with open_model(path) as model, Context(model, n_seq=2, **arguments) as c, Context(model, **arguments) as alone:
        c.feed(tokens_of(config, 90, 3), 10, seq=1)  # what is copied over has rotary positions of its own
        c.feed(tokens, 24)
        c.seq_cp(0, 1)
        waiting = c.save(1)
        first, second = c.feed(one, 5, seq=0), c.feed(other, 5, seq=1)
        alone.feed(tokens, 24)
        state = alone.save(0)
        np.testing.assert_array_equal(first, alone.feed(one, 5))
        for copied in (state, waiting):
            assert alone.load(copied, 0)
            np.testing.assert_array_equal(second, alone.feed(other, 5))


def test_states_of_contexts_with_other_spans(tiny: Tiny) -> None:
    """A smaller span renews positions at once, a larger one later; without a span what was renewed cannot go on."""
    path, config = tiny("llama")
    tokens, rest = tokens_of(config, 150), tokens_of(config, 100, seed=1)
    arguments = SETTINGS | dict(policy="knorm", n_ubatch=24)
    with open_model(path) as model, Context(model, **arguments) as c, Context(model, **arguments | dict(span=0)) as free:
        c.feed(tokens, 24)
        for span in (56, 100, 300):
            native, reference = both(model, config, policy="knorm", span=span)
            with native:
                assert native.load(c.save(0), 0)
                reference.span = 64
                reference.feed_all(tokens, 24)
                reference.span = span
                for i in range(0, 100, 20):
                    exact = reference.feed(rest[i : i + 20])
                    np.testing.assert_allclose(native.decode(rest[i : i + 20]), exact, atol=0.05)
                    assert compare(native, reference) < 2e-2
        free.feed(rest, 24)
        before = free.save(0)
        assert not free.load(c.save(0), 0)
        assert free.save(0) == before
        assert c.load(before, 0), "one that was never renewed goes anywhere"
        c.decode(rest[:20])
        assert (c.stats().n_rebases, c.stats().next_position) == (1, 52)


def test_damaged_states(tiny: Tiny) -> None:
    """A shift and positions that cannot be; what is there stays."""
    path, config = tiny("llama")
    n_held = 32
    head = N_HEADER
    rotary = head + N_HEAD + 2 * 4 * n_held  # behind the positions of both heads of the first layer
    with open_model(path) as model, Context(model, n_ubatch=24, **SETTINGS) as c:
        c.feed(tokens_of(config, 150), 24)
        c.decode(tokens_of(config, 20))
        state, stats = c.save(0), c.stats()
        assert stats.n_kept == n_held
        shift = struct.pack("<I", stats.n_seen - stats.next_position)
        assert state[head + 36 : head + 48] == shift + struct.pack("<Q", stats.n_rebases)
        slots = struct.unpack(f"<{n_held}i", state[rotary : rotary + 4 * n_held])
        assert sorted(slots) == c.rotary()[0][0].tolist()

        def with_word(at: int, value: int) -> bytes:
            return state[:at] + struct.pack("<i", value) + state[at + 4 :]

        n_seen = int(stats.n_seen)
        damaged = [with_word(head + 36, value) for value in (-1, 0, 2**31 - 1, n_seen, n_seen - n_held + 1)]
        damaged += [with_word(head + 40, 0), with_word(head + 44, 1)]
        for i in (0, 1, n_held - 1):
            damaged += [with_word(rotary + 4 * i, value) for value in (-1, 64, 2**31 - 1, slots[i - 1], slots[i - 2])]
        for bad in damaged:
            if bad != state:
                assert not c.load(bad, 0)
                assert c.save(0) == state


@pytest.mark.parametrize("n", [1, 20], ids=["stays", "evicts"])
def test_abort_in_a_ubatch_that_rebases(tiny: Tiny, n: int) -> None:
    """After any number of nodes: the rebase stands, the ubatch has not happened. One that was to evict leaves its sequence
    broken, as without a rebase."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 200)
    with open_model(path) as model:
        native, reference = both(model, config, policy="knorm", evict_step=8)
        with native:
            arrive(native, tokens)
            while True:  # up to where the next ubatch of n wants a rebase, and a single one room
                seen, stats = native.n_seen(), native.stats()
                if stats.next_position + n > stats.span and (n > 1 or stats.n_kept < 32):
                    break
                native.decode(tokens[seen : seen + 1])
            state, outcomes = native.save(0), set()
            expected = native.decode(tokens[seen : seen + n])
            reference.feed_all(tokens[:50], 10)
            reference.feed_all(tokens[50:seen], 1)
            assert native.load(state, 0)
            compare(native, reference)
            assert reference.make_room(n)
            for after in [*range(12), 20, 40, 60, 10**6]:
                assert native.load(state, 0)
                try:
                    with native.aborting(after):
                        logits = native.decode(tokens[seen : seen + n])
                    outcomes.add("done")
                except Refused:
                    if native.stats().broken:
                        outcomes.add("broken")
                        continue
                    outcomes.add("not happened")
                    compare(native, reference)
                    logits = native.decode(tokens[seen : seen + n])
                np.testing.assert_array_equal(logits, expected)
            assert outcomes == {"done", "not happened" if n == 1 else "broken"}


def test_abort_in_a_batch_of_several_ubatches(tiny: Tiny) -> None:
    """What was computed before stays, and so does the rebase of the ubatch that was stopped; none of these evicts."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 100)
    settings: dict[str, Any] = dict(budget=60, evict_step=40, span=80, policy="knorm", n_ubatch=8)
    with open_model(path) as model:
        native, start = both(model, config, **settings)
        with native:
            native.feed(tokens[:64], 1)
            start.feed_all(tokens[:64], 1)
            assert compare(native, start) < 2e-2 and start.n_before == 61
            state, ends = native.save(0), set()
            expected = native.decode(tokens[64:88])
            for after in range(0, 200, 7):
                assert native.load(state, 0)
                reference = copy.deepcopy(start)
                try:
                    with native.aborting(after):
                        native.decode(tokens[64:88])
                except Refused:
                    end = native.n_seen()
                    ends.add(end)
                    assert not native.stats().broken
                    for i in range(64, end, 8):
                        reference.feed(tokens[i : i + 8])
                    assert reference.make_room(8) == (end == 80)
                    compare(native, reference)
                    rest = native.decode(tokens[end:88])
                    np.testing.assert_array_equal(rest, expected[end - 64 :])
            assert ends == {64, 72, 80}


@pytest.mark.parametrize("memory", [dict(), dict(memory="centroid", memory_slots=8)], ids=["", "centroid"])
def test_graphs_of_decode_are_built_once(tiny: Tiny, memory: dict[str, Any]) -> None:
    """A rebase does not cost the graphs that go on after it."""
    path, config = tiny("llama")
    settings = SETTINGS | dict(budget=96, span=140, policy="snapkv", window=33, n_ubatch=32) | memory
    with open_model(path) as model, Context(model, **settings) as c:
        c.feed(tokens_of(config, 180), 32)
        c.feed(tokens_of(config, 90), 1)
        before, n_rebases = llama_cpp.llama_perf_context(c.ctx).n_reused, c.stats().n_rebases
        c.feed(tokens_of(config, 130), 1)
        assert llama_cpp.llama_perf_context(c.ctx).n_reused == before + 130
        assert c.stats().n_rebases > n_rebases > 0
