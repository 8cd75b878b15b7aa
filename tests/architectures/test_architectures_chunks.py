"""Llama 4's windows are chunks of 8192 tokens: a token sees those of its own chunk, and none of the one before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge.calibrate.capture import Capture
from reference.mirror import EXACT, Mirror
from support.architectures import BOUNDED
from support.comparing import rms, tokens_of
from support.native_context import BF16, F16, Context, open_model

pytestmark = pytest.mark.skipif("llama4" not in BOUNDED, reason="windows are not supported yet")

CHUNK, N_BEFORE, N_UBATCH = 8192, 8180, 128
COMMON: dict[str, Any] = dict(n_ubatch=N_UBATCH, n_ctx=9728, n_threads=1)
# flash attention adds values that are halfs as halfs, which so long a window is too long for
KIND: dict[str, Any] = dict(type_k=F16, type_v=BF16)
SETTINGS: dict[str, Any] = COMMON | KIND | dict(budget=8720, sinks=4, window=20)


class Long:
    """A text up to shortly before the end of its first chunk, in states of bounded and unbounded contexts."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model = model
        self.tokens = tokens_of(config, 9300)
        self._states: dict[str, bytes] = {}

    def start(self, c: Context, kind: str) -> Context:
        if kind not in self._states:
            c.feed(self.tokens[:N_BEFORE], 512)
            self._states[kind] = c.save(0)
            c.clear()
        assert c.load(self._states[kind], 0)
        return c

    def bounded(self) -> Context:
        return self.start(Context(self.model, **SETTINGS), "bounded")


@pytest.fixture(scope="module")
def long(tiny: Tiny) -> Iterator[Long]:
    path, config = tiny("llama4", full_layers=(1, 3), n_head=1, n_head_kv=1)
    with open_model(path) as model:
        yield Long(model, config)


def test_the_end_of_a_chunk(long: Long) -> None:
    """Evictions begin in the second chunk, and are of tokens of the first."""
    sizes = [8, 1, 1, 1, 1, 1, 1, 30, 100, *[128] * 5, 1, 1]
    with long.bounded() as c, Mirror(long.model, **COMMON, **EXACT) as mirror:
        mirror.adopt(long.start(mirror.context, "exact"))
        i, logits = N_BEFORE, []
        for n in sizes:
            ubatch = long.tokens[i : i + n]
            logits.append((c.decode(ubatch), mirror.feed(ubatch)))
            mirror.forget(c)
            i += n
        assert mirror.n_gone > 200
    ours, exact = (np.concatenate(x) for x in zip(*logits))
    assert rms(ours - exact) < 3e-3 * exact.std()


def test_taking_back_around_the_end_of_a_chunk(long: Long) -> None:
    end = 8720  # from there on evictions are in the way
    with long.bounded() as c, long.bounded() as twin:
        true = np.concatenate([np.zeros((N_BEFORE, c.n_vocab), np.float32), twin.feed(long.tokens[N_BEFORE:end], 100)])
        granted: dict[int, set[int]] = {}
        for n in (8185, 8191, 8192, 8193, 8200, 8448, 8449, 8600, end):
            got = c.feed(long.tokens[c.n_seen() : n], 100)
            assert rms(got - true[n - len(got) : n]) < 3e-3 * got.std()
            granted[n] = set()
            for d in (n - 8185, n - CHUNK + 1, n - CHUNK, 100, 10, 9, 8, 2, 1):
                if 0 < d <= n - N_BEFORE and c.seq_rm(0, n - d):
                    granted[n].add(d)
                    again = c.feed(long.tokens[n - d : n], 100)
                    assert rms(again - true[n - d : n]) < 3e-3 * again.std()
                assert c.n_seen() == n
    assert granted[8193] >= {1, 2, 8}, "back into the first chunk, which is there"
    assert granted[end] >= {1, 100, end - CHUNK}, "to the beginning of the second"
    assert end - CHUNK + 1 not in granted[end], "not into the first, of which a part is gone"


# ------------------------------------------------------------------------------------------------ renewed positions

SPAN = 8960


@pytest.fixture(scope="module")
def released(tiny: Tiny) -> Iterator[Long]:
    """As the models that were released: what attends to all of the text is not rotated."""
    path, config = tiny("llama4", full_layers=(3,), n_head=1, n_head_kv=1)
    with open_model(path) as model:
        yield Long(model, config)


@pytest.mark.parametrize("policy", ["streaming", "random"])
def test_renewed_positions_change_nothing(released: Long, policy: str) -> None:
    """Chunks end where the text says, whatever their keys are rotated by; these move together, and full layers know no
    positions. Those that are renewed stay behind the first 8192 here, so that the scale of scores is the same."""
    settings = SETTINGS | dict(policy=policy, seed=3)
    with Context(released.model, **settings, span=SPAN) as c, Context(released.model, **settings, span=0) as free:
        released.start(c, policy)
        released.start(free, policy)
        logits = []
        for n in (8, 3, 1, 1, *[128] * 5, 100, 1, 1, *[128] * 3):
            ubatch = released.tokens[c.n_seen() : c.n_seen() + n]
            logits.append((c.decode(ubatch), free.decode(ubatch)))
        assert c.stats().n_rebases >= 1 and c.stats().n_evictions > 0 and free.stats().n_rebases == 0
        assert CHUNK < c.stats().next_position <= SPAN < free.stats().next_position == free.n_seen()
    ours, theirs = (np.concatenate(x) for x in zip(*logits))
    assert rms(ours - theirs) < 3e-3 * theirs.std()


def test_the_scale_of_scores_follows_renewed_positions(released: Long) -> None:
    """Where layers know no positions scores are scaled by how far the text has come: by positions below the span, which the
    model was trained with."""
    span, capture = 8300, Capture("Qcur-3")
    settings = COMMON | KIND | dict(budget=300, sinks=4, window=20, span=span)
    with Context(released.model, **settings, capture=capture) as c:
        for n in (*[128] * 64, 20, 30, 1, 1):
            start, rebases = c.stats().next_position, c.stats().n_rebases
            c.decode(released.tokens[c.n_seen() : c.n_seen() + n])
            end = c.stats().next_position
            _, before, after = capture.found["Qcur-3"][-3:]
            capture.found.clear()
            scales = (after * before).sum(axis=-1).ravel() / (before * before).sum(axis=-1).ravel()
            np.testing.assert_allclose(scales, 1 + 0.1 * np.log(1 + (np.arange(end - n, end) + 1) // CHUNK), rtol=1e-5)
            assert (end == start + n) == (c.stats().n_rebases == rebases)
        assert c.stats().n_rebases == 0 and scales[-1] > 1.06, "behind the first 8192"
        for n in (100, 1, 30):
            c.decode(released.tokens[c.n_seen() : c.n_seen() + n])
            _, before, after = capture.found["Qcur-3"][-3:]
            np.testing.assert_array_equal(after, before)
        assert c.stats().n_rebases == 1 and c.n_seen() > CHUNK > c.stats().next_position
