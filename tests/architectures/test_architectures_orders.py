"""Any order of decoding, removing, copying, stopping and loading: each sequence goes on as one that was only fed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import Tiny
from indexmem_edge import llama_cpp
from support.mixed import KINDS, Made
from support.native_context import Refused, open_model

N_SEQ = 3
Batches = list[list[int]]

seq, other = st.integers(0, N_SEQ - 1), st.integers(0, N_SEQ - 1)
operation = st.one_of(
    st.tuples(st.just("feed"), seq, st.integers(1, 24)),
    st.tuples(st.just("feed"), seq, st.integers(1, 3)),
    st.tuples(st.just("much"), seq, st.integers(80, 280)),
    st.tuples(st.just("together"), seq, st.integers(1, 12)),
    st.tuples(st.just("remove"), seq, st.integers(1, 30)),
    st.tuples(st.just("remove"), seq, st.integers(200, 270)),
    st.tuples(st.just("copy"), seq, other),
    st.tuples(st.just("load"), seq, other),
    st.tuples(st.just("stop"), seq, st.integers(0, 80)),
    st.tuples(st.just("clear"), seq, other),
    st.tuples(st.just("keep"), seq, other),
    st.tuples(st.just("shift"), seq, st.integers(-9, 9)),
    st.tuples(st.just("reload"), seq, other),
)


def cut(batches: Batches, n: int) -> Batches:
    """Without the last n tokens."""
    out = copy.deepcopy(batches)
    while n > 0:
        n, last = n - len(out[-1]), out.pop()
        if n < 0:
            out.append(last[:-n])
    return out


class Told:
    """A context of several sequences, and what each of them has been told."""

    def __init__(self, made: Made, budget: int, span: int) -> None:
        self._made = made
        self._settings = dict(evict_step=6, budget=budget, span=span)
        self.c = made.context(n_seq=N_SEQ, n_ubatch=24 * N_SEQ, **self._settings)
        self.batches: list[Batches] = [[] for _ in range(N_SEQ)]
        self._rng = np.random.default_rng(0)

    def tokens(self, n: int) -> list[int]:
        return self._rng.integers(3, self._made.config.n_vocab, n).tolist()

    def feed(self, seq: int, n: int) -> None:
        for i in range(0, n, 24):
            batch = self.tokens(min(24, n - i))
            self.c.decode(batch, seq)
            self.batches[seq].append(batch)

    def together(self, seq: int, n: int) -> None:
        parts = {s: self.tokens(n) for s in sorted({seq, (seq + 1) % N_SEQ})}
        self.c.decode_many(parts)
        for s, batch in parts.items():
            self.batches[s].append(batch)

    def remove(self, seq: int, n: int) -> None:
        held = self.c.n_seen(seq)
        if self._settings["span"]:
            return  # when positions are renewed depends on how long the batch was
        if n < held and self.c.seq_rm(seq, held - n):
            self.batches[seq] = cut(self.batches[seq], n)

    def copy(self, seq: int, other: int) -> None:
        self.c.seq_cp(seq, other)
        self.batches[other] = copy.deepcopy(self.batches[seq])

    def load(self, seq: int, other: int) -> None:
        if self.batches[seq]:
            assert self.c.load(self.c.save(seq), other)
            self.batches[other] = copy.deepcopy(self.batches[seq])

    def stop(self, seq: int, after: int) -> None:
        batch = self.tokens(24)
        try:
            with self.c.aborting(after):
                self.c.decode(batch, seq)
        except Refused:
            if self.c.stats(seq).broken:
                self.clear(seq)
        else:
            self.batches[seq].append(batch)

    def clear(self, seq: int, _: int = 0) -> None:
        assert self.c.seq_rm(seq, 0)
        self.batches[seq] = []

    def keep(self, seq: int, _: int) -> None:
        self.c.seq_keep(seq)
        self.batches = [batches if s == seq else [] for s, batches in enumerate(self.batches)]

    def shift(self, seq: int, by: int) -> None:
        """Does nothing."""
        assert not llama_cpp.llama_memory_can_shift(self.c.memory)
        llama_cpp.llama_memory_seq_add(self.c.memory, seq, 0, -1, by)
        llama_cpp.llama_memory_seq_div(self.c.memory, seq, 0, -1, 2)

    def reload(self, _: int, __: int) -> None:
        """The whole context."""
        state = self.c.save()
        self.c.decode([5, 6, 7], 0)
        assert self.c.load(state) and self.c.save() == state

    def check(self) -> None:
        """All sequences go on like one of their own that was told the same."""
        for s in range(N_SEQ):
            assert self.c.n_seen(s) == sum(map(len, self.batches[s]))
            probes = [self.tokens(24), self.tokens(1), self.tokens(7)]
            with self._made.context(**self._settings) as alone:
                for batch in self.batches[s]:
                    alone.decode(batch)
                for probe in probes:
                    self._made.same(self.c.decode(probe, s), alone.decode(probe))
                assert self.c.stats(s).n_kept == alone.stats().n_kept


@pytest.mark.parametrize("name", KINDS)
@given(limits=st.sampled_from([(44, 0), (400, 0), (44, 120)]), operations=st.lists(operation, min_size=2, max_size=14))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_operations(
    tiny: Tiny, name: str, limits: tuple[int, int], operations: list[tuple[str, int, int]]
) -> None:
    path, config = tiny(name)
    with open_model(path) as model:
        told = Told(Made(model, config, name), *limits)
        with told.c:
            for what, a, b in operations:
                {"much": told.feed}.get(what, getattr(told, what, None))(a, b)
            told.check()
