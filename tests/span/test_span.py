"""Rotary positions that stay inside a span: entries, positions and logits are those of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from reference.indexers import random_indexer, write_sidecar
from reference.rotary import ROTARY_KINDS
from support.comparing import EVICTING, rms, tokens_of
from support.native_context import Context, open_model
from support.spanned import CACHES, KINDS_AND_CACHES, NEAR, SETTINGS, SIZES, both, compare, follow

each_policy = pytest.mark.parametrize("policy", EVICTING)
each_cache = pytest.mark.parametrize("cache", CACHES)


def of_kind(tiny: Tiny, kind: str) -> Any:
    arch, overrides = ROTARY_KINDS[kind]
    return tiny(arch, **overrides)


@pytest.mark.parametrize("kind,cache", KINDS_AND_CACHES)
def test_kinds_of_rotation(tiny: Tiny, kind: str, cache: str) -> None:
    """The policy ranks without rounding, so all that differs is arithmetic."""
    path, config = of_kind(tiny, kind)
    with open_model(path) as model:
        native, reference = both(model, config, cache, policy="random", seed=7)
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(SIZES), seed=1))
    assert reference.n_rebases >= 4 and worst == 0
    assert error < NEAR[cache] * spread


@each_policy
@pytest.mark.parametrize("kind", ["norm", "neox", "partial-norm"])
def test_policies(tiny: Tiny, kind: str, policy: str) -> None:
    path, config = of_kind(tiny, kind)
    with open_model(path) as model:
        native, reference = both(model, config, policy=policy, seed=7)
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(SIZES), seed=2))
    assert reference.n_rebases >= 4
    assert worst < 2e-2 and error < NEAR["f16"] * spread


@pytest.mark.parametrize("variant", ["retention-mlp", "pairwise-mean", "kvzap-mlp"])
@pytest.mark.parametrize("sizes", [SIZES, [1] * 150], ids=["mixed", "single"])
def test_indexers(tiny: Tiny, tmp_path: Path, variant: str, sizes: list[int]) -> None:
    """Hidden states that wait to be scored wait across a rebase."""
    path, config = tiny("llama")
    indexer = random_indexer(variant, config.n_layer, config.n_embd, config.n_head_kv)
    indexer = write_sidecar(tmp_path / "i.gguf", indexer, "f32", architecture=config.arch)
    with open_model(path) as model:
        native, reference = both(
            model, config, indexer=indexer, native=dict(sidecar=tmp_path / "i.gguf"), policy="indexer"
        )
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(sizes), seed=3), sizes)
    assert reference.n_rebases >= 3
    assert worst < 2e-2 and error < NEAR["f16"] * spread


@pytest.mark.parametrize(
    "settings",
    [
        dict(span=56), dict(span=57, sinks=0), dict(span=200), dict(span=64, pin=12), dict(window=20, sinks=1),
        dict(evict_step=1), dict(evict_step=30), dict(budget=40, budget_ratio=0.25), dict(window=28, sinks=3),
    ],
    ids=str,
)  # fmt: skip
def test_settings(tiny: Tiny, settings: dict[str, Any]) -> None:
    """The least span there can be: budget and one ubatch; no entries but the protected; gaps of every length."""
    path, config = tiny("llama")
    sizes = [*SIZES, *[24] * 8]
    with open_model(path) as model:
        native, reference = both(model, config, policy="random", **settings)
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(sizes), seed=4), sizes)
    assert reference.n_rebases >= 2 and worst == 0
    assert error < NEAR["f16"] * spread


@pytest.mark.parametrize("heads", [(32, 4, 4), (32, 4, 1), (128, 8, 2)], ids=str)
def test_geometries(tiny: Tiny, heads: tuple[int, int, int]) -> None:
    path, config = tiny("llama", **dict(zip(("head_dim", "n_head", "n_head_kv"), heads)))
    with open_model(path) as model:
        native, reference = both(model, config, policy="tova")
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(SIZES), seed=5))
    assert worst < 2e-2 and error < NEAR["f16"] * spread


@each_policy
@pytest.mark.parametrize("n", [300, 64, 65])
def test_a_prompt_longer_than_the_span_in_one_call(tiny: Tiny, policy: str, n: int) -> None:
    path, config = tiny("llama")
    tokens, rest = tokens_of(config, n, seed=28), tokens_of(config, 40, seed=7)  # a text without ties
    with open_model(path) as model:
        native, reference = both(model, config, "f32", policy=policy)
        with native:
            logits, exact = native.decode(tokens), reference.feed_all(tokens, 24)
            assert (reference.n_rebases > 0) == (n > 64) and reference.min_gap() > 5e-5
            assert compare(native, reference) < 2e-2
            assert rms(logits - exact) < NEAR["f32"] * exact.std()
            worst, error, spread = follow(native, reference, rest, [1] * 40)
    assert worst < 2e-2 and error < NEAR["f32"] * spread


def test_several_sequences(tiny: Tiny) -> None:
    """One batch of sequences of different lengths, of which some come to their span, and some have room."""
    path, config = tiny("qwen3")
    lengths = [5, 50, 41, 1]
    texts = [tokens_of(config, n + 120, seed=s) for s, n in enumerate(lengths)]
    with open_model(path) as model:
        native, first = both(model, config, policy="knorm", native=dict(n_seq=4))
        references = [first, *(both(model, config, policy="knorm")[1] for _ in texts[1:])]
        with native:
            for s, n in enumerate(lengths):
                native.feed(texts[s][:n], 4, seq=s)
                references[s].feed_all(texts[s][:n], 4)
            errors, spread, i, alone = [], [], 0, 0
            for n in [1, 1, 3, 6, 5, *[1] * 60, 6, 6, *[1] * 20]:
                before = [r.n_rebases for r in references]
                ours = native.decode_many({s: t[lengths[s] + i : lengths[s] + i + n] for s, t in enumerate(texts)})
                for s, text in enumerate(texts):
                    exact = references[s].feed(text[lengths[s] + i : lengths[s] + i + n])
                    errors.append(ours[s] - exact)
                    spread.append(exact)
                    assert compare(native, references[s], s) < 2e-2
                alone += 0 < sum(r.n_rebases - b for r, b in zip(references, before)) < len(texts)
                i += n
    assert alone > 3 and all(r.n_rebases for r in references)
    assert rms(np.concatenate(errors)) < NEAR["f16"] * np.concatenate(spread).std()


@each_policy
@each_cache
def test_below_the_span_every_bit_is_that_of_a_cache_without(tiny: Tiny, policy: str, cache: str) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, 130, seed=8)
    arguments = SETTINGS | dict(policy=policy, type_k=CACHES[cache][0], type_v=CACHES[cache][0], n_ubatch=24)
    with open_model(path) as model, Context(model, **arguments) as c, Context(model, **arguments | dict(span=0)) as free:
        for i, n in ((0, 24), (24, 24), *((i, 1) for i in range(48, 64))):
            np.testing.assert_array_equal(c.decode(tokens[i : i + n]), free.decode(tokens[i : i + n]))
        assert c.save(0) == free.save(0)
        assert (c.stats().n_rebases, c.stats().next_position, c.stats().n_evictions > 0) == (0, 64, True)
        assert rms(c.decode(tokens[64:65]) - free.decode(tokens[64:65])) > 0, "a rebase is felt"
        assert (c.stats().n_rebases, free.stats().n_rebases) == (1, 0)


def test_the_trained_length_is_the_default(tiny: Tiny) -> None:
    path, config = tiny("llama", n_ctx_train=64)
    tokens = tokens_of(config, 200, seed=9)
    arguments = SETTINGS | dict(n_ubatch=24)
    del arguments["span"]
    with open_model(path) as model:
        with Context(model, **arguments) as default, Context(model, **arguments, span=64) as asked:
            assert default.stats().span == 64 and default.span_reason() == ""
            np.testing.assert_array_equal(default.feed(tokens, 24), asked.feed(tokens, 24))
        with Context(model, **arguments, span=0) as free:
            free.feed(tokens, 24)
            stats = free.stats()
            assert (stats.span, stats.n_rebases, stats.next_position) == (0, 0, 200)
            assert free.span_reason() == ""
            np.testing.assert_equal(free.rotary(), free.positions())


@each_cache
def test_entries_that_live_through_a_hundred_rebases(tiny: Tiny, cache: str) -> None:
    """The policy gives every position a rank for good, so the best stay to the end. What their keys lose by being rounded
    again and again is in the reference, too."""
    path, config = tiny("llama", n_layer=1, n_head=2, n_head_kv=1)
    sizes = [24] * 104
    with open_model(path) as model:
        native, reference = both(model, config, cache, policy="random", seed=3, span=56)
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(sizes), seed=11), sizes)
    assert reference.n_rebases >= 100 and worst == 0
    assert sum(p < 1200 for p in reference.kept[0][0]) > 5, "nothing has lived long"
    assert error < NEAR[cache] * spread


LINEAR, YARN = 1, 2  # enum llama_rope_scaling_type


@pytest.mark.parametrize(
    "arch,overrides,options,length",
    [
        ("llama", dict(n_ctx_train=100), {}, 100),
        ("llama", dict(n_ctx_train=256, n_ctx_orig=64, yarn=4.0), {}, 256),
        ("phi3", dict(n_ctx_train=600, n_ctx_orig=256, long_factors=True), dict(n_ctx=512), 600),
        ("phi3", dict(n_ctx_train=600, n_ctx_orig=256, long_factors=True), dict(n_ctx=256), 256),
        ("llama", dict(n_ctx_train=100), dict(rope=(LINEAR, 0.25)), 400),
        ("llama", dict(n_ctx_train=100), dict(rope=(YARN, 0.5)), 200),
        ("llama", dict(n_ctx_train=256, n_ctx_orig=64, yarn=4.0), dict(rope=(YARN, 0.125)), 512),
    ],
    ids=str,
)  # fmt: skip
def test_the_length_that_a_model_was_trained_for(
    tiny: Tiny, arch: str, overrides: dict[str, Any], options: dict[str, Any], length: int
) -> None:
    """As its positions are scaled now. llama.cpp changes the length it has read when a context scales them by YaRN."""
    path, config = tiny(arch, **overrides)
    arguments = SETTINGS | dict(n_ubatch=24)
    del arguments["span"]
    with open_model(path) as model:
        for _ in range(2):
            with Context(model, **arguments, **options) as c:
                assert c.stats().span == length


def test_threads_do_not_change_the_result(tiny: Tiny) -> None:
    path, config = tiny("llama")
    tokens, states = tokens_of(config, 200, seed=10), []
    with open_model(path) as model:
        for n_threads in (1, 2, 3):
            with Context(model, n_ubatch=24, n_threads=n_threads, policy="snapkv", **SETTINGS) as c:
                c.feed(tokens[:120], 24)
                c.feed(tokens[120:], 1)
                states.append(c.save(0))
    assert states[0] == states[1] == states[2]


def test_bytes_stay_what_they_were(tiny: Tiny) -> None:
    path, config = tiny("llama")
    with open_model(path) as model, Context(model, n_ubatch=24, policy="tova", n_ctx=4096, **SETTINGS) as c:
        c.feed(tokens_of(config, 120), 24)
        c.feed(tokens_of(config, 100), 1)
        before = c.stats()
        c.feed(tokens_of(config, 2016), 24)  # of a size that has come before: a new one has a graph, and buffers, of its own
        after = c.stats()
    assert after.n_rebases > 50
    for name in ("kv_bytes", "meta_bytes", "compute_bytes", "work_bytes"):
        assert getattr(before, name) == getattr(after, name), name
