"""Sequences and states with a latent memory: it is copied, saved, restored and cleared with what is beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import Tiny
from indexmem_edge.errors import IndexMemError
from reference.indexers import random_indexer
from reference.memories import write_memory_sidecar
from reference.policies import BoundedReference
from support.comparing import tokens_of
from support.memories import each_kind, random_memory
from support.native_context import F16, F32, Q8_0, Context, Refused, open_model
from support.operations import N_SEQ, Operation, follow, operations
from tiny.models import TinyConfig

SETTINGS: dict[str, Any] = dict(budget=60, window=9, policy="knorm")

Sidecar = Callable[..., Path]


@pytest.fixture(scope="session")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Sidecar:
    """sidecar(config, kind, seed, variant) -> path of a memory, with an indexer if a variant is named."""
    folder = tmp_path_factory.mktemp("sidecars")

    def make(config: TinyConfig, kind: str, seed: int = 0, variant: str = "", **keys: Any) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.gguf"
        geometry = (config.n_layer, config.n_embd, config.n_head_kv)
        indexer = random_indexer(variant, *geometry, seed) if variant else None
        write_memory_sidecar(
            path, random_memory(kind, config, seed=seed), indexer, n_embd=geometry[1], n_head_kv=geometry[2], **keys
        )
        return path

    return make


@each_kind
@pytest.mark.parametrize("variant", ["", "pairwise-mean"])
@pytest.mark.parametrize("whole", [True, False], ids=["context", "sequence"])
@pytest.mark.parametrize("cache", [F16, Q8_0], ids=["f16", "q8_0"])
@pytest.mark.parametrize("n", [20, 313], ids=lambda n: f"after{n}")
def test_a_loaded_state_continues_bit_for_bit(
    tiny: Tiny, sidecar: Sidecar, kind: str, variant: str, whole: bool, cache: int, n: int
) -> None:
    path, config = tiny("llama")
    tokens, rest = tokens_of(config, n), tokens_of(config, 80, seed=1)
    seq = None if whole else 0
    arguments = dict(sidecar=sidecar(config, kind, 0, variant), type_k=cache, type_v=cache, n_ubatch=60) | SETTINGS
    arguments["policy"] = "indexer" if variant else "knorm"
    with open_model(path) as model, Context(model, **arguments) as a, Context(model, **arguments) as b:
        a.feed(tokens, 60)
        b.feed(rest, 7)  # what was there is forgotten
        state = a.save(seq)
        assert b.load(state, seq)
        assert b.save(seq) == state
        np.testing.assert_array_equal(a.feed(rest, 1), b.feed(rest, 1))
        np.testing.assert_equal(a.positions(), b.positions())
        assert a.save(seq) == b.save(seq)


@each_kind
def test_states_of_another_memory(tiny: Tiny, sidecar: Sidecar, kind: str) -> None:
    """What weights have written only they can read; slots are means of keys and values, whose gate is a matter of reading. That a
    memory may come and go is the matter of test_state_fit.py."""
    path, config = tiny("llama")
    own = dict(sidecar=sidecar(config, kind), **SETTINGS)
    others = {
        "same kind": own | dict(sidecar=sidecar(config, kind, seed=1)),
        "other kind": own | dict(sidecar=sidecar(config, "residual" if kind == "centroid" else "centroid")),
        "slots": own | dict(sidecar=None, memory="centroid", memory_slots=9),
    }
    with open_model(path) as model, Context(model, **own) as a:
        a.feed(tokens_of(config, 130), 32)
        states = {seq: a.save(seq) for seq in (None, 0)}
        for name, other in others.items():
            with Context(model, **other) as b:
                b.feed(tokens_of(config, 130, seed=1), 20)
                for seq, state in states.items():
                    before, theirs = (c.save(seq) for c in (a, b))
                    if (name, kind) == ("same kind", "centroid"):
                        assert b.load(state, seq) and a.load(theirs, seq)
                        assert a.load(before, seq) and b.load(theirs, seq)
                        continue
                    assert not b.load(state, seq) and b.save(seq) == theirs
                    assert not a.load(theirs, seq) and a.save(seq) == before


@each_kind
def test_truncated_states(tiny: Tiny, sidecar: Sidecar, kind: str) -> None:
    path, config = tiny("llama", n_layer=1)
    arguments = dict(sidecar=sidecar(config, kind), **SETTINGS)
    with open_model(path) as model, Context(model, **arguments) as a, Context(model, **arguments) as b:
        a.feed(tokens_of(config, 100), 10)
        state = a.save(0)
        b.feed(tokens_of(config, 7), 7)
        before = b.save(0)
        for n in [*range(1, 300, 7), *range(300, len(state), 997), len(state) - 1]:
            assert not b.load(state[:n], 0)
        assert b.save(0) == before


@each_kind
def test_a_copied_sequence_goes_its_own_way(tiny: Tiny, sidecar: Sidecar, kind: str) -> None:
    path, config = tiny("llama")
    shared, one, other = tokens_of(config, 120), tokens_of(config, 60, 1), tokens_of(config, 60, 2)
    arguments = dict(sidecar=sidecar(config, kind), **SETTINGS)
    with open_model(path) as model, Context(model, n_seq=2, **arguments) as c, Context(model, **arguments) as alone:
        c.feed(tokens_of(config, 90, 3), 5, seq=1)  # is replaced, with its memory
        c.feed(shared, 5)
        c.seq_cp(0, 1)
        first, second = c.feed(one, 5, seq=0), c.feed(other, 5, seq=1)
        alone.feed(shared, 5)
        state = alone.save(0)
        np.testing.assert_array_equal(first, alone.feed(one, 5))
        assert alone.load(state, 0)
        np.testing.assert_array_equal(second, alone.feed(other, 5))


@each_kind
@pytest.mark.parametrize("how", ["clear", "seq_rm", "seq_keep"])
def test_the_same_again_after_clearing(tiny: Tiny, sidecar: Sidecar, kind: str, how: str) -> None:
    """Results depend on nothing but the tokens; the other sequence loses nothing unless it is cleared, too."""
    path, config = tiny("llama")
    tokens, others = tokens_of(config, 150), tokens_of(config, 110, seed=2)
    arguments = dict(sidecar=sidecar(config, kind), n_seq=2, **SETTINGS)
    with open_model(path) as model, Context(model, **arguments) as c, Context(model, **arguments) as fresh:
        c.feed(tokens_of(config, 130, seed=1), 30)
        c.feed(others, 30, seq=1)
        fresh.feed(others, 30, seq=1) if how != "clear" else None
        if how == "clear":
            c.clear()
        elif how == "seq_rm":
            assert c.seq_rm(0, 0)
        else:
            c.seq_keep(1)
        np.testing.assert_array_equal(c.feed(tokens, 25), fresh.feed(tokens, 25))
        np.testing.assert_array_equal(c.feed(tokens, 1, seq=1), fresh.feed(tokens, 1, seq=1))
        assert c.save() == fresh.save()


@each_kind
def test_tokens_taken_back(tiny: Tiny, sidecar: Sidecar, kind: str) -> None:
    """A tail that evicted nothing leaves the memory as it is; what evicted something cannot be taken back."""
    path, config = tiny("llama")
    tokens, others = tokens_of(config, 120), tokens_of(config, 70, seed=1)
    arguments = dict(sidecar=sidecar(config, kind), evict_step=12, **SETTINGS)
    with open_model(path) as model, Context(model, **arguments) as c, Context(model, **arguments) as fresh:
        c.feed(tokens, 1)
        n_since = c.stats().budget - c.stats().n_kept - (8 if kind == "centroid" else 0)
        n_back = 12 - n_since - 1
        assert 0 < n_back < 12, "another length of the text is needed"
        before = c.save(0)
        assert not c.seq_rm(0, len(tokens) - 13) and c.save(0) == before
        assert c.seq_rm(0, len(tokens) - n_back)
        fresh.feed(tokens[: len(tokens) - n_back], 1)
        np.testing.assert_array_equal(c.feed(others, 1), fresh.feed(others, 1))


# ---------------------------------------------------------------------------------------------- any order


@given(
    kind=st.sampled_from(["centroid", "residual"]),
    n_slots=st.integers(1, 20),
    room=st.integers(1, 30),
    window=st.integers(1, 9),
    step=st.integers(0, 40),
    ratio=st.sampled_from([0.0, 0.4, 0.8]),
    n_ubatch=st.sampled_from([1, 7, 16, 70]),
    todo=operations,
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_operations(
    tiny: Tiny, tmp_path: Path, kind: str, n_slots: int, room: int, window: int, step: int, ratio: float,
    n_ubatch: int, todo: list[Operation],
) -> None:  # fmt: skip
    """The reference of every sequence goes through the same; what is kept and the logits follow it."""
    path, config = tiny("llama", n_head=4, head_dim=32)
    memory = random_memory(kind, config, n_slots)
    options: dict[str, Any] = dict(
        budget=3 + window + room + memory.n_slots, sinks=3, window=window, evict_step=step, policy="keydiff",
        budget_ratio=ratio,
    )  # fmt: skip
    new = BoundedReference(config, memory=memory, **options)
    write_memory_sidecar(tmp_path / "memory.gguf", memory, n_embd=config.n_embd, n_head_kv=config.n_head_kv)
    exact = dict(type_k=F32, type_v=F32, sidecar=tmp_path / "memory.gguf")
    with open_model(path) as model, Context(model, n_ubatch=n_ubatch, n_seq=N_SEQ, **exact, **options) as c:
        follow(c, new, todo, n_ubatch, config.n_vocab)


# ---------------------------------------------------------------------------------------------- refused


def test_the_policy_full_is_full_where_slots_begin(tiny: Tiny) -> None:
    path, config = tiny("llama")
    options: dict[str, Any] = dict(budget=40, policy="full", memory="centroid", memory_slots=8)
    with open_model(path) as model, Context(model, **options) as c:
        c.decode(tokens_of(config, 32))
        with pytest.raises(Refused):
            c.decode([5])
        assert c.n_seen() == 32


def test_settings_that_are_refused(tiny: Tiny, sidecar: Sidecar) -> None:
    """The error says what is missing, or too much."""
    path, config = tiny("llama")
    centroid, residual = (sidecar(config, kind) for kind in ("centroid", "residual"))
    refused: list[tuple[str, dict[str, Any]]] = [
        ("best", dict(memory="best")),
        ("residual", dict(memory="residual")),
        ("residual", dict(memory="residual", sidecar=centroid)),
        ("slots", dict(memory="centroid", memory_slots=8, budget=3 + 9 + 8)),
        ("slots", dict(memory="centroid", budget=3 + 9 + 64)),
        ("slots", dict(sidecar=centroid, budget=3 + 9 + 8)),
        ("gate", dict(sidecar=sidecar(config, "centroid", **{"indexmem.centroid.gate": [1.0, 0.0]}))),
        ("gate", dict(sidecar=sidecar(config, "centroid", **{"indexmem.centroid.gate": [1.0]}))),
        ("slot_count", dict(sidecar=sidecar(config, "centroid", **{"indexmem.centroid.slot_count": 0}))),
        ("head", dict(sidecar=sidecar(tiny("llama", head_dim=32)[1], "residual"))),
    ]
    with open_model(path) as model:
        for reason, options in refused:
            arguments = dict(budget=60, sinks=3, window=9, policy="knorm") | options
            with pytest.raises((Refused, IndexMemError), match=reason):
                Context(model, **arguments).close()
        for options in (
            dict(memory="centroid", memory_slots=8, budget=3 + 9 + 8 + 1),
            dict(memory="centroid", budget=3 + 9 + 64 + 1),
            dict(sidecar=centroid, budget=3 + 9 + 8 + 1),
            dict(sidecar=residual, budget=3 + 9 + 1),
        ):
            arguments = dict(sinks=3, window=9, policy="knorm") | options
            with Context(model, **arguments) as c:
                c.feed(tokens_of(config, 100), 30)
