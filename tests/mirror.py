"""Unbounded contexts that forget what a bounded one has evicted: what it has to compute, whatever the model is.

llama.cpp's own caches can lose any position, of which the layers that attend to everything then know nothing; recurrent
layers are not touched by that, and windows only if what is removed still lies in them. So the window that a policy
protects is at least as long as that of the model here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from native_context import F16, F32, Q8_0, Context
from test_bounded import rms
from tiny_models import TinyConfig

CACHES = {"f32": F32, "f16": F16, "q8_0": Q8_0}
EXACT: dict[str, Any] = dict(flash_attn=False, type_k=F32, type_v=F32)  # nothing is rounded to halfs

# One thread: what takes time in tiny models is to wait for others.
BARE: dict[str, Any] = dict(n_ubatch=24, n_threads=1)  # of contexts without a budget
SETTINGS: dict[str, Any] = BARE | dict(budget=44, sinks=3, window=20)
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
    """Follows one sequence of a bounded context."""

    def __init__(self, model: Any, seq: int = 0, **settings: Any) -> None:
        self.context = Context(model, **BARE | settings)
        self._seq, self._gone = seq, set[int]()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    @property
    def n_gone(self) -> int:
        return len(self._gone)

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        return self.context.decode(tokens)

    def forget(self, bounded: Context) -> None:
        self.remove(set(range(bounded.n_seen(self._seq))) - kept(bounded, self._seq))

    def remove(self, positions: Iterable[int]) -> None:
        for p in sorted(set(positions) - self._gone):
            assert self.context.seq_rm(0, p, p + 1)
            self._gone.add(p)


class Compared(NamedTuple):
    """rms errors of logits, their deviation, how many positions were evicted, and how much that changes."""

    ours: float
    theirs: float  # of the mirror with the cache type of the bounded context
    spread: float
    n_gone: int
    felt: float


def compare(model: Any, tokens: Sequence[int], sizes: Sequence[int], cache: str, **settings: Any) -> Compared:
    """A bounded context against an exact mirror, ubatch by ubatch."""
    kind = dict(type_k=CACHES[cache], type_v=CACHES[cache])
    with (
        Context(model, **SETTINGS | kind | settings) as bounded,
        Mirror(model, **EXACT) as exact,
        Mirror(model, **kind) as rounded,
        Context(model, **BARE | EXACT) as whole,
    ):
        logits: list[tuple[np.ndarray, ...]] = []
        i = 0
        for n in sizes:
            ubatch = tokens[i : i + n]
            logits.append((bounded.decode(ubatch), exact.feed(ubatch), rounded.feed(ubatch), whole.decode(ubatch)))
            for mirror in (exact, rounded):
                mirror.forget(bounded)
            i += n
        n_gone = exact.n_gone
    ours, true, theirs, all_of_it = (np.concatenate(x) for x in zip(*logits))
    return Compared(rms(ours - true), rms(theirs - true), float(true.std()), n_gone, rms(all_of_it - true))
