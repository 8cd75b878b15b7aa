"""Contexts whose rotary positions stay inside a span, followed by the plain reference ubatch by ubatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from reference.cache_types import CacheType, bf16, q8_0
from reference.indexers import Indexer
from reference.memories import Memory
from reference.policies import BoundedReference
from reference.rotary import ROTARY_KINDS
from support.comparing import rms
from support.native_context import BF16, F16, F32, Q8_0, Context
from tiny.models import TinyConfig

CACHES: dict[str, tuple[int, CacheType]] = {
    "f32": (F32, None), "f16": (F16, np.float16), "bf16": (BF16, bf16), "q8_0": (Q8_0, q8_0),
}  # fmt: skip
KINDS = list(ROTARY_KINDS)
# values of the kind "behind" are no multiple of a block of q8_0
KINDS_AND_CACHES = [(kind, cache) for kind in KINDS for cache in CACHES if (kind, cache) != ("behind", "q8_0")]
# rms errors of logits, in units of their deviation: a wrong position does 0.1 and more
NEAR = {"f32": 2e-5, "f16": 5e-4, "bf16": 2e-3, "q8_0": 1e-2}

# Entries lie far apart before a rebase, and are what most logits rest on.
SETTINGS: dict[str, Any] = dict(budget=32, sinks=3, window=7, span=64)
N_UBATCH = 24
SIZES = [24, 24, 13, 1, 1, 1, 24, 5, *[1] * 20, 24, 24, 17, *[1] * 30, 3, 24]


class Followed(NamedTuple):
    worst: float  # departure from the policy's rule, see BoundedReference.adopt
    error: float  # rms of logits
    spread: float  # deviation of the logits


def both(
    model: Any, config: TinyConfig, cache: str = "f16", n_ubatch: int = N_UBATCH, *, memory: Optional[Memory] = None,
    indexer: Optional[Indexer] = None, native: Optional[dict[str, Any]] = None, **settings: Any,
) -> tuple[Context, BoundedReference]:  # fmt: skip
    """A context and its reference. `native`: what is of the context alone. What chooses factors of the frequencies is how
    far positions reach, not how long the text may be."""
    kind, rounding = CACHES[cache]
    settings = SETTINGS | settings
    context = Context(model, n_ubatch=n_ubatch, **dict(type_k=kind, type_v=kind) | settings | (native or {}))
    reference = BoundedReference(
        config, cache_dtype=rounding, n_ctx=settings["span"], memory=memory, indexer=indexer, **settings
    )
    return context, reference


def compare(native: Context, reference: BoundedReference, seq: int = 0) -> float:
    """Rotary positions and counts are those of the reference, which adopts what is kept; how far that departs."""
    worst = reference.adopt(native.positions(seq))
    np.testing.assert_equal(native.rotary(seq), reference.rotary)
    stats = native.stats(seq)
    assert stats.n_seen == reference.n_seen and stats.n_rebases == reference.n_rebases
    assert stats.span == reference.span and stats.next_position == reference.next_position
    assert reference.span == 0 or stats.next_position <= reference.span
    return worst


def follow(
    native: Context, reference: BoundedReference, tokens: Sequence[int], sizes: Sequence[int] = SIZES
) -> Followed:
    """Feeds both, one ubatch at a time."""
    worst, errors, exact, i = 0.0, [], [], 0
    for n in sizes:
        ubatch = tokens[i : i + n]
        exact.append(reference.feed(ubatch))
        errors.append(native.decode(ubatch) - exact[-1])
        worst = max(worst, compare(native, reference))
        i += n
    return Followed(worst, rms(np.concatenate(errors)), float(np.concatenate(exact).std()))
