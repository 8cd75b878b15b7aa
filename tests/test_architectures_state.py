"""Sequences and states of models of several kinds of layers: what is taken back, copied, saved or stopped is exact, or
refused with nothing changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np
import pytest
from architectures import BOUNDED, TABLE
from conftest import Tiny
from mirror import SETTINGS
from native_context import BF16, F16, F32, Q8_0, Context, Refused, open_model
from test_bounded import rms, tokens_of

from indexmem_edge import _capi

# one of each kind of memory; the others differ in what their graphs compute
KINDS = [
    name
    for name in (
        "qwen3vl",
        "qwen35",
        "nemotron_h",
        "lfm2",
        "gemma3",
        "gemma4-shared",
        "gpt-oss",
        "deepseek2",
        "kimi-linear",
    )
    if name in BOUNDED
]
WINDOWS = [name for name in KINDS if TABLE[name].window]
each_kind = pytest.mark.parametrize("name", KINDS)


class Made:
    """A tiny model, and contexts of it whose results do not depend on where a key lies: flash attention, which windows
    have, adds values that are halfs as halfs, and takes halfs of those that are not rounded."""

    def __init__(self, model: Any, config: Any, name: str) -> None:
        self.model, self.config, self.recurrent = model, config, TABLE[name].recurrent
        self.window = TABLE[name].window

    def context(self, **settings: Any) -> Context:
        kind = dict(type_k=F16, type_v=BF16) if self.window else dict(type_k=F32, type_v=F32)
        return Context(self.model, **SETTINGS | kind | settings)

    def text(self, n: int, seed: int = 0) -> list[int]:
        return tokens_of(self.config, n, seed)

    def same(self, a: np.ndarray, b: np.ndarray) -> None:
        """But for sums in another order; with windows what they are sums of is rounded to halfs after that."""
        assert rms(a - b) < (1e-3 if self.window else 2e-5) * b.std()


@pytest.fixture
def made(tiny: Tiny, name: str) -> Iterator[Made]:
    path, config = tiny(name)
    with open_model(path) as model:
        yield Made(model, config, name)


def condition(c: Context, seq: int = 0) -> tuple[Any, ...]:
    stats = c.stats(seq)
    return c.n_seen(seq), stats.n_kept, stats.n_evictions, [[h.tolist() for h in heads] for heads in c.positions(seq)]


# ------------------------------------------------------------------------------------------------------ taking back


def take_back_and_repeat(
    made: Made, c: Context, tokens: Sequence[int], n: int, distances: Sequence[int], true: np.ndarray, by: int
) -> list[int]:
    """At position n: takes back so many tokens and evaluates them again; the distances that were granted."""
    granted = []
    for d in distances:
        if d >= n:
            continue
        before = condition(c)
        if c.seq_rm(0, n - d):
            assert c.n_seen() == n - d
            made.same(c.feed(tokens[n - d : n], by), true[n - d : n])
            granted.append(d)
        assert condition(c) == before
    return granted


@each_kind
def test_taking_back_around_evictions(made: Made) -> None:
    """One token at a time, so that evictions come again where they came."""
    tokens = made.text(130)
    with made.context(evict_step=9) as c, made.context(evict_step=9) as twin:
        c.feed(tokens[:30], 24)
        true = np.concatenate([twin.feed(tokens[:30], 24), twin.feed(tokens[30:], 1)])
        n, granted = 30, set()
        for stop in (31, 43, 44, 45, 46, 53, 54, 60, 72, 73, 100, 120):
            made.same(c.feed(tokens[n:stop], 1), true[n:stop])
            n = stop
            got = take_back_and_repeat(made, c, tokens, n, range(1, 13), true, 1)
            tail = 0 if made.recurrent else n if n <= 44 else (n - 45) % 9  # since the last eviction
            assert got == [d for d in range(1, 13) if d <= tail]
            granted |= set(got)
        made.same(c.feed(tokens[n:], 1), true[n:])
    assert granted or made.recurrent


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("by", [1, 24])
def test_taking_back_around_the_end_of_the_window(made: Made, by: int) -> None:
    """Nothing is evicted here: what limits is what the window still holds, 256 tokens."""
    tokens = made.text(420, seed=1)
    with made.context(budget=600) as c, made.context(budget=600) as twin:
        true = twin.feed(tokens, 24)
        n, refused = 0, 0
        for stop in (17, 240, 255, 256, 257, 258, 280, 330, 400):
            made.same(c.feed(tokens[n:stop], by), true[n:stop])
            n = stop
            distances = [1, 2, 15, 16, 17, 18, 23, 24, 25, 100, 200, 215, *range(235, 246), 256, 257, 300]
            got = take_back_and_repeat(made, c, tokens, n, distances, true, 24)
            assert {1, 2, 15, 16, 17} & set(range(n)) <= set(got)
            refused += len([d for d in distances if d < n]) - len(got)
        made.same(c.feed(tokens[n:], 24), true[n:])
    assert refused


@pytest.mark.parametrize("name", [name for name in KINDS if TABLE[name].recurrent])
def test_a_recurrent_state_does_not_go_back(made: Made) -> None:
    tokens = made.text(100)
    with made.context() as c, made.context() as twin:
        for n, batch in ((10, 24), (50, 24), (51, 1)):
            for x in (c, twin):
                x.feed(tokens[x.n_seen() : n], batch)
            for d in (1, 2, 7, n - 1):
                before = condition(c), c.save(0)
                assert not c.seq_rm(0, n - d) and (condition(c), c.save(0)) == before
            assert c.seq_rm(0, n) and c.seq_rm(0, n + 5), "nothing is there"
        assert not c.seq_rm(0, 4, 8), "would leave a gap"
        np.testing.assert_array_equal(c.feed(tokens[51:], 24), twin.feed(tokens[51:], 24))
        assert c.seq_rm(0, 0) and c.n_seen() == 0
        twin.clear()
        np.testing.assert_array_equal(c.feed(tokens, 24), twin.feed(tokens, 24))


@each_kind
def test_a_gap_is_refused(made: Made) -> None:
    tokens = made.text(60)
    with made.context() as c, made.context() as twin:
        for x in (c, twin):
            x.feed(tokens[:30], 24)
        before = c.save(0)
        for p0, p1 in ((0, 5), (3, 29), (29, 29 - 5 + 1), (5, 6)):
            c.seq_rm(0, p0, p1)
            assert c.save(0) == before
        np.testing.assert_array_equal(c.feed(tokens[30:], 24), twin.feed(tokens[30:], 24))


# ------------------------------------------------------------------------------------------------ copies and sequences


@each_kind
@pytest.mark.parametrize("n", [20, 90, 300], ids=["all", "evicted", "beyond the window"])
def test_a_copy_goes_its_own_way(made: Made, n: int) -> None:
    shared, one, other = made.text(n), made.text(60, 1), made.text(60, 2)
    with made.context(n_seq=3) as c, made.context() as alone:
        c.feed(made.text(50, 3), 24, seq=2)  # is in the way
        c.feed(shared, 24)
        c.seq_cp(0, 2)
        assert condition(c, 2) == condition(c, 0)
        first, second = c.feed(one, 5, seq=0), c.feed(other, 5, seq=2)
        for text, logits in ((one, first), (other, second)):
            alone.clear()
            alone.feed(shared, 24)
            made.same(logits, alone.feed(text, 5))


@each_kind
def test_a_prefix_is_copied_exactly_or_not_at_all(made: Made) -> None:
    import llama_cpp

    tokens, more = made.text(300, 4), made.text(40, 5)
    for budget, n, p1 in ((600, 40, 25), (600, 300, 290), (600, 300, 30), (44, 42, 35), (44, 90, 60)):
        with made.context(budget=budget, n_seq=2) as c, made.context(budget=budget) as alone:
            c.feed(tokens[:n], 24)
            state = c.save(0)
            llama_cpp.llama_memory_seq_cp(c.memory, 0, 1, 0, p1)
            assert c.save(0) == state
            assert c.n_seen(1) in (0, p1)
            if c.n_seen(1):
                assert not made.recurrent
                alone.feed(tokens[:p1], 24)
                made.same(c.feed(more, 7, seq=1), alone.feed(more, 7))


@each_kind
def test_sequences_of_different_lengths_together(made: Made) -> None:
    lengths = (5, 50, 41, 1)
    texts = [made.text(n + 60, seed=s) for s, n in enumerate(lengths)]
    with made.context(n_seq=4, n_ubatch=96) as c:
        for s, n in enumerate(lengths):
            c.feed(texts[s][:n], 5, seq=s)
        together: dict[int, list[np.ndarray]] = {s: [] for s in range(4)}
        for i, n in zip((0, 1, 2, 8, 20, 44), (1, 1, 6, 12, 24, 16)):
            parts = {s: t[lengths[s] + i : lengths[s] + i + n] for s, t in enumerate(texts)}
            for s, logits in c.decode_many(parts).items():
                together[s].append(logits)
        kept = [condition(c, s) for s in range(4)]
    for s, n in enumerate(lengths):
        with made.context() as alone:
            alone.feed(texts[s][:n], 5)
            logits = [
                alone.decode(texts[s][n + i : n + i + m]) for i, m in zip((0, 1, 2, 8, 20, 44), (1, 1, 6, 12, 24, 16))
            ]
            made.same(np.concatenate(together[s]), np.concatenate(logits))
            assert condition(alone)[:2] == kept[s][:2]


# ------------------------------------------------------------------------------------------------------------- states


@each_kind
@pytest.mark.parametrize("n", [20, 90, 310], ids=["all", "evicted", "beyond the window"])
@pytest.mark.parametrize("cache", [None, Q8_0], ids=["", "q8_0"])
def test_a_loaded_state_goes_on_alike(made: Made, n: int, cache: Optional[int]) -> None:
    tokens, more = made.text(n), made.text(50, 1)
    kind = dict(type_k=cache, type_v=cache) if cache else {}
    with made.context(**kind) as c, made.context(**kind, n_seq=3) as other:
        c.feed(tokens, 24)
        whole, part = c.save(), c.save(0)
        other.feed(made.text(70, 2), 24, seq=1)
        other.feed(made.text(30, 3), 24, seq=2)
        kept = other.save(2)
        assert other.load(part, 1)
        assert c.load(other.save(1), 0) and c.save(0) == part and other.save(2) == kept
        assert condition(other, 1) == condition(c)
        logits = c.feed(more, 5)
        made.same(other.feed(more, 5, seq=1), logits)
        c.clear()
        c.feed(made.text(35, 4), 24)
        assert c.load(whole) and c.save() == whole
        made.same(c.feed(more, 5), logits)


@each_kind
def test_a_state_of_what_was_taken_back(made: Made) -> None:
    tokens, others = made.text(330), made.text(330, 6)
    if made.recurrent:
        pytest.skip("cannot be taken back")
    with made.context(budget=600) as c, made.context(budget=600) as twin, made.context(budget=600) as straight:
        c.feed(tokens[:300], 24)
        assert c.seq_rm(0, 280)
        c.feed(others[:20], 24)
        assert c.seq_rm(0, 290)
        assert twin.load(c.save(0), 0) and twin.save(0) == c.save(0)
        straight.feed([*tokens[:280], *others[:10]], 24)
        expected = straight.feed(tokens[290:], 24)
        for x in (c, twin):
            made.same(x.feed(tokens[290:], 24), expected)


@each_kind
def test_damaged_states_change_nothing(made: Made) -> None:
    tokens = made.text(90)
    with made.context() as source, made.context() as c:
        source.feed(tokens, 24)
        state = source.save(0)
        c.feed(tokens[:30], 24)
        before = c.save(0)
        rng = np.random.default_rng(0)
        bad = [state[:n] for n in [*range(1, 400, 7), *rng.integers(400, len(state), 60).tolist(), len(state) - 1]]
        for size in (4, 8):  # numbers that cannot be, anywhere in the headers of all parts
            at = rng.integers(8, len(state) - size, 150)
            bad += [state[:i] + b"\xff" * size + state[i + size :] for i in at]
        n_refused = 0
        for damaged in bad:
            if c.load(damaged, 0):  # bytes of keys and values can be anything
                assert len(damaged) == len(state)
                assert c.load(before, 0)
            else:
                n_refused += 1
            assert c.save(0) == before
        assert n_refused > 100
        assert c.load(state, 0)
        made.same(c.feed(tokens[:20], 5), source.feed(tokens[:20], 5))


@each_kind
def test_states_of_other_contexts(made: Made) -> None:
    tokens = made.text(60)
    with made.context() as source, Context(made.model) as unbounded:
        source.feed(tokens, 24)
        unbounded.decode(tokens)
        states = [source.save(0), unbounded.save(0)]
        for change in (dict(budget=40), dict(policy="knorm"), dict(type_k=Q8_0, type_v=Q8_0)):
            with made.context(**change) as c:
                c.feed(tokens[:20], 24)
                before = c.save(0)
                for state in states:
                    assert not c.load(state, 0) and c.save(0) == before


# -------------------------------------------------------------------------------------------------------------- abort


@each_kind
@pytest.mark.parametrize("seen,batch", [(30, 1), (30, 10), (44, 10), (300, 24), (20, 60)], ids=str)
def test_what_is_stopped_has_not_happened_or_breaks_the_sequence(made: Made, seen: int, batch: int) -> None:
    tokens = made.text(seen + batch + 60)
    for after in (0, 5, 25, 60, 120, 250):
        with made.context(n_seq=2) as c, made.context(n_seq=2) as twin:
            for x in (c, twin):
                x.feed(tokens[:50], 24, seq=1)
                x.feed(tokens[:seen], 24)
            state = c.save(0)
            try:
                with c.aborting(after):
                    c.decode(tokens[seen : seen + batch])
            except Refused as refused:
                assert "returned 2" in str(refused)
            else:
                break
            done = c.n_seen()
            assert done == seen or (done - seen) % 24 == 0  # whole ubatches count, and no others
            if c.stats().broken:
                with pytest.raises(Refused):
                    c.decode(tokens[done : done + 1])
                assert "broken" in _capi.last_error() and c.state_size(0) == 0
                assert c.load(state, 0)
                done = seen
            else:
                assert not made.recurrent or after == 0
            if done > seen:
                twin.feed(tokens[seen:done], 24)
            made.same(c.feed(tokens[done:], 24), twin.feed(tokens[done:], 24))
            made.same(c.feed(tokens[50:60], 5, seq=1), twin.feed(tokens[50:60], 5, seq=1))
            assert c.seq_rm(0, 0)
            made.same(c.feed(tokens[:40], 24), twin_of(made, tokens[:40]))


def twin_of(made: Made, tokens: Sequence[int]) -> np.ndarray:
    with made.context() as c:
        return c.feed(tokens, 24)


@each_kind
def test_batches_must_continue(made: Made) -> None:
    tokens = made.text(40)
    with made.context() as c, made.context() as twin:
        for x in (c, twin):
            x.feed(tokens[:20], 24)
        before = c.save(0)
        for positions in ([21, 22], [19, 20], [20, 22], [20, 20], [0, 1]):
            assert c.decode_at([5, 6], positions) != 0
            assert c.save(0) == before
        made.same(c.feed(tokens[20:], 24), twin.feed(tokens[20:], 24))
