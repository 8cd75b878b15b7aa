"""Positions inside a span, in models of several kinds of layers: each layer's keys are turned as it rotates them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from reference.mirror import CACHES, SETTINGS, SIZES, compare, near
from support.architectures import BOUNDED, TABLE
from support.comparing import rms, tokens_of
from support.each_architecture import DEEP, POLICIES, check, pairs
from support.mixed import KINDS
from support.native_context import Context, open_model
from support.spanned import both, follow

SPAN = 96  # a budget of 44, a ubatch of 24, and some
LONG = [*SIZES, *SIZES]
# What llama.cpp's own shift of positions turns rightly: not what has several dimensions of positions, or no rotation in
# some layers.
SHIFTED = [
    name for name in BOUNDED
    if TABLE[name].rotation == "all" and "mrope" not in TABLE[name].steps
]  # fmt: skip
STILL = [name for name in BOUNDED if TABLE[name].rotation == "none" and name not in DEEP]
OVERRIDES: dict[str, dict[str, Any]] = {
    "olmo2": {"yarn": 1.0, "n_ctx_orig": 0},  # its layers differ in that
    "mistral4": {"metadata": ()},  # scores that grow with positions
}


def spans_and_none(model: Any, tokens: list[int], cache: str, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a context with a span and of one without."""
    kind = dict(type_k=CACHES[cache], type_v=CACHES[cache])
    with (
        Context(model, **SETTINGS | kind | settings | dict(span=SPAN)) as c,
        Context(model, **SETTINGS | kind | settings | dict(span=0)) as free,
    ):
        logits, i = [], 0
        for n in LONG:
            logits.append((c.decode(tokens[i : i + n]), free.decode(tokens[i : i + n])))
            i += n
        assert c.span_reason() == "" and c.stats().n_rebases >= 3 and free.stats().n_rebases == 0
        assert c.stats().next_position <= SPAN < free.stats().next_position
    ours, theirs = (np.concatenate(x) for x in zip(*logits))
    return ours, theirs


@pytest.mark.parametrize("name,cache", pairs([n for n in BOUNDED if n != "llama4"], CACHES, "f16"))
def test_moving_everything_changes_nothing(tiny: Tiny, name: str, cache: str) -> None:
    """Without sinks streaming keeps an unbroken end of the text, all of which moves by the same distance."""
    path, config = tiny(name, **{"metadata": ()} if name == "mistral4" else {})
    with open_model(path) as model:
        ours, theirs = spans_and_none(model, tokens_of(config, sum(LONG)), cache, sinks=0)
    bound = near(config) if cache == "f32" else 0.0
    assert rms(ours - theirs) < (bound or {"q8_0": 0.1}.get(cache, 5e-3)) * theirs.std()


@pytest.mark.parametrize("name", STILL)
@pytest.mark.parametrize("policy", ["random", "snapkv"])
def test_what_is_not_rotated_does_not_care(tiny: Tiny, name: str, policy: str) -> None:
    """Full layers without rotation: entries may move by any distance. Windows move with the newest of them."""
    path, config = tiny(name)
    with open_model(path) as model:
        ours, theirs = spans_and_none(model, tokens_of(config, sum(LONG)), "f32", policy=policy, seed=5)
    assert rms(ours - theirs) < (near(config) or 5e-3) * theirs.std()


@pytest.mark.parametrize("name,policy", pairs(SHIFTED, ["streaming", *POLICIES], "tova", KINDS))
def test_gaps_close(tiny: Tiny, name: str, policy: str) -> None:
    """Entries of which each moves by another distance, against llama.cpp's own shifts of them."""
    path, config = tiny(name, **TABLE[name].single, **OVERRIDES.get(name, {}))
    with open_model(path) as model:
        result = compare(model, tokens_of(config, sum(LONG), seed=3), LONG, "f32", policy=policy, seed=7, span=SPAN)
    assert result.n_rebases >= 3
    check(config, "f32", result)


@pytest.mark.parametrize("name", [name for name in ("qwen2vl", "qwen3vl") if name in BOUNDED])
@pytest.mark.parametrize("policy", ["streaming", "random", "tova"])
def test_positions_of_several_dimensions(tiny: Tiny, name: str, policy: str) -> None:
    """Those of text are equal, so that the plain reference can follow."""
    path, config = tiny(name)
    with open_model(path) as model:
        native, reference = both(model, config, "f32", policy=policy, seed=7)
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(SIZES), seed=1), SIZES)
    assert reference.n_rebases >= 2
    assert worst < 2e-2 and error < 2e-5 * spread


@pytest.mark.parametrize("name", [name for name in BOUNDED if TABLE[name].recurrent or TABLE[name].window][::3])
def test_a_saved_state_remembers_positions(tiny: Tiny, name: str) -> None:
    path, config = tiny(name)
    tokens = tokens_of(config, 220)
    settings = SETTINGS | dict(span=SPAN, policy="tova")
    with open_model(path) as model, Context(model, **settings) as c, Context(model, **settings, n_seq=2) as other:
        c.feed(tokens[:150], 24)
        assert c.stats().n_rebases > 0
        assert other.load(c.save(0), 1)
        other.seq_cp(1, 0)
        expected = c.feed(tokens[150:], 10)
        for seq in (0, 1):
            got = other.feed(tokens[150:], 10, seq=seq)
            assert rms(got - expected) < 5e-3 * expected.std()
            assert other.stats(seq).n_rebases == c.stats().n_rebases > 1
