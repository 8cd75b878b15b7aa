"""States of format 6, which knows of no rotary positions, still load.

golden/state_6_*.bin are what the library of commit 28c3091 saved of the model and the tokens below: all of a context whose
second sequence has seen the first 10 tokens, and its first sequence alone.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from conftest import Tiny
from support.native_context import Context, open_model
from support.spanned import both, compare
from tiny.models import TinyConfig

FOLDER = Path(__file__).parents[1] / "golden"
SHAPE = dict(n_layer=2, n_head=2, n_head_kv=1, head_dim=32, n_embd=32, n_ff=48)
CACHE = dict(budget=24, sinks=3, window=6, policy="knorm")
# up to the end of the head of the first sequence in a state of that alone, see indexmem-state.h
N_HEAD = 8 + 4 + 4 + 4 + len("knorm") + 4 + len("off") + 7 * 4 + 8 + 2 * 6 * 4 + 4 + 36
VERSION_AT = 8 + 4


def texts(config: TinyConfig) -> list[int]:
    return np.random.default_rng(1).integers(3, config.n_vocab, 60).tolist()


def today(state: bytes) -> bytes:
    """The same in the present format: no shift, no rebase."""
    assert state[VERSION_AT : VERSION_AT + 4] == struct.pack("<I", 6)
    return state[:VERSION_AT] + struct.pack("<I", 7) + state[VERSION_AT + 4 : N_HEAD] + bytes(12) + state[N_HEAD:]


@pytest.mark.parametrize("span", [0, 48])
def test_nothing_is_lost(tiny: Tiny, span: int) -> None:
    path, _ = tiny("llama", **SHAPE)
    sequence = (FOLDER / "state_6_sequence.bin").read_bytes()
    with open_model(path) as model, Context(model, n_ubatch=16, n_seq=2, span=span, **CACHE) as c:
        assert c.load(sequence, 0)
        assert c.save(0) == today(sequence)
        c.clear()
        assert c.load((FOLDER / "state_6_context.bin").read_bytes())
        assert c.save(0) == today(sequence)
        assert (c.n_seen(0), c.n_seen(1)) == (60, 10)
        assert (c.stats().n_rebases, c.stats().next_position) == (0, 60)


@pytest.mark.parametrize("span", [0, 48])
def test_it_goes_on(tiny: Tiny, span: int) -> None:
    """With a span that it has passed already, from new positions."""
    path, config = tiny("llama", **SHAPE)
    tokens = texts(config)
    with open_model(path) as model:
        native, reference = both(model, config, n_ubatch=16, span=span, **CACHE)
        reference.span = 0
        reference.feed_all(tokens, 16)
        reference.span = span
        with native:
            assert native.load((FOLDER / "state_6_sequence.bin").read_bytes(), 0)
            assert reference.adopt(native.positions()) == 0
            for i, n in ((0, 16), (16, 1), (17, 16), (33, 16)):
                np.testing.assert_allclose(native.decode(tokens[i : i + n]), reference.feed(tokens[i : i + n]), atol=0.05)
                assert compare(native, reference) < 2e-2
            assert (native.stats().n_rebases > 0) == (span > 0)


@pytest.mark.parametrize("cut", [1, 12, 13, 500])
def test_a_short_one_is_refused(tiny: Tiny, cut: int) -> None:
    path, _ = tiny("llama", **SHAPE)
    sequence = (FOLDER / "state_6_sequence.bin").read_bytes()
    with open_model(path) as model, Context(model, n_ubatch=16, **CACHE) as c:
        assert not c.load(sequence[:-cut], 0)
        assert not c.load(sequence[:VERSION_AT] + struct.pack("<I", 7) + sequence[VERSION_AT + 4 :], 0)
        assert c.n_seen() == 0
