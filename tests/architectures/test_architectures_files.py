"""States of models of several kinds of layers: what is loaded goes on like what was saved, what is refused has changed
nothing."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from indexmem_edge import llama_cpp
from support.architectures import BOUNDED
from support.mixed import KINDS, RECURRENT, Made, condition, each_kind, made  # noqa: F401
from support.native_context import Q8_0, Context


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


@pytest.mark.parametrize("name", [name for name in KINDS if name not in RECURRENT])
def test_a_state_of_what_was_taken_back(made: Made) -> None:
    tokens, others = made.text(330), made.text(330, 6)
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
def test_a_copy_that_waits_is_saved_as_it_will_be(made: Made) -> None:
    """Copies are made at the next decode, or when what they share is written to."""
    more = made.text(40, 2)
    with made.context(n_seq=3) as c:
        c.feed(made.text(90), 24, seq=0)
        c.feed(made.text(25, 1), 24, seq=1)
        c.seq_cp(0, 2)
        c.seq_cp(1, 0)
        c.seq_cp(2, 1)
        waiting = [c.save(s) for s in range(3)], c.save()
        logits = [c.feed(more, 7, seq=s) for s in range(3)]
        assert c.load(waiting[1])
        for s in range(3):
            made.same(c.feed(more, 7, seq=s), logits[s])
        for s in range(3):
            assert c.load(waiting[0][s], 0)
            made.same(c.feed(more, 7), logits[s])


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


@pytest.mark.parametrize("name", [name for name in ("gemma3", "olmo2") if name in BOUNDED])
def test_a_window_with_too_little_in_it(made: Made) -> None:
    """Its rows lie at the end of a state, by tensors, behind their number."""
    n, config = 90, made.config
    row = 2 * config.n_head_kv * config.head_dim
    n_tensors = 2 * (config.n_layer - len(config.full_layers))
    tokens = made.text(n + 20)
    with made.context() as source, made.context() as c:
        source.feed(tokens[:n], 24)
        state = source.save(0)
        start = len(state) - n_tensors * n * row
        assert state[start - 8 : start] == struct.pack("<Q", n)
        for held in (1, 5, config.sliding_window - 2):
            ends = [state[end - held * row : end] for end in range(start + n * row, len(state) + 1, n * row)]
            c.feed(tokens[:30], 24)
            before = c.save(0)
            assert not c.load(state[: start - 8] + struct.pack("<Q", held) + b"".join(ends), 0)
            assert c.save(0) == before
            c.clear()


@each_kind
def test_states_of_other_contexts(made: Made) -> None:
    tokens = made.text(60)
    with made.context() as source, Context(made.model) as unbounded:
        source.feed(tokens, 24)
        unbounded.decode(tokens)
        state, unbounded_state = source.save(0), unbounded.save(0)
        for change in (dict(budget=40), dict(policy="knorm"), dict(type_k=Q8_0, type_v=Q8_0)):
            with made.context(**change) as c:
                c.feed(tokens[:20], 24)
                before = c.save(0)
                assert not c.load(unbounded_state, 0) and c.save(0) == before
                if "type_k" in change:
                    assert not c.load(state, 0) and c.save(0) == before
                else:  # tests/cache/test_state_fit.py says what is in it
                    assert c.load(state, 0) and c.stats(0).n_kept <= change.get("budget", 60) and np.isfinite(c.feed(tokens[:5], 5)).all()


def save_file(c: Context, path: Path, tokens: Sequence[int], seq: int = 0) -> None:
    ids = (ctypes.c_int32 * len(tokens))(*tokens)
    assert llama_cpp.llama_state_seq_save_file(c.ctx, str(path).encode(), seq, ids, len(tokens)) == path.stat().st_size


def load_file(c: Context, path: Path, seq: int = 0) -> bool:
    ids, n = (ctypes.c_int32 * 1000)(), ctypes.c_size_t()
    return llama_cpp.llama_state_seq_load_file(c.ctx, str(path).encode(), seq, ids, 1000, ctypes.byref(n)) > 0


@each_kind
def test_files(made: Made, tmp_path: Path) -> None:
    """llama.cpp's reader of files writes at once; what is refused must not have been written."""
    tokens, path = made.text(90), tmp_path / "state"
    with made.context() as source, made.context(n_seq=2) as c:
        source.feed(tokens, 24)
        save_file(source, path, tokens)
        c.feed(made.text(50, 1), 24, seq=1)
        c.feed(tokens[:30], 24)
        before = c.save(0), c.save(1)
        whole = path.read_bytes()
        rng = np.random.default_rng(1)
        for n in [*rng.integers(1, len(whole), 40).tolist(), len(whole) - 1]:
            path.write_bytes(whole[:n])
            assert not load_file(c, path)
            assert (c.save(0), c.save(1)) == before
        path.write_bytes(whole + b"\0" * 8)
        assert not load_file(c, path) and (c.save(0), c.save(1)) == before
        path.write_bytes(whole)
        assert load_file(c, path) and c.save(1) == before[1]
        made.same(c.feed(tokens[:40], 5), source.feed(tokens[:40], 5))


@each_kind
def test_a_checkpoint(made: Made) -> None:
    """A state that is asked for in parts (what a recurrent state or a window cannot go back to) is a whole one."""
    tokens, others = made.text(90), made.text(60, 1)
    with made.context() as c, made.context() as twin:
        for x in (c, twin):
            x.feed(tokens, 24)
        for flags in (0, 1):  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
            size = llama_cpp.llama_state_seq_get_size_ext(c.ctx, 0, flags)
            buffer = (ctypes.c_uint8 * size)()
            assert llama_cpp.llama_state_seq_get_data_ext(c.ctx, buffer, size, 0, flags) == size
            c.feed(others, 24)
            assert llama_cpp.llama_state_seq_set_data_ext(c.ctx, buffer, size, 0, flags) == size
            assert condition(c) == condition(twin)
        made.same(c.feed(others, 5), twin.feed(others, 5))
