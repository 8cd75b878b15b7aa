"""Budgets for models of several kinds of layers: the same logits as an unbounded context that lacks what is evicted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge.native import api
from reference.mirror import BARE, CACHES, EXACT, SETTINGS, SIZES, compare, near
from support.architectures import BOUNDED, TABLE
from support.comparing import rms, tokens_of
from support.each_architecture import DEEP, POLICIES, bounded_layers, check, pairs
from support.mixed import KINDS
from support.native_context import F16, Context, Refused, open_model

SHORT = [name for name in BOUNDED if name != "llama4"]  # whose windows end within these texts






@pytest.mark.parametrize("name,cache", pairs(BOUNDED, CACHES, "f16"))
def test_a_budget_that_never_evicts(tiny: Tiny, name: str, cache: str) -> None:
    path, config = tiny(name)
    tokens = tokens_of(config, 96)
    kind = dict(type_k=CACHES[cache], type_v=CACHES[cache])
    with open_model(path) as model:
        logits = []
        for settings in (EXACT, kind, kind | dict(budget=512)):
            with Context(model, **BARE | settings) as c:
                logits.append(np.concatenate([c.feed(tokens[:75], 60), c.feed(tokens[75:], 1)]))
    exact, theirs, ours = logits
    error = rms(ours - exact)
    bound = near(config) if cache == "f32" else 0.0
    assert error <= (bound * exact.std() or 1.2 * rms(theirs - exact))


@pytest.mark.parametrize("name", BOUNDED)
def test_which_layers_are_bounded(tiny: Tiny, name: str) -> None:
    path, config = tiny(name)
    with open_model(path) as model, Context(model, budget=64) as c:
        c.decode(tokens_of(config, 20))
        held = c.positions()
        assert [il for il, heads in enumerate(held) if heads] == bounded_layers(config)
        for heads in held:
            for positions in heads:
                assert positions.tolist() == list(range(20))


@pytest.mark.parametrize(
    "name,cache", pairs(SHORT, CACHES, "f16", [n for n in BOUNDED if n in KINDS or not TABLE[n].window])
)
def test_what_is_evicted_is_gone(tiny: Tiny, name: str, cache: str) -> None:
    """Several layers and heads, which streaming lets hold the same."""
    path, config = tiny(name)
    with open_model(path) as model:
        result = compare(model, tokens_of(config, sum(SIZES), seed=1), SIZES, cache)
    check(config, cache, result)


@pytest.mark.parametrize("name,policy", pairs(SHORT, POLICIES, "tova", [*KINDS, "mimo2", "gemma4"]))
def test_policies(tiny: Tiny, name: str, policy: str) -> None:
    """One layer of one head, so that there is one set of positions that an unbounded context can have."""
    path, config = tiny(name, **TABLE[name].single)
    with open_model(path) as model:
        result = compare(model, tokens_of(config, sum(SIZES), seed=2), SIZES, "f16", policy=policy, seed=7)
    check(config, "f16", result)


@pytest.mark.parametrize(
    "name", [name for name in ("qwen35", "gemma3", "gpt-oss", "kimi-linear", "gemma4-shared") if name in BOUNDED]
)
@pytest.mark.parametrize(
    "settings,sizes",
    [
        (dict(n_ubatch=300, budget=60), [300, 1, 1, 300, 1, 7, 250]),
        (dict(n_ubatch=1), [1] * 90),
        (dict(budget_ratio=0.4, budget=200), [24] * 8),
        (dict(pin=12, evict_step=1), SIZES),
        (dict(evict_step=17, sinks=0), SIZES),
        (dict(n_ctx=512, window=30), SIZES),
    ],
    ids=str,
)
def test_settings(tiny: Tiny, name: str, settings: dict[str, Any], sizes: list[int]) -> None:
    path, config = tiny(name)
    with open_model(path) as model:
        result = compare(model, tokens_of(config, sum(sizes), seed=3), sizes, "f16", **settings)
    check(config, "f16", result)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("policy", ["streaming", "keydiff"])
def test_a_memory_with_a_slot_for_everything(tiny: Tiny, name: str, policy: str) -> None:
    """Then nothing is lost: the mean of one entry is that entry."""
    path, config = tiny(name)
    tokens = tokens_of(config, 100)
    settings = SETTINGS | dict(budget=40 + 64, memory="centroid", memory_slots=64, policy=policy)
    kind = dict(type_k=F16, type_v=F16)
    with open_model(path) as model:
        if "latent" in TABLE[name].steps:
            with pytest.raises(Refused, match="MLA"):
                Context(model, **settings | kind)
            return
        logits = []
        for wanted in (BARE | EXACT, BARE | kind, settings | kind):
            with Context(model, **wanted) as c:
                logits.append(np.concatenate([c.feed(tokens[:80], 24), c.feed(tokens[80:], 1)]))
                if "budget" in wanted:
                    assert 40 < c.stats().n_evicted <= 64
    exact, theirs, ours = logits
    assert rms(ours - exact) <= 1.5 * rms(theirs - exact)


@pytest.mark.parametrize("name", SHORT)
def test_a_full_budget_changes_nothing(tiny: Tiny, name: str) -> None:
    path, config = tiny(name)
    tokens = tokens_of(config, 60)
    with (
        open_model(path) as model,
        Context(model, **SETTINGS | dict(policy="full")) as c,
        Context(model, **BARE) as stock,
    ):
        c.decode(tokens[:40])
        before = c.save(0)
        with pytest.raises(Refused):
            c.decode(tokens[40:50])
        assert c.save(0) == before and c.stats().n_evictions == 0
        stock.decode(tokens[:40])
        expected = stock.decode(tokens[40:44])
        assert rms(c.decode(tokens[40:44]) - expected) < 1e-2 * expected.std()


@pytest.mark.parametrize("name", [name for name in SHORT if name not in DEEP])
def test_threads_do_not_change_a_bit(tiny: Tiny, name: str) -> None:
    path, config = tiny(name)
    tokens = tokens_of(config, 110)
    results = []
    with open_model(path) as model:
        for n_threads in (1, 2, 3):
            with Context(model, **SETTINGS | dict(n_threads=n_threads, policy="tova")) as c:
                results.append(
                    (c.feed(tokens, 24)[-1].tolist(), [[h.tolist() for h in heads] for heads in c.positions()])
                )
    assert results[0] == results[1] == results[2]


def test_bytes_of_all_parts(tiny: Tiny) -> None:
    """None depends on the length of the text, nor on how long it may become."""
    expected = {  # window, recurrent: for one sequence
        "gemma3": (256 * 2 * 2 * (2 * 32) * 2, 0),  # cells, layers, keys and values, heads and their sizes, halfs
        "gemma4-shared": (256 * 2 * 2 * (2 * 32) * 2, 0),  # two of three such layers
        "qwen35": (
            0,
            2 * (3 * (4 * 16 + 2 * 2 * 16) + 16 * 4 * 16) * 4,
        ),  # layers, of convolutions, of delta nets, floats
        "lfm2": (0, 2 * 3 * 128 * 4),
        "qwen3vl": (0, 0),
    }
    for name, (window, recurrent) in expected.items():
        path, config = tiny(name)
        with open_model(path) as model:
            for n_ctx, n_seq in ((128, 1), (4096, 1), (512, 3)):
                with Context(model, **SETTINGS | dict(n_ctx=n_ctx, n_seq=n_seq)) as c:
                    before = c.stats()
                    c.feed(tokens_of(config, 100), 24)
                    after = c.stats()
                    assert (after.window_bytes, after.recurrent_bytes) == (n_seq * window, n_seq * recurrent)
                    heads = [n for n in (api.n_head_kv(c.ctx, il) for il in range(config.n_layer)) if n > 0]
                    dim = 2 * config.head_dim if name.startswith("gemma4") else config.head_dim
                    assert after.kv_bytes == n_seq * after.n_slots * sum(heads) * dim * 2 * 2
                    for part in ("kv_bytes", "meta_bytes", "window_bytes", "recurrent_bytes"):
                        assert getattr(before, part) == getattr(after, part)




@pytest.mark.parametrize("name", [name for name in BOUNDED if "mrope" in TABLE[name].steps])
def test_images_are_refused_where_positions_have_dimensions(tiny: Tiny, name: str) -> None:
    path, config = tiny(name)
    tokens = tokens_of(config, 60)
    image = np.ones((5, config.n_embd), np.float32)
    with open_model(path) as model, Context(model, **SETTINGS) as c, Context(model, **SETTINGS) as twin:
        for x in (c, twin):
            x.feed(tokens[:30], 24)
        before = c.save(0)
        assert c.decode_embeddings(image, n_dims=4) < 0
        assert "holds embeddings, as of an image" in api.last_error() and "M-RoPE" in api.last_error()
        assert c.save(0) == before
        np.testing.assert_array_equal(c.feed(tokens[30:], 24), twin.feed(tokens[30:], 24))
    with open_model(path) as model, Context(model) as unbounded:
        assert unbounded.decode_embeddings(image, n_dims=4) == 0, "without a budget it can"


@pytest.mark.parametrize("name", [name for name in ("gemma3", "jamba", "nemotron_h") if name in BOUNDED])
def test_images_elsewhere_are_tokens(tiny: Tiny, name: str) -> None:
    """The embeddings of tokens are worth what the tokens are."""
    path, config = tiny(name)
    tokens = tokens_of(config, 60)
    table = config.weights["token_embd.weight"] * config.embedding_scale  # gemma scales tokens alone
    with open_model(path) as model, Context(model, **SETTINGS) as c, Context(model, **SETTINGS) as twin:
        for i in range(0, 48, 12):
            assert c.decode_embeddings(table[tokens[i : i + 12]]) == 0
            twin.decode(tokens[i : i + 12])
        ours, theirs = c.feed(tokens[48:], 12), twin.feed(tokens[48:], 12)
        assert c.stats().n_evictions == twin.stats().n_evictions > 0
    assert rms(ours - theirs) < 1e-3 * theirs.std()
