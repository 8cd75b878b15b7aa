"""Recurrent states with a way back: what is stopped in a context that was made to be stopped has not happened."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from support.mixed import RECURRENT, Made, condition, made  # noqa: F401
from support.native_context import Context, Refused

each_recurrent = pytest.mark.parametrize("name", RECURRENT)
SNAPSHOTS = [name for name in ("qwen35", "nemotron_h", "lfm2") if name in RECURRENT]


def stop(c: Context, tokens: Sequence[int], after: int, seq: int = 0) -> bool:
    """Whether evaluating them was stopped after so many nodes, or they were too few for that."""
    try:
        with c.aborting(after):
            c.decode(tokens, seq)
    except Refused as refused:
        assert "returned 2" in str(refused)
        return True
    return False


@each_recurrent
@pytest.mark.parametrize("seen,batch", [(0, 10), (30, 1), (30, 60), (300, 24)], ids=str)
def test_what_is_stopped_has_not_happened(made: Made, seen: int, batch: int) -> None:
    """Nothing is evicted here: that is what else breaks a sequence."""
    tokens = made.text(seen + batch + 60)
    with made.context(budget=600, can_stop=True) as c, made.context(budget=600) as plain:
        true = plain.feed(tokens, 24)[seen:]
        for after in (0, 1, 9, 25, 60, 110, 200, 400, 900):
            c.clear()
            for i in range(0, seen, 24):
                c.decode(tokens[i : min(i + 24, seen)])
            before = c.save(0) if seen else b""
            if not stop(c, tokens[seen : seen + batch], after):
                break
            done = c.n_seen()
            assert (done - seen) % 24 == 0 and not c.stats().broken
            if seen and done == seen:
                assert c.save(0) == before
            made.same(c.feed(tokens[done:], 24), true[done - seen :])
        assert after > 25


@each_recurrent
def test_again_and_again(made: Made) -> None:
    """Every ubatch is stopped several times before it is computed; one token, many, and after a state was loaded."""
    tokens = made.text(120)
    with made.context(budget=600, can_stop=True) as c, made.context(budget=600) as plain:
        true, n = plain.feed(tokens, 24), 0
        for size in (1, 1, 24, 1, 7, 24, 2, 1, 1, 20):
            for after in (60, 3, 30):
                stop(c, tokens[n : n + size], after)
                assert c.n_seen() == n
            if size == 7:
                assert c.load(c.save(0), 0)
            made.same(c.decode(tokens[n : n + size]), true[n : n + size])
            n += size


@each_recurrent
def test_others_do_not_notice(made: Made) -> None:
    """Sequences that were evaluated alone, together, copied or cleared lie in either of their two places."""
    texts = [made.text(90, seed) for seed in range(3)]
    with made.context(budget=600, n_seq=3, n_ubatch=96, can_stop=True) as c, made.context(budget=600, n_seq=3, n_ubatch=96) as plain:

        def both(parts: dict[int, int]) -> None:
            given = {s: texts[s][c.n_seen(s) : c.n_seen(s) + n] for s, n in parts.items()}
            seen = [c.n_seen(s) for s in range(3)]
            for after in (0, 20, 60):
                with pytest.raises(Refused), c.aborting(after):
                    c.decode_many(given)
                assert [c.n_seen(s) for s in range(3)] == seen and not any(c.stats(s).broken for s in range(3))
            for ours, theirs in zip(c.decode_many(given).values(), plain.decode_many(given).values()):
                made.same(ours, theirs)

        both({0: 5})
        both({0: 5, 1: 5})  # one of them is new
        both({0: 1})
        both({1: 3, 2: 3})
        both({0: 4, 1: 4, 2: 4})  # not all in the same place
        both({0: 1, 1: 1, 2: 1})
        for x in (c, plain):
            x.seq_cp(1, 0)
        texts[0] = [*texts[1][: c.n_seen(1)], *texts[0]]
        both({0: 2})
        both({0: 3, 1: 3})
        for x in (c, plain):
            assert x.seq_rm(2, 0)
            assert x.load(x.save(0), 2)
        texts[2] = [*texts[0][: c.n_seen(0)], *texts[2]]
        both({0: 6, 1: 6, 2: 6})
        both({2: 1})


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshots_are_still_there(made: Made) -> None:
    """A step back, of which the ubatch that is stopped has read; and those of a sequence that was moved for another."""
    tokens = made.text(80)
    settings = dict(budget=600, n_rs_seq=4, n_seq=2)
    with made.context(**settings, can_stop=True) as c, made.context(budget=600) as plain:
        true = plain.feed(tokens, 24)
        c.feed(tokens[:50], 24)
        for n in (49, 46):  # of the last ubatch, which had two tokens, then of one of five
            if n == 46:
                c.decode(tokens[c.n_seen() : c.n_seen() + 5])
                n = c.n_seen() - 3
            assert c.seq_rm(0, n)
            for after in (0, 20, 60):
                assert stop(c, tokens[n : n + 1], after) and c.n_seen() == n
            made.same(c.decode(tokens[n : n + 1]), true[n : n + 1])
        c.feed(tokens[:20], 24, seq=1)
        c.decode(tokens[c.n_seen() : c.n_seen() + 5])
        n = c.n_seen()
        parts = {0: tokens[n : n + 1], 1: tokens[20:21]}
        with pytest.raises(Refused), c.aborting(30):
            c.decode_many(parts)
        assert c.seq_rm(0, n - 3)
        made.same(c.decode(tokens[n - 3 : n]), true[n - 3 : n])


@each_recurrent
def test_it_takes_a_second_state_and_nothing_else(made: Made) -> None:
    with made.context(can_stop=True) as c, made.context() as plain:
        tokens = made.text(130)
        made.same(c.feed(tokens, 24), plain.feed(tokens, 24))
        assert condition(c) == condition(plain) and c.save(0)[:64] == plain.save(0)[:64]
        assert c.stats().recurrent_bytes == 2 * plain.stats().recurrent_bytes
        assert len(c.save(0)) == len(plain.save(0)) and c.load(plain.save(0), 0) and plain.load(c.save(0), 0)
        np.testing.assert_array_equal(c.feed(tokens[:9], 1), plain.feed(tokens[:9], 1))
