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
from indexmem_edge.native import api
from support.native_context import Context, open_model
from support.spanned import both, compare
from tiny.models import TinyConfig

FOLDER = Path(__file__).parents[1] / "golden"
SHAPE = dict(n_layer=2, n_head=2, n_head_kv=1, head_dim=32, n_embd=32, n_ff=48)
CACHE = dict(budget=24, sinks=3, window=6, policy="knorm")
# in a state of the first sequence alone, see indexmem-state.h
VERSION_AT = 8 + 4
SINKS_AT = VERSION_AT + 4 + 4 + len("knorm") + 4 + len("off") + 4
LAYERS_AT = SINKS_AT + 8 + 8 + 4 * 4
HEAD_AT = LAYERS_AT + 2 * 6 * 4 + 4


def texts(config: TinyConfig) -> list[int]:
    return np.random.default_rng(1).integers(3, config.n_vocab, 60).tolist()


def today(state: bytes) -> bytes:
    """The same in the present format: sizes of the parts in place of sinks and window, of which the head has what they came to; no
    shift, no rebase."""
    assert state[VERSION_AT : VERSION_AT + 4] == struct.pack("<I", 6)
    assert state[SINKS_AT : SINKS_AT + 8] == struct.pack("<2I", 3, 6)
    layers = [state[at : at + 24] for at in (LAYERS_AT, LAYERS_AT + 24)]
    sizes = struct.pack("<6I", 2 * 32 * 2, 0, 0, 0, 0, 0)  # K and V in f16, and nothing else
    return (
        state[:VERSION_AT] + struct.pack("<I", 8) + state[VERSION_AT + 4 : SINKS_AT] + state[SINKS_AT + 8 : LAYERS_AT]
        + layers[0] + sizes + layers[1] + sizes + state[HEAD_AT - 4 : HEAD_AT + 36] + bytes(12) + struct.pack("<2I", 3, 6)
        + state[HEAD_AT + 36 :]
    )  # fmt: skip


def of_format_7(state: bytes) -> bytes:
    """A state of format 6 in that one, which has a shift and rebases."""
    return state[:VERSION_AT] + struct.pack("<I", 7) + state[VERSION_AT + 4 : HEAD_AT + 36] + bytes(12) + state[HEAD_AT + 36 :]


@pytest.mark.parametrize("span", [0, 48])
def test_nothing_is_lost(tiny: Tiny, span: int) -> None:
    path, _ = tiny("llama", **SHAPE)
    sequence = (FOLDER / "state_6_sequence.bin").read_bytes()
    with open_model(path) as model, Context(model, n_ubatch=16, n_seq=2, span=span, **CACHE) as c:
        for state in (sequence, of_format_7(sequence), today(sequence)):
            assert c.load(state, 0)
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


def test_another_window_and_budget(tiny: Tiny) -> None:
    """They say what was protected; of the policy they do not say what another one needs to know."""
    path, config = tiny("llama", **SHAPE)
    tokens = texts(config)
    with open_model(path) as model:
        native, reference = both(model, config, n_ubatch=16, span=0, **CACHE)
        reference.feed_all(tokens, 16)
        with native, Context(model, n_ubatch=16, budget=16, sinks=2, window=9, policy="knorm", span=0) as small:
            for state in ((FOLDER / "state_6_sequence.bin").read_bytes(), of_format_7((FOLDER / "state_6_sequence.bin").read_bytes())):
                assert native.load(state, 0) and small.load(state, 0)
            assert reference.adopt(native.positions()) == 0
            reference.refit(budget=16, sinks=2, window=9)
            assert compare(small, reference) < 2e-2
            np.testing.assert_allclose(small.decode(tokens[:16]), reference.feed(tokens[:16]), atol=0.05)
            assert compare(small, reference) < 2e-2
        with Context(model, n_ubatch=16, **{**CACHE, "policy": "keydiff"}) as other:
            assert not other.load((FOLDER / "state_6_sequence.bin").read_bytes(), 0)
            assert "load it with the options that it was made with, and save it again" in api.last_error()
