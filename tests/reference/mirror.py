"""Unbounded contexts that forget what a bounded one has evicted: what it has to compute, whatever the model is.

llama.cpp's own caches can lose any position, of which the layers that attend to everything then know nothing; recurrent
layers are not touched by that, and windows only if what is removed still lies in them. So the window that a policy
protects is at least as long as that of the model here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from indexmem_edge import llama_cpp
from reference.spans import end_of_rebased, rebased
from support.comparing import rms
from support.native_context import F16, F32, Q8_0, Context
from tiny.models import TinyConfig

CACHES = {"f32": F32, "f16": F16, "q8_0": Q8_0}
EXACT: dict[str, Any] = dict(flash_attn=False, type_k=F32, type_v=F32)  # nothing is rounded to halfs

# One thread: what takes time in tiny models is to wait for others.
BARE: dict[str, Any] = dict(n_ubatch=24, n_threads=1)  # of contexts without a budget
SETTINGS: dict[str, Any] = BARE | dict(budget=44, sinks=3, window=20)
FAR = 1 << 20  # no position of any text
SIZES = [24, 24, 13, 1, 1, 1, 24, 5, *[1] * 20, 24, 7]


def near(config: TinyConfig) -> float:
    """rms error in units of the logits' deviation where a bounded cache of f32 rounds nothing but sums: 0 if there are
    layers with a window, whose keys and values flash attention makes halfs of."""
    return 0 if config.sliding_window else 2e-5


def kept(bounded: Context, seq: int = 0) -> set[int]:
    """What all heads of all bounded layers hold; they hold the same where this is used."""
    heads = [head.tolist() for layer in bounded.positions(seq) for head in layer]
    assert heads and all(head == heads[0] for head in heads)
    return set(heads[0])


class Mirror:
    """Follows one sequence of a bounded context. Rotary positions are the positions that llama.cpp knows here."""

    def __init__(self, model: Any, seq: int = 0, **settings: Any) -> None:
        self.context = Context(model, **BARE | settings)
        self._seq, self._n_seen = seq, 0
        self._rotary: dict[int, int] = {}  # of each index that is held
        self.n_rebases = 0

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    @property
    def n_gone(self) -> int:
        return self._n_seen - len(self._rotary)

    def adopt(self, context: Context) -> None:
        """What the context holds already, of which nothing is missing."""
        self._n_seen = context.n_seen()
        self._rotary = {i: i for i in range(self._n_seen)}

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        start = self.context.n_seen()
        for i in range(len(tokens)):
            self._rotary[self._n_seen + i] = start + i
        self._n_seen += len(tokens)
        return self.context.decode(tokens)

    def forget(self, bounded: Context) -> None:
        """What the bounded context has forgotten."""
        for index in sorted(self._rotary.keys() - kept(bounded, self._seq)):
            at = self._rotary.pop(index)
            assert self.context.seq_rm(0, at, at + 1)

    def make_room(self, n_new: int, span: int, n_protected: int, window: int) -> None:
        """The rebase before a ubatch, if there has to be one."""
        if self.context.n_seen() + n_new <= span:
            return
        index = np.array(sorted(self._rotary))
        old = np.array([self._rotary[i] for i in index])
        new = rebased(index, old, n_protected, window, end_of_rebased(len(index), n_new, span))
        self._shift(0, FAR, FAR)  # so that none gets a position that another still has
        for a, b in zip(old.tolist(), new.tolist()):
            self._shift(FAR + a, FAR + a + 1, b - a - FAR)
        self._rotary = dict(zip(index.tolist(), new.tolist()))
        self.n_rebases += 1

    def _shift(self, p0: int, p1: int, by: int) -> None:
        llama_cpp.llama_memory_seq_add(self.context.memory, 0, p0, p1, by)

    def rotary(self) -> list[int]:
        return [self._rotary[i] for i in sorted(self._rotary)]


class Compared(NamedTuple):
    """rms errors of logits, their deviation, how many positions were evicted, and how much that changes."""

    ours: float
    theirs: float  # of the mirror with the cache type of the bounded context
    spread: float
    n_gone: int
    felt: float
    n_rebases: int


def compare(model: Any, tokens: Sequence[int], sizes: Sequence[int], cache: str, **settings: Any) -> Compared:
    """A bounded context against an exact mirror, ubatch by ubatch. With a span, positions are renewed in all."""
    kind = dict(type_k=CACHES[cache], type_v=CACHES[cache])
    settings = SETTINGS | dict(span=0) | kind | settings
    with (
        Context(model, **settings) as bounded,
        Mirror(model, **EXACT) as exact,
        Mirror(model, **kind) as rounded,
        Context(model, **BARE | EXACT) as whole,
    ):
        logits: list[tuple[np.ndarray, ...]] = []
        i = 0
        for n in sizes:
            ubatch = tokens[i : i + n]
            for mirror in (exact, rounded):
                if settings["span"]:
                    mirror.make_room(n, settings["span"], settings["sinks"], settings["window"])
            logits.append((bounded.decode(ubatch), exact.feed(ubatch), rounded.feed(ubatch), whole.decode(ubatch)))
            for mirror in (exact, rounded):
                mirror.forget(bounded)
            i += n
            if settings["span"]:
                held = [head.tolist() for layer in bounded.rotary() for head in layer]
                assert held and all(head == exact.rotary() for head in held)
        assert bounded.stats().n_rebases == exact.n_rebases
        n_gone = exact.n_gone
    ours, true, theirs, all_of_it = (np.concatenate(x) for x in zip(*logits))
    return Compared(
        rms(ours - true), rms(theirs - true), float(true.std()), n_gone, rms(all_of_it - true), exact.n_rebases
    )  # fmt: skip
