"""Positions that stay inside a span, in plain NumPy: the rule of a rebase.

The *index* of an entry is its place in the text. Its *rotary position* is what its key is rotated by; all of them are
below the span. A rebase gives the entries of a sequence new ones, so that the next tokens have room.
"""

from __future__ import annotations

import numpy as np

KEEP = 0.5  # share of the span that the entries may spread over, where they are fewer


def end_of_rebased(n_used: int, n_new: int, span: int) -> int:
    """Where the positions of n_used entries end, so that n_new tokens fit behind them."""
    return max(n_used, min(int(KEEP * span), span - n_new))


def rebased(index: np.ndarray, rotary: np.ndarray, n_protected: int, window: int, end: int) -> np.ndarray:
    """New rotary positions of the entries of one KV head, which are in order of index.

    Those of the protected prefix stay. The others end at `end`, with the gaps they had, but none longer than what leaves
    room for all.
    """
    out = rotary.copy()
    n_between = len(index) - n_protected - window
    longest = max(1, (end - n_protected - window) // n_between) if n_between > 0 else 1
    at = end - 1
    for i in reversed(np.flatnonzero(index >= n_protected)):
        if i + 1 < len(index):
            at -= min(int(rotary[i + 1] - rotary[i]), longest)
        out[i] = at
    return out
