"""Logits and positions of a context, compared with the reference."""

from __future__ import annotations

import numpy as np

from reference.policies import POLICIES, BoundedReference
from support.native_context import Context

EVICTING = [name for name in POLICIES if name != "full"]


def tokens_of(config, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, config.n_vocab, n).tolist()




def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))




def follow(native: Context, reference: BoundedReference, tokens: list[int], sizes: list[int]) -> tuple[float, float, float]:
    """Feeds both; (worst departure from the policy's rule, rms error of logits, spread of the logits)."""
    worst, errors, spread, i = 0.0, [], [], 0
    for n in sizes:
        ubatch = tokens[i : i + n]
        i += n
        ours, exact = native.decode(ubatch), reference.feed(ubatch)
        errors.append(ours - exact)
        spread.append(exact)
        worst = max(worst, reference.adopt(native.positions()))
    return worst, rms(np.concatenate(errors)), float(np.concatenate(spread).std())


SIZES = [24, 24, 13, 1, 1, 1, 24, 5] + [1] * 20
