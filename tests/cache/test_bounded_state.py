"""Sequences and state of the bounded cache: any order of decoding, removing, copying, clearing, saving and loading."""

from __future__ import annotations

import copy
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import Tiny
from support.native_context import F16, Q8_0, Context, Refused, _silence, llama_cpp, open_model
from support.states import N_HEAD, N_HEADER

N_SEQ = 3


@dataclass
class Model:
    """What the host knows of a sequence: the rules of eviction without the ranks."""

    budget: int
    sinks: int
    window: int
    step: int
    seen: int = 0
    kept: int = 0
    tail: int = 0  # entries appended since the last eviction
    evicted: bool = False
    tokens: list[int] = field(default_factory=list)

    def feed(self, tokens: list[int], n_ubatch: int) -> None:
        for i in range(0, len(tokens), n_ubatch):
            n = len(tokens[i : i + n_ubatch])
            self.seen, self.kept, self.tail = self.seen + n, self.kept + n, self.tail + n
            if self.kept > self.budget:
                self.kept = max(min(self.budget, self.kept - self.step), self.sinks + self.window)
                self.tail, self.evicted = 0, True
        self.tokens += tokens

    def remove(self, p0: int) -> bool:
        """seq_rm(p0, -1)"""
        n = self.seen - p0
        if n <= 0:
            return True
        if p0 == 0:
            self.__init__(self.budget, self.sinks, self.window, self.step)  # type: ignore[misc]
            return True
        if n > self.tail:
            return False
        self.seen, self.kept, self.tail = self.seen - n, self.kept - n, self.tail - n
        del self.tokens[p0:]
        return True


def check(c: Context, seq: int, model: Model) -> None:
    stats, held = c.stats(seq), c.positions(seq)
    assert stats.n_seen == model.seen == c.n_seen(seq)
    assert stats.n_kept == model.kept <= model.budget
    for layer in held:
        for positions in layer:
            assert len(positions) == model.kept
            assert len(set(positions.tolist())) == model.kept, "a slot is used twice"
            if model.kept:
                assert positions[0] >= 0 and positions[-1] < model.seen
            first, last = min(model.sinks, model.seen), min(model.window, model.seen)
            assert positions[:first].tolist() == list(range(first)), "a sink is gone"
            assert positions[len(positions) - last :].tolist() == list(range(model.seen - last, model.seen)), "the window has a hole"


operation = st.one_of(
    st.tuples(st.just("feed"), st.integers(0, N_SEQ - 1), st.integers(1, 70)),
    st.tuples(st.just("feed"), st.integers(0, N_SEQ - 1), st.integers(1, 3)),
    st.tuples(st.just("together"), st.integers(0, N_SEQ - 2), st.integers(1, 30)),
    st.tuples(st.just("remove"), st.integers(0, N_SEQ - 1), st.integers(0, 40)),
    st.tuples(st.just("copy"), st.integers(0, N_SEQ - 1), st.integers(0, N_SEQ - 1)),
    st.tuples(st.just("keep"), st.integers(0, N_SEQ - 1), st.just(0)),
    st.tuples(st.just("clear"), st.just(0), st.just(0)),
    st.tuples(st.just("reload"), st.integers(0, N_SEQ - 1), st.integers(0, N_SEQ - 1)),
    st.tuples(st.just("reload all"), st.just(0), st.just(0)),
)


