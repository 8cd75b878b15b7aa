"""What the tests of sequences and states of models of several kinds of layers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from reference.mirror import SETTINGS
from support.architectures import BOUNDED, TABLE
from support.comparing import rms, tokens_of
from support.native_context import BF16, F16, F32, Context, open_model

# one of each kind of memory; the others differ in what their graphs compute
_CHOSEN = (
    "qwen3vl", "qwen35", "nemotron_h", "lfm2", "gemma3", "gemma4-shared", "gpt-oss", "deepseek2", "kimi-linear",
)  # fmt: skip
KINDS = [name for name in _CHOSEN if name in BOUNDED]
RECURRENT = [name for name in KINDS if TABLE[name].recurrent]
WINDOWS = [name for name in KINDS if TABLE[name].window]
each_kind = pytest.mark.parametrize("name", KINDS)


class Made:
    """A tiny model, and contexts of it whose results do not depend on where a key lies: flash attention, which windows
    have, adds values that are halfs as halfs, and takes halfs of those that are not rounded."""

    def __init__(self, model: Any, config: Any, name: str) -> None:
        self.model, self.config, self.recurrent = model, config, TABLE[name].recurrent
        self.window = TABLE[name].window

    def context(self, **settings: Any) -> Context:
        kind = dict(type_k=F16, type_v=BF16) if self.window else dict(type_k=F32, type_v=F32)
        return Context(self.model, **SETTINGS | kind | settings)

    def text(self, n: int, seed: int = 0) -> list[int]:
        return tokens_of(self.config, n, seed)

    def same(self, a: np.ndarray, b: np.ndarray) -> None:
        """But for sums in another order; with windows what they are sums of is rounded to halfs after that."""
        assert rms(a - b) < (1e-3 if self.window else 2e-5) * b.std()


@pytest.fixture
def made(tiny: Tiny, name: str) -> Iterator[Made]:
    path, config = tiny(name)
    with open_model(path) as model:
        yield Made(model, config, name)


def condition(c: Context, seq: int = 0) -> tuple[Any, ...]:
    stats = c.stats(seq)
    return c.n_seen(seq), stats.n_kept, stats.n_evictions, [[h.tolist() for h in heads] for heads in c.positions(seq)]
