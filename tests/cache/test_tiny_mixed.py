"""Tiny models of several kinds of layers: real for llama.cpp, small, and such that mistakes show in their logits."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import Tiny
from support.architectures import TABLE
from support.comparing import rms, tokens_of
from support.native_context import F16, F32, Context, open_model
from tiny.models import MIXED

each_model = pytest.mark.parametrize("name", MIXED)


def test_the_table_is_complete() -> None:
    assert TABLE.keys() == MIXED.keys()


@each_model
@pytest.mark.parametrize("single", [False, True], ids=["", "single"])
def test_ubatches_do_not_matter(tiny: Tiny, name: str, single: bool) -> None:
    """In single precision only the order of sums is left, which activations from a table of halfs make visible."""
    path, config = tiny(name, **TABLE[name].single if single else {})
    assert path.stat().st_size < 16e6
    tokens = tokens_of(config, 96)
    exact = dict(flash_attn=False, type_k=F32, type_v=F32)
    with open_model(path) as model:
        with Context(model, **exact) as whole, Context(model, **exact) as parts:
            logits = whole.decode(tokens)
            again = np.concatenate([parts.feed(tokens[:60], 13), parts.feed(tokens[60:], 1)])
        with Context(model, type_k=F16, type_v=F16) as flash:
            rounded = flash.feed(tokens, 24)
    assert np.isfinite(logits).all() and 0.5 < logits.std() < 20
    assert rms(again - logits) < (5e-4 if config.gelu else 1e-5) * logits.std()
    assert 1e-5 * logits.std() < rms(rounded - logits) < 1e-2 * logits.std(), "no cache, or one that makes errors grow"


@each_model
def test_the_beginning_is_remembered(tiny: Tiny, name: str) -> None:
    """Other tokens at the beginning of a text change what comes after its windows, unless there is nothing else."""
    path, config = tiny(name)
    tokens, others = tokens_of(config, 96), tokens_of(config, 96, seed=1)
    with open_model(path) as model, Context(model) as c:
        one = c.decode(tokens)[-8:]
        c.clear()
        other = c.decode([*others[:32], *tokens[32:]])[-8:]
    assert (rms(one - other) > 1e-2 * one.std()) == ("bounded already" not in TABLE[name].steps)


@pytest.mark.parametrize("seed", [0, 1])
def test_seeds(tiny: Tiny, seed: int) -> None:
    weights = [tiny("qwen35", seed=s)[1].weights for s in (seed, seed, 2)]
    same, other = ([np.array_equal(a, w[name]) for name, a in weights[0].items()] for w in weights[1:])
    assert all(same) and not any(other)
