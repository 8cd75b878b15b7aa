"""Sequences of models of several kinds of layers: what is taken back, copied or stopped is exact, or refused and
nothing has changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from indexmem_edge.native import api
from support.mixed import RECURRENT, WINDOWS, Made, condition, each_kind, made  # noqa: F401
from support.native_context import Context, Refused

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
    """Nothing is evicted here: what limits is what the window still holds, 256 tokens. From far to near, because what
    is granted changes what it holds: the first one granted is the limit."""
    tokens = made.text(360, seed=1)
    with made.context(budget=600) as c, made.context(budget=600) as twin:
        true = twin.feed(tokens, 24)
        n, refused = 0, 0
        for stop in (17, 255, 257, 270, 340):
            made.same(c.feed(tokens[n:stop], by), true[n:stop])
            n = stop
            distances = [300, *range(250, 236, -1), 215, 100, 25, 24, 17, 16, 15, 2, 1]
            got = take_back_and_repeat(made, c, tokens, n, distances, true, 24)
            assert {1, 2, 15, 16} <= set(got)
            refused += len([d for d in distances if d < n]) - len(got)
        made.same(c.feed(tokens[n:], 24), true[n:])
    assert refused


@pytest.mark.parametrize("name", RECURRENT)
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


@pytest.mark.parametrize("name", [name for name in ("qwen35", "nemotron_h", "lfm2") if name in RECURRENT])
@pytest.mark.parametrize("last", [[24], [24, 1], [24, 2], [24, 3, 1, 1], [24, 1, 5]], ids=str)
def test_snapshots_of_a_recurrent_state(made: Made, last: list[int]) -> None:
    """A context can keep the last few states. A ubatch leaves no more of them than it has tokens."""
    tokens = made.text(48 + sum(last) + 5)
    n = 48 + sum(last)
    with made.context(budget=600, n_rs_seq=4) as c, made.context(budget=600) as twin:
        true = twin.feed(tokens, 24)
        for d in range(1, 7):
            c.clear()
            c.feed(tokens[:48], 24)
            for size in last:
                c.decode(tokens[c.n_seen() : c.n_seen() + size])
            if c.seq_rm(0, n - d):
                assert d <= 4
                made.same(c.decode(tokens[n - d :]), true[n - d :])
            else:
                assert d > min(4, last[-1] - 1)
                made.same(c.decode(tokens[n:]), true[n:])


@pytest.mark.parametrize("name", [name for name in ("qwen35", "nemotron_h", "lfm2") if name in RECURRENT])
def test_snapshots_of_others_are_not_taken_for_ones_own(made: Made) -> None:
    """A state or a copy brings one snapshot; what lay beside it belongs to another text."""
    tokens, others, n = made.text(60), made.text(48, 1), 50
    with made.context(budget=600, n_rs_seq=4, n_seq=3) as c, made.context(budget=600) as twin:
        true = twin.feed(tokens, 24)
        for way in ("load", "load after a step back", "copy", "copy of a copy", "copy after a step back"):
            for d in range(1, 5):
                c.clear()
                c.feed(others, 24, seq=1)
                c.feed(tokens[:n], 24)
                if way.endswith("a step back"):
                    assert c.seq_rm(0, n - 1)
                if way.startswith("load"):
                    assert c.load(c.save(0), 1)
                else:
                    c.seq_cp(0, 1)
                    if way == "copy of a copy":
                        c.feed(others, 24, seq=0)
                        c.seq_cp(1, 2)
                        c.seq_cp(2, 1)
                seen = c.n_seen(1)
                if c.seq_rm(1, seen - d):
                    seen -= d
                assert c.n_seen(1) == seen
                made.same(c.decode(tokens[seen:], seq=1), true[seen:])


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
    from indexmem_edge import llama_cpp

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


# -------------------------------------------------------------------------------------------------------------- abort


@each_kind
@pytest.mark.parametrize("seen,batch", [(30, 1), (30, 10), (44, 10), (300, 24), (20, 60)], ids=str)
def test_what_is_stopped_has_not_happened_or_breaks_the_sequence(made: Made, seen: int, batch: int) -> None:
    tokens = made.text(seen + batch + 60)
    for after in (0, 25, 60, 200):
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
                assert "broken" in api.last_error() and c.state_size(0) == 0
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


@pytest.mark.parametrize("name", [name for name in ("qwen35", "nemotron_h", "lfm2") if name in RECURRENT])
def test_snapshots_stay_where_their_sequence_is_moved(made: Made) -> None:
    """Sequences that are evaluated together lie in neighbouring rows, so another may have to make room."""
    tokens, others = made.text(60), made.text(40, 1)
    with made.context(budget=600, n_rs_seq=4, n_seq=3) as c, made.context(budget=600) as twin:
        true = twin.feed(tokens, 24)
        for seq, text in ((2, others[:30]), (0, tokens[:45]), (1, others[:30])):
            c.feed(text, 24, seq=seq)
        c.decode(tokens[45:50])
        c.decode_many({1: others[30:31], 2: others[30:31]})
        assert c.seq_rm(0, 48)
        made.same(c.decode(tokens[48:49]), true[48:49])


@pytest.mark.parametrize("name", [name for name in ("qwen35", "nemotron_h", "lfm2") if name in RECURRENT])
@pytest.mark.parametrize("n_seq", [2, 4])
def test_a_step_back_is_of_one_of_two_copies(made: Made, n_seq: int) -> None:
    tokens, others = made.text(60), made.text(40, 1)
    with made.context(budget=600, n_rs_seq=4, n_seq=n_seq) as c, made.context(budget=600) as twin:
        true = twin.feed(tokens, 24)
        for seq, text in ((2, others[:30]), (0, tokens[:45]), (3, others[:30])):  # which lie in rows in this order
            if seq < n_seq:
                c.feed(text, 24, seq=seq)
        c.decode(tokens[45:50])
        c.seq_cp(0, 1)
        assert c.seq_rm(0, 47)
        if n_seq > 2:
            c.decode_many(dict.fromkeys(range(2, n_seq), others[30:31]))
        made.same(c.decode(tokens[50:51], seq=1), true[50:51])
        made.same(c.decode(tokens[47:48]), true[47:48])


@pytest.mark.parametrize("name", [name for name in ("qwen35",) if name in RECURRENT])
def test_ubatches_that_cannot_keep_snapshots(made: Made) -> None:
    for n_ubatch in (1, 5):
        with pytest.raises(Refused, match="at least 6 tokens, found"):
            made.context(budget=600, n_rs_seq=4, n_ubatch=n_ubatch)
    with made.context(budget=600, n_rs_seq=4, n_ubatch=6) as c:
        c.feed(made.text(20), 6)


@pytest.mark.parametrize("name", ["kimi-linear", "minimax-01", "qwen35"])
@pytest.mark.parametrize(("n_seq", "n_ubatch"), [(3, 32), (5, 4)])
def test_ubatches_that_sequences_do_not_divide(made: Made, n_seq: int, n_ubatch: int) -> None:
    """For some models llama.cpp reserves a graph of one sequence, whatever their number is."""
    tokens = made.text(40)
    with made.context(budget=600, n_seq=n_seq, n_ubatch=n_ubatch) as c, made.context(budget=600, n_ubatch=n_ubatch) as twin:
        true = twin.feed(tokens, 8)
        parts = [c.decode_many(dict.fromkeys(range(n_seq), tokens[n:n + 8])) for n in range(0, 40, 8)]
        for seq in (0, n_seq - 1):
            made.same(np.concatenate([part[seq] for part in parts]), true)