@given(
    policy=st.sampled_from(["streaming", "random", "knorm", "keydiff", "tova"]),
    budget=st.integers(14, 60),
    window=st.integers(1, 9),
    step=st.integers(0, 20),
    n_ubatch=st.sampled_from([1, 7, 16, 32]),
    operations=st.lists(operation, min_size=1, max_size=12),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_operations(tiny: Tiny, policy: str, budget: int, window: int, step: int, n_ubatch: int, operations: list) -> None:
    path, config = tiny("llama", n_layer=1)
    rng = np.random.default_rng(0)
    with open_model(path) as native_model, Context(
        native_model, budget=budget, sinks=3, window=window, evict_step=step, policy=policy, n_ubatch=n_ubatch, n_seq=N_SEQ
    ) as c:
        models = [Model(budget, 3, window, c.stats(s).evict_step) for s in range(N_SEQ)]
        for name, a, b in operations:
            if name == "feed":
                tokens = rng.integers(3, config.n_vocab, b).tolist()
                c.decode(tokens, a)
                models[a].feed(tokens, n_ubatch)
            elif name == "together":
                # equal lengths keep the split into ubatches simple: b steps of two tokens, n_ubatch // 2 steps at a time
                tokens = {s: rng.integers(3, config.n_vocab, b).tolist() for s in (a, a + 1)}
                c.decode_many(tokens)
                for s in tokens:
                    models[s].feed(tokens[s], max(n_ubatch // 2, 1))
            elif name == "remove":
                assert c.seq_rm(a, b) == models[a].remove(b)
            elif name == "copy":
                c.seq_cp(a, b)
                models[b] = copy.deepcopy(models[a])
            elif name == "keep":
                c.seq_keep(a)
                for s in range(N_SEQ):
                    if s != a:
                        models[s].remove(0)
            elif name == "clear":
                c.clear()
                for model in models:
                    model.remove(0)
            elif name == "reload":
                assert c.load(c.save(a), b)
                models[b] = copy.deepcopy(models[a])
            elif name == "reload all":
                assert c.load(c.save())
            for s in range(N_SEQ):
                check(c, s, models[s])


def tokens_of(config, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, config.n_vocab, n).tolist()


@pytest.mark.parametrize("policy", ["streaming", "knorm", "snapkv"])
@pytest.mark.parametrize("cache", [F16, Q8_0])
def test_a_loaded_state_continues_bit_for_bit(tiny: Tiny, policy: str, cache: int) -> None:
    path, config = tiny("llama")
    tokens, rest = tokens_of(config, 300), tokens_of(config, 120, seed=1)
    arguments = dict(budget=96, window=40, policy=policy, type_k=cache, type_v=cache)
    with open_model(path) as model, Context(model, **arguments) as a, Context(model, **arguments) as b:
        a.feed(tokens, 32)
        assert b.load(a.save())
        b_again = b.save()
        assert a.save() == b_again
        assert np.array_equal(a.feed(rest, 1), b.feed(rest, 1))
        np.testing.assert_equal(a.positions(), b.positions())


def test_a_copied_sequence_goes_its_own_way(tiny: Tiny) -> None:
    path, config = tiny("llama")
    shared, one, other = tokens_of(config, 100), tokens_of(config, 60, 1), tokens_of(config, 60, 2)
    arguments = dict(budget=48, policy="tova")
    with open_model(path) as model, Context(model, n_seq=2, **arguments) as c, Context(model, **arguments) as alone:
        c.feed(shared, 32)
        c.seq_cp(0, 1)
        first, second = c.feed(one, 5, seq=0), c.feed(other, 5, seq=1)
        alone.feed(shared, 32)
        state = alone.save(0)
        assert np.array_equal(first, alone.feed(one, 5))
        assert alone.load(state, 0)
        assert np.array_equal(second, alone.feed(other, 5))


def test_sequences_do_not_see_each_other(tiny: Tiny) -> None:
    """Interleaved in one batch they keep and answer what they would alone."""
    path, config = tiny("qwen3")
    texts = {s: tokens_of(config, 90, seed=s) for s in range(3)}
    arguments = dict(budget=40, policy="keydiff")
    with open_model(path) as model, Context(model, n_seq=3, n_ubatch=48, **arguments) as c:
        together = {s: [] for s in texts}
        for i in range(0, 90, 16):
            for s, logits in c.decode_many({s: t[i : i + 16] for s, t in texts.items()}).items():
                together[s].append(logits)
        for s, text in texts.items():
            with Context(model, n_ubatch=16, **arguments) as alone:
                expected = alone.feed(text, 16)
                np.testing.assert_allclose(np.concatenate(together[s]), expected, atol=2e-2)
                np.testing.assert_equal(c.positions(s), alone.positions())


def test_removing_the_tail_is_exact(tiny: Tiny) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, 300)
    for policy in ("streaming", "snapkv"):
        with open_model(path) as model, Context(model, budget=96, window=33, policy=policy, evict_step=30) as c:
            c.feed(tokens[:200], 32)
            c.feed(tokens[200:205], 1)
            n_before = c.stats().n_evictions
            assert c.seq_rm(0, 204)
            again = c.decode(tokens[204:205])
            assert c.stats().n_evictions == n_before
            with Context(model, budget=96, window=33, policy=policy, evict_step=30) as fresh:
                fresh.feed(tokens[:200], 32)
                fresh.feed(tokens[200:204], 1)
                assert np.array_equal(again, fresh.decode(tokens[204:205]))
            assert not c.seq_rm(0, 10), "compacted long ago"
            assert not c.seq_rm(0, 10, 20), "would leave a gap"
            assert c.n_seen() == 205
            assert c.seq_rm(0, 0) and c.n_seen() == 0


def test_pins(tiny: Tiny) -> None:
    from indexmem_edge.errors import BudgetError
    from indexmem_edge.native import api

    path, config = tiny("llama")
    with open_model(path) as model, Context(model, budget=40, policy="random", pin=5) as c:
        api.set_pin(c.ctx, 17)
        c.feed(tokens_of(config, 100), 20)
        for layer in c.positions():
            for positions in layer:
                assert positions[:17].tolist() == list(range(17))
        with pytest.raises(BudgetError, match="evicted already"):
            api.set_pin(c.ctx, 18)
        with pytest.raises(BudgetError, match="at least 49"):
            api.set_pin(c.ctx, 40)
        api.set_pin(c.ctx, 6)
        c.clear()
        assert c.stats().pin == 5


# ---------------------------------------------------------------------------------------------- damaged states




@pytest.fixture(scope="module")
def saved(tiny: Tiny) -> tuple[Path, bytes]:
    path, config = tiny("llama")
    with open_model(path) as model, Context(model, budget=40) as c:
        c.feed(tokens_of(config, 90), 30)
        return path, c.save(0)


def refuses_and_keeps(path: Path, states: list[bytes]) -> None:
    """None of the states loads, and none leaves a trace."""
    with open_model(path) as model, Context(model, budget=40) as c:
        c.decode(list(range(3, 20)))
        before = c.save(0)
        for state in states:
            assert not c.load(state, 0)
            assert c.save(0) == before


def test_truncated_states(saved: tuple[Path, bytes]) -> None:
    path, state = saved
    refuses_and_keeps(path, [state[:n] for n in [*range(1, 200, 3), *range(200, len(state), 997), len(state) - 1]])


def test_damaged_headers(saved: tuple[Path, bytes]) -> None:
    path, state = saved
    n_header = N_HEADER
    states = [state[:i] + bytes([state[i] ^ 0xFF]) + state[i + 1 :] for i in range(8, n_header)]
    for field_index in range(1, 7):  # n_seen, n_used, n_fixed, pin, n_scored, ring_from: values that cannot be
        at = n_header + 4 * field_index
        states += [state[:at] + struct.pack("<I", value) + state[at + 4 :] for value in (0xFFFFFFFF, 0x7FFFFFFF, 10**6)]
    refuses_and_keeps(path, states)


def test_states_of_another_format(saved: tuple[Path, bytes]) -> None:
    """The line says which, and what to do."""
    path, state = saved
    said: list[str] = []
    log = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    with open_model(path) as model, Context(model, budget=40) as c:
        llama_cpp.llama_log_set(log, None)
        assert not c.load(state[:12] + struct.pack("<I", 5) + state[16:], 0)
        llama_cpp.llama_log_set(_silence, None)
    assert any("has format 5, this version of indexmem-edge reads formats 6 to 10: evaluate the text again" in line for line in said)


def test_a_copy_that_waits_is_saved_as_it_will_be(tiny: Tiny) -> None:
    """Copies are made before the next decode. Until then states and sizes come from what they copy."""
    path, config = tiny("llama")
    with open_model(path) as model, Context(model, budget=40, policy="snapkv", window=33, n_seq=3) as c:
        c.feed(tokens_of(config, 90), 30, seq=0)
        c.feed(tokens_of(config, 25, 1), 30, seq=1)
        first, second = c.save(0), c.save(1)
        c.seq_cp(0, 2)
        c.seq_cp(1, 0)
        c.seq_cp(2, 1)
        waiting = [c.save(s) for s in range(3)], c.save()
        assert [len(state) for state in waiting[0]] == [len(second), len(first), len(first)]
        more = tokens_of(config, 40, 2)
        made = [c.feed(more, 7, seq=s) for s in range(3)]
        assert c.load(waiting[1])
        for s in range(3):
            assert np.array_equal(c.feed(more, 7, seq=s), made[s])
        for s in range(3):
            assert c.load(waiting[0][s], 0)
            assert np.array_equal(c.feed(more, 7), made[s])


def test_damaged_positions(saved: tuple[Path, bytes]) -> None:
    path, state = saved
    at = N_HEADER + N_HEAD
    states = []
    for i in (0, 1, 17, 39):
        for value in (-1, 90, 2**31 - 1, 0):
            damaged = state[: at + 4 * i] + struct.pack("<i", value) + state[at + 4 * i + 4 :]
            if damaged != state:
                states.append(damaged)
    refuses_and_keeps(path, states)


def test_keys_and_values_of_another_type(saved: tuple[Path, bytes]) -> None:
    """What else may differ is the matter of test_state_fit.py."""
    path, state = saved
    for types in (dict(type_k=Q8_0), dict(type_v=Q8_0)):
        with open_model(path) as model, Context(model, budget=40, **types) as c:
            assert not c.load(state, 0)
            assert c.n_seen() == 0


def test_state_of_an_unbounded_context(tiny: Tiny, saved: tuple[Path, bytes]) -> None:
    path, config = tiny("llama")
    with open_model(path) as model, Context(model) as original, Context(model, budget=40) as bounded:
        original.decode(tokens_of(config, 20))
        assert not bounded.load(original.save(0), 0)
        assert bounded.n_seen() == 0


def test_batches_must_continue_the_sequence(tiny: Tiny) -> None:
    path, config = tiny("llama")
    with open_model(path) as model, Context(model, budget=40) as c:
        c.decode(tokens_of(config, 20))
        c.n_seen = lambda seq=0: 25  # type: ignore[method-assign]
        with pytest.raises(Refused):
            c.decode([5, 6])
