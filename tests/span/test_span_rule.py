"""The reference by itself: the rule of a rebase, and that renewing a position is what rotating by the new one would be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from conftest import Tiny
from reference.cache_types import bf16, q8_0, rounding
from reference.memories import Residual, random_centroid, random_residual
from reference.policies import POLICIES, BoundedReference
from reference.rotary import ROTARY_KINDS, Rotary
from reference.spans import end_of_rebased, rebased
from support.comparing import rms, tokens_of

each_kind = pytest.mark.parametrize("kind", ROTARY_KINDS)
each_policy = pytest.mark.parametrize("policy", [p for p in POLICIES if p != "full"])
SETTINGS: dict[str, Any] = dict(budget=24, sinks=3, window=6, span=64)


@st.composite
def entries(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Index, rotary positions, protected and window of a head that has been rebased before."""
    protected, window = draw(st.integers(0, 6)), draw(st.integers(1, 6))
    gaps = draw(st.lists(st.integers(1, 40), max_size=20))
    between = protected - 1 + np.cumsum(gaps, dtype=int)
    last = int(between[-1]) if gaps else protected - 1
    index = np.concatenate((np.arange(protected), between, last + draw(st.integers(1, 30)) + np.arange(window)))
    closer = np.minimum(np.diff(index, prepend=-1), draw(st.integers(1, 50)))
    closer[:protected] = 1
    return index, np.cumsum(closer) - 1, protected, window


@given(entries(), st.integers(1, 30), st.integers(0, 200))
def test_rule(held: tuple[np.ndarray, np.ndarray, int, int], n_new: int, room: int) -> None:
    index, rotary, protected, window = held
    span = len(index) + n_new + room
    end = end_of_rebased(len(index), n_new, span)
    assert len(index) <= end <= span - n_new
    new = rebased(index, rotary, protected, window, end)
    assert new[-1] == end - 1 and new[0] >= 0
    assert (np.diff(new) >= 1).all(), "order is kept, and no two have one position"
    assert (new[:protected] == rotary[:protected]).all()
    assert (np.diff(new[-window:]) == 1).all()
    assert (np.diff(new[protected:]) <= np.diff(rotary[protected:])).all(), "neighbours stay neighbours"


@given(entries())
def test_where_there_is_no_room_positions_are_dense(held: tuple[np.ndarray, np.ndarray, int, int]) -> None:
    index, rotary, protected, window = held
    np.testing.assert_array_equal(rebased(index, rotary, protected, window, len(index)), np.arange(len(index)))


def test_gaps_are_clipped_alike() -> None:
    index = np.array([0, 1, 10, 11, 40, 90, 95, 96])
    new = rebased(index, index, n_protected=2, window=2, end=32)  # 28 positions for 4 entries: 7 each
    assert new.tolist() == [0, 1, 10, 11, 18, 25, 30, 31]


@each_kind
def test_differences_compose(tiny: Tiny, kind: str) -> None:
    """Also with a magnitude, which a renewed position must not apply again."""
    arch, overrides = ROTARY_KINDS[kind]
    _, config = tiny(arch, **overrides)
    rotary = Rotary.of(config, 0, n_ctx=256)
    assert rotary
    rng = np.random.default_rng(0)
    x, before, after = rng.standard_normal((40, 3, config.head_dim)), rng.integers(0, 500, 40), rng.integers(0, 500, 40)
    direct = rotary.apply(x, after)
    np.testing.assert_allclose(rotary.rotate(rotary.apply(x, before), after - before), direct, rtol=0, atol=1e-3)
    assert rms(direct - rotary.apply(x, before)) > 0.2
    np.testing.assert_array_equal(rotary.rotate(x, np.zeros(40, int)), x)
    others = np.delete(np.arange(config.head_dim), np.s_[rotary.offset : rotary.offset + rotary.n_dims])
    np.testing.assert_array_equal(direct[..., others], x[..., others])


@pytest.mark.parametrize("round,step", [(bf16, 2**-9), (q8_0, 0.5 / 127)], ids=["bf16", "q8_0"])
def test_rounding(round: Any, step: float) -> None:
    x = np.random.default_rng(0).standard_normal((50, 2, 64))
    error = np.abs(round(x) - x)
    assert 0 < error.max() and rms(error) < step * (1 if round is bf16 else np.abs(x).max())
    if round is bf16:
        np.testing.assert_array_equal(round(round(x)), round(x))
        assert round(np.array([1 + 2**-8, 1 + 3 * 2**-8])).tolist() == [1, 1 + 2**-6]  # halves go to even
    assert not round(np.zeros((1, 64))).any()


