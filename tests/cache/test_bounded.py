"""The bounded cache against the plain reference: positions, logits, and the path it takes when nothing is evicted."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge.errors import BudgetError
from reference.decoder import forward
from reference.policies import BoundedReference
from support.comparing import EVICTING, SIZES, follow, rms, tokens_of
from support.native_context import F16, F32, Q4_0, Q8_0, Context, Refused, open_model
from tiny.models import SUPPORTED


@pytest.mark.parametrize("arch", SUPPORTED)
@pytest.mark.parametrize("n_batch", [96, 7, 1], ids=lambda n: f"by{n}")
def test_budget_larger_than_text_is_as_exact_as_the_original(tiny: Tiny, arch: str, n_batch: int) -> None:
    path, config = tiny(arch)
    tokens = tokens_of(config, 96)
    exact = forward(config, tokens)
    with open_model(path) as model, Context(model) as original, Context(model, budget=512) as bounded:
        theirs, ours = original.feed(tokens, n_batch), bounded.feed(tokens, n_batch)
    assert rms(ours - exact) <= 1.2 * rms(theirs - exact)
    # the same greedy choice wherever the original path is sure of its own
    margin = np.diff(np.sort(exact, axis=-1)[:, -2:], axis=-1)[:, 0]
    sure = margin > 4 * np.abs(theirs - exact).max()
    assert sure.any()
    assert (ours.argmax(-1) == exact.argmax(-1))[sure].all()


@pytest.mark.parametrize("arch", SUPPORTED)
def test_no_budget_is_the_original_path(tiny: Tiny, arch: str) -> None:
    """Bit for bit what a context made without our functions gives, also after a bounded one was made and freed."""
    path, config = tiny(arch)
    tokens = tokens_of(config, 40)
    with open_model(path) as model:
        with Context(model) as c:
            first = c.feed(tokens, 16)
        with Context(model, budget=32) as c:
            c.feed(tokens, 16)
        with Context(model) as c:
            assert np.array_equal(first, c.feed(tokens, 16))






@pytest.mark.parametrize("arch", SUPPORTED)
@pytest.mark.parametrize("policy", EVICTING)
def test_positions_and_logits_follow_the_reference(tiny: Tiny, arch: str, policy: str) -> None:
    path, config = tiny(arch)
    tokens = tokens_of(config, sum(SIZES), seed=1)
    settings = dict(budget=40, sinks=3, window=9, policy=policy, seed=7)
    full = forward(config, tokens, cache_dtype=np.float16)
    with open_model(path) as model:
        with Context(model) as original:
            base = rms(original.feed(tokens, 24) - full)
        with Context(model, n_ubatch=24, **settings) as native:
            reference = BoundedReference(config, cache_dtype=np.float16, **settings)
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert reference.evictions
    assert worst < 2e-2
    assert error <= 1.5 * base
    assert error < 0.02 * spread


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("types", [(F32, F32), (F16, F16), (Q8_0, Q8_0), (Q4_0, Q4_0), (Q8_0, F16)], ids=["f32", "f16", "q8_0", "q4_0", "mixed"])
def test_cache_types(tiny: Tiny, policy: str, types: tuple[int, int]) -> None:
    """Quantised caches, whose keys, queries and values llama.cpp rotates: no further from exact than the original path."""
    path, config = tiny("qwen3")
    tokens = tokens_of(config, sum(SIZES), seed=2)
    settings = dict(budget=40, sinks=3, window=9, policy=policy, seed=7)
    full = forward(config, tokens)
    with open_model(path) as model:
        with Context(model, type_k=types[0], type_v=types[1]) as original:
            base = rms(original.feed(tokens, 24) - full)
        with Context(model, n_ubatch=24, type_k=types[0], type_v=types[1], **settings) as native:
            reference = BoundedReference(config, **settings)
            worst, error, _ = follow(native, reference, tokens, SIZES)
    assert worst < (0.5 if Q4_0 in types else 0.1 if Q8_0 in types else 2e-2)
    assert error <= 1.5 * base


@pytest.mark.parametrize("step", [1, 5, 32])
def test_eviction_step(tiny: Tiny, step: int) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, 80, seed=3)
    settings = dict(budget=50, sinks=2, window=8, policy="knorm", evict_step=step)
    with open_model(path) as model, Context(model, **settings) as native:
        reference = BoundedReference(config, cache_dtype=np.float16, **settings)
        worst, _, _ = follow(native, reference, tokens, [1] * 80)
        stats = native.stats()
    assert worst < 2e-2
    assert stats.n_evictions == len({e.ubatch for e in reference.evictions}) > 0
    assert stats.n_seen == 80 and stats.n_kept + stats.n_evicted == 80


@pytest.mark.parametrize("head_dim,n_head,n_head_kv", [(32, 4, 4), (32, 4, 1), (128, 8, 2)])
def test_geometries(tiny: Tiny, head_dim: int, n_head: int, n_head_kv: int) -> None:
    path, config = tiny("llama", head_dim=head_dim, n_head=n_head, n_head_kv=n_head_kv)
    tokens = tokens_of(config, sum(SIZES), seed=4)
    settings = dict(budget=40, sinks=3, window=9, policy="tova")
    with open_model(path) as model, Context(model, n_ubatch=24, **settings) as native:
        worst, error, spread = follow(native, BoundedReference(config, cache_dtype=np.float16, **settings), tokens, SIZES)
    assert worst < 2e-2 and error < 0.02 * spread


def test_full_policy_fails_when_the_budget_is_used_up_and_loses_nothing(tiny: Tiny) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, 40)
    with open_model(path) as model, Context(model, budget=32, policy="full") as c, Context(model) as original:
        c.decode(tokens[:30])
        with pytest.raises(Refused):
            c.decode(tokens[30:35])
        assert c.n_seen() == 30
        original.decode(tokens[:30])
        c.decode(tokens[30:32])
        assert [len(p) for layer in c.positions() for p in layer] == [32] * 4


def test_threads_do_not_change_the_result(tiny: Tiny) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, 150)
    results = []
    with open_model(path) as model:
        for n_threads in (1, 2, 3):
            with Context(model, budget=64, policy="snapkv", window=40, n_threads=n_threads) as c:
                c.feed(tokens, 32)
                results.append(c.positions())
    for other in results[1:]:
        np.testing.assert_equal(other, results[0])


def test_kv_bytes_do_not_depend_on_the_text(tiny: Tiny) -> None:
    path, config = tiny("llama")
    with open_model(path) as model, Context(model, budget=64, n_ctx=4096) as c:
        before = c.stats()
        c.feed(tokens_of(config, 3000), 300)
        after = c.stats()
    row = 2 * config.n_layer * config.n_head_kv * config.head_dim * 2
    assert before.kv_bytes == after.kv_bytes == before.n_slots * row
    assert before.meta_bytes == after.meta_bytes
    assert after.n_kept <= 64 and after.n_seen == 3000


@pytest.mark.parametrize(("pin", "window"), [(0, 174), (100, 150), (567, 128)])
def test_a_window_that_nobody_chose_is_a_quarter_of_the_room(tiny: Tiny, pin: int, window: int) -> None:
    """The same entries and logits as of a cache that was told so, and the least of it where a long prefix is pinned."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 900, seed=5)
    settings = dict(budget=700, policy="random", pin=pin, seed=3)
    with open_model(path) as model, Context(model, window=0, **settings) as left, Context(model, window=window, **settings) as told:
        assert left.stats().window == window
        assert np.array_equal(left.feed(tokens, 32), told.feed(tokens, 32))
        for ours, theirs in zip(left.positions(), told.positions()):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))
            assert all(set(range(900 - window, 900)) <= set(head) for head in ours)
    with open_model(path) as model, pytest.raises(BudgetError, match=r"701 are needed .*pin 572. . window 128"):
        Context(model, window=0, **settings | {"pin": 572})
