"""Is text read after a million tokens read as well as near the beginning, from as many bytes?

The last tokens are scored as they come at the end of the whole text, and once more by contexts that begin shortly before them. What
is near the beginning and what is at the end are the same passages then, and only the length of the text differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..report import Row
from ..runner import System
from .arms import counts

PASSAGE = 4096  # tokens that are scored at a time, after as many that a new context reads first
PASSAGES = 4
LEAST = (PASSAGES + 1) * PASSAGE  # of a text
GOAL = 0.1  # nats, at most, above what the same passages have near the beginning
HOW = (
    f"far: the last {PASSAGES * PASSAGE} tokens of a text, scored at its end, and by new contexts of the same kind of which each "
    f"reads {PASSAGE} tokens and scores the next {PASSAGE}"
)


def run_far(open_system: Callable[[], System], text: Sequence[int], advance: Callable[[float], None]) -> Row:
    """`advance` gets the share that is done."""
    ends = [len(text) - i * PASSAGE for i in range(PASSAGES, -1, -1)]
    work = len(text) + 2 * PASSAGES * PASSAGE
    near = []
    for i, (start, end) in enumerate(zip(ends, ends[1:]), 1):
        with open_system() as system:
            system.feed(text[start - PASSAGE : start], last_logits=True)
            near.append(float(system.nll(text[start:end]).mean()))
        advance(2 * i * PASSAGE / work)
    with open_system() as system:
        before, step = system.byte_counts(), 16 * system.setup.ubatch
        for i in range(0, ends[0], step):
            system.feed(text[i : min(i + step, ends[0])], last_logits=True)
            advance((2 * PASSAGES * PASSAGE + min(i + step, ends[0])) / work)
        assert system.logits is not None
        far, finite = [], bool(np.isfinite(system.logits).all())
        for start, end in zip(ends, ends[1:]):
            nll = system.nll(text[start:end])
            finite = finite and bool(np.isfinite(nll).all())
            far.append(float(nll.mean()))
            advance(1 - (ends[-1] - end) / work)
        return {"far": far, "near": near, "finite": finite, "grown": before != system.byte_counts(), **counts(system)}