@pytest.mark.parametrize("round,share", [(np.float16, 0.005), (bf16, 0.04), (q8_0, 0.1)], ids=["f16", "bf16", "q8_0"])
def test_what_rounding_takes_from_a_key_in_250_rebases(tiny: Tiny, round: Any, share: float) -> None:
    """Types that lose more of it are refused."""
    rotary, rng = Rotary.of(tiny("llama")[1], 0), np.random.default_rng(0)
    assert rotary
    exact = rng.standard_normal((200, 64))
    keys = rounding(round)(exact)
    for by in rng.integers(-400, 400, (250, 200)):
        exact, keys = rotary.rotate(exact, by), rounding(round)(rotary.rotate(keys, by))
    lost = rms(keys - exact) / rms(exact)
    assert share / 5 < lost < share


@each_kind
def test_keys_are_what_the_new_positions_make_of_them(tiny: Tiny, kind: str) -> None:
    """After several rebases, computed again from the hidden states."""
    arch, overrides = ROTARY_KINDS[kind]
    _, c = tiny(arch, **overrides)
    reference = BoundedReference(c, policy="random", n_ctx=256, **SETTINGS)
    reference.feed_all(tokens_of(c, 300), 13)
    assert reference.n_rebases >= 5
    decoder = reference.decoder
    for il, h in reference.heads():
        held = reference.kept[il][h]
        k = decoder.project(il, decoder.hidden[il][held])[1][:, h]
        rotary, at = decoder.rotaries[il], reference.rotary[il][h]
        assert 0 <= at.min() and at.max() == reference.next_position - 1 < reference.span
        np.testing.assert_allclose(rotary.apply(k, at) if rotary else k, decoder.keys[il][held, h], rtol=0, atol=1e-3)


def test_the_newest_tokens_see_each_other_as_before(tiny: Tiny) -> None:
    """Products of the newest queries and keys do not change by a rebase; those with older keys do."""
    _, c = tiny("llama")
    reference = BoundedReference(c, policy="random", **SETTINGS)
    reference.feed_all(tokens_of(c, 60), 10)

    def products() -> np.ndarray:
        queries, keys = reference.decoder.queries[1][-6:, 0], reference.decoder.keys[1][reference.kept[1][0], 0]
        return queries @ keys.T

    before = products()
    assert reference.make_room(10) and reference.next_position == end_of_rebased(24, 10, 64)
    after = products()
    np.testing.assert_allclose(after[:, -6:], before[:, -6:], rtol=0, atol=1e-3)
    assert rms(after[:, 3:-6] - before[:, 3:-6]) > 0.3


@each_policy
def test_below_the_span_nothing_changes(tiny: Tiny, policy: str) -> None:
    _, c = tiny("llama")
    tokens = tokens_of(c, 100)
    spanned = BoundedReference(c, policy=policy, **SETTINGS)
    free = BoundedReference(c, policy=policy, **SETTINGS | dict(span=0))
    one, other = spanned.feed_all(tokens[:64], 9), free.feed_all(tokens[:64], 9)
    np.testing.assert_array_equal(one, other)
    assert spanned.kept == free.kept and spanned.n_rebases == 0
    assert rms(spanned.feed_all(tokens[64:], 9) - free.feed_all(tokens[64:], 9)) > 0.1, "a rebase is felt"
    assert spanned.n_rebases > 0


def test_what_was_before_a_rebase_cannot_be_taken_back(tiny: Tiny) -> None:
    _, c = tiny("llama")
    reference = BoundedReference(c, policy="streaming", **SETTINGS)
    tokens = tokens_of(c, 75)
    reference.feed_all(tokens[:60], 10)
    for n in (5, 1, 1, 1, 1):  # the rebase comes before the first of those that do not fit
        reference.feed(tokens[reference.n_seen : reference.n_seen + n])
    assert reference.n_rebases == 1
    n_before = reference.n_before
    assert not reference.truncate(n_before - 1) and reference.n_seen == 69
    assert reference.truncate(n_before)


def test_slots_of_a_memory_move_with_the_newest_tokens(tiny: Tiny) -> None:
    """A slot that holds one entry reads the same for the newest query before and after."""
    _, c = tiny("llama")
    memory = random_centroid(c.n_layer, 40)
    reference = BoundedReference(c, policy="knorm", memory=memory, **SETTINGS | dict(budget=64, span=96))
    reference.feed_all(tokens_of(c, 90), 10)
    slots = reference.decoder.memories[1][0]
    assert slots and (slots.counts > 0).all()
    before = reference.decoder.queries[1][-1, :3] @ slots.keys.T
    assert reference.make_room(10)
    np.testing.assert_allclose(reference.decoder.queries[1][-1, :3] @ slots.keys.T, before, rtol=0, atol=1e-3)


def test_a_residual_memory_cannot_be_rotated(tiny: Tiny) -> None:
    _, c = tiny("llama")
    memory: Residual = random_residual(c.n_layer, c.head_dim)
    reference = BoundedReference(c, policy="knorm", memory=memory, **SETTINGS)
    with pytest.raises(ValueError, match="without a span"):
        reference.feed_all(tokens_of(c, 90), 10)
