"""The cache of a window after text was taken back across the end of its rows: what it holds is then no longer in order."""

from __future__ import annotations

from typing import Any

import numpy as np

from conftest import Tiny
from support.comparing import rms, tokens_of
from support.native_context import Context, open_model

WINDOW, N_UBATCH = 512, 256  # the cache has rows for both, and none more


def test_planning_a_batch_forgets_nothing(tiny: Tiny) -> None:
    """A batch of two ubatches, the second of which overwrites rows that the first still looks at others in front of."""
    path, config = tiny("gemma3", sliding_window=WINDOW)
    tokens = tokens_of(config, 1468)
    options: dict[str, Any] = dict(budget=2000, n_ubatch=N_UBATCH, n_ctx=2048, n_threads=1, span=0)
    with open_model(path) as model, Context(model, **options) as straight, Context(model, **options) as c:
        straight.feed(tokens[:1112], N_UBATCH)
        c.feed(tokens[:600], 200)
        c.feed(tokens[600:856], N_UBATCH)
        assert c.seq_rm(0, 600, -1)
        c.feed(tokens[600:1112], N_UBATCH)
        expected, found = straight.decode(tokens[1112:]), c.decode(tokens[1112:])
    assert rms(found - expected) < 1e-2 * expected.std()
    assert np.abs(found - expected).max() < 0.1 * expected.std()
