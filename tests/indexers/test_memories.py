"""Contexts with a latent memory against the plain reference: positions and logits, settings, sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

from conftest import Tiny
from reference.decoder import forward
from reference.indexers import Indexer, random_indexer
from reference.memories import Centroid, Memory, write_memory_sidecar
from reference.policies import BoundedReference
from support.comparing import EVICTING, SIZES, follow, rms, tokens_of
from support.memories import SLOTS, each_kind, random_memory
from support.native_context import F16, F32, Q4_0, Q8_0, Context, open_model
from tiny.models import SUPPORTED, TinyConfig

SETTINGS: dict[str, Any] = dict(budget=40, sinks=3, window=9, policy="knorm")
LONG = [80, 70, 1, 1, 90, 3]  # ubatches whose attention is not ours
NEAR = 2e-3  # what rounding may do to ranks, and in units of their deviation to logits: a memory does 0.08 and more




def with_memory(folder: Path, model: Any, config: TinyConfig, trained: Memory, indexer: Optional[Indexer] = None,
                keys: Optional[dict[str, Any]] = None, **options: Any) -> Context:  # fmt: skip
    """A native context with a sidecar that holds the memory and the indexer, and further keys."""
    path = folder / "memory.gguf"
    write_memory_sidecar(path, trained, indexer, n_embd=config.n_embd, n_head_kv=config.n_head_kv, **(keys or {}))
    return Context(model, **dict(sidecar=path, n_ubatch=24) | options)


def both(folder: Path, model: Any, config: TinyConfig, memory: Memory, indexer: Optional[Indexer] = None,
         cache: int = F16, n_ubatch: int = 24, **settings: Any) -> tuple[Context, BoundedReference]:  # fmt: skip
    """And the reference, which rounds K and V only if the cache type is the usual one."""
    options = dict(type_k=cache, type_v=cache, n_ubatch=n_ubatch)
    native = with_memory(folder, model, config, memory, indexer, **options, **settings)
    rounded = np.float16 if cache == F16 else None
    return native, BoundedReference(config, memory=memory, indexer=indexer, cache_dtype=rounded, **settings)


@each_kind
def test_the_reference_feels_its_memory(tiny: Tiny, kind: str) -> None:
    """Nothing else in this file would say anything if the memory made no difference."""
    _, config = tiny("llama")
    tokens = tokens_of(config, 120)
    memory = random_memory(kind, config)
    settings = dict(sinks=3, window=9, policy="streaming")
    with_memory = BoundedReference(config, budget=40 + memory.n_slots, memory=memory, **settings).feed_all(tokens, 24)
    without = BoundedReference(config, budget=40, **settings).feed_all(tokens, 24)
    np.testing.assert_array_equal(with_memory[:48], without[:48])
    assert rms(with_memory[48:] - without[48:]) > 0.08 * without.std()


# ---------------------------------------------------------------------------------------------- positions and logits


@each_kind
@pytest.mark.parametrize("arch", SUPPORTED)
def test_logits_follow_the_reference(tiny: Tiny, tmp_path: Path, arch: str, kind: str) -> None:
    path, config = tiny(arch)
    tokens = tokens_of(config, sum(SIZES), seed=1)
    full = forward(config, tokens, cache_dtype=np.float16)
    with open_model(path) as model:
        with Context(model) as original:
            base = rms(original.feed(tokens, 24) - full)
        native, reference = both(tmp_path, model, config, random_memory(kind, config), **SETTINGS)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert reference.evictions
    assert worst < NEAR
    assert error <= 1.5 * base
    assert error < NEAR * spread


@each_kind
@pytest.mark.parametrize("policy", EVICTING)
def test_policies(tiny: Tiny, tmp_path: Path, kind: str, policy: str) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, sum(SIZES), seed=1)
    with open_model(path) as model:
        settings = SETTINGS | dict(policy=policy, seed=7)
        native, reference = both(tmp_path, model, config, random_memory(kind, config), **settings)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert worst < NEAR and error < NEAR * spread


@each_kind
@pytest.mark.parametrize(
    "arch,variant", [("llama", "retention-mlp"), ("qwen3", "pairwise-mean"), ("phi3", "fast_kvzip")]
)
def test_indexers(tiny: Tiny, tmp_path: Path, kind: str, arch: str, variant: str) -> None:
    """Both in one sidecar."""
    path, config = tiny(arch)
    indexer = random_indexer(variant, config.n_layer, config.n_embd, config.n_head_kv)
    tokens = tokens_of(config, sum(SIZES), seed=1)
    with open_model(path) as model:
        settings = SETTINGS | dict(policy="indexer")
        native, reference = both(tmp_path, model, config, random_memory(kind, config), indexer, **settings)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert worst < NEAR and error < NEAR * spread


@each_kind
@pytest.mark.parametrize("policy", ["knorm", "snapkv"])
@pytest.mark.parametrize("heads", [(64, 6, 2), (32, 4, 4), (128, 8, 2)], ids=str)
def test_long_ubatches(tiny: Tiny, tmp_path: Path, kind: str, policy: str, heads: tuple[int, int, int]) -> None:
    """Most of a ubatch leaves at once, and many queries read the memory together."""
    path, config = tiny("llama", **dict(zip(("head_dim", "n_head", "n_head_kv"), heads)))
    tokens = tokens_of(config, sum(LONG), seed=2)
    with open_model(path) as model:
        settings = SETTINGS | dict(policy=policy)
        native, reference = both(tmp_path, model, config, random_memory(kind, config), n_ubatch=96, **settings)
        with native:
            worst, error, spread = follow(native, reference, tokens, LONG)
    assert worst < NEAR and error < NEAR * spread


@each_kind
@pytest.mark.parametrize("cache", [F32, Q8_0, Q4_0], ids=["f32", "q8_0", "q4_0"])
def test_cache_types(tiny: Tiny, tmp_path: Path, kind: str, cache: int) -> None:
    """Quantised caches are rotated, and so is what a memory holds of them. With these tokens no entry has two slots
    that are nearly as near: rounding would send it to the other one, and all that follows would differ."""
    path, config = tiny("qwen3")
    tokens = tokens_of(config, sum(SIZES), seed=3)
    full = forward(config, tokens)
    with open_model(path) as model:
        with Context(model, type_k=cache, type_v=cache) as original:
            base = rms(original.feed(tokens, 24) - full)
        native, reference = both(tmp_path, model, config, random_memory(kind, config), cache=cache, **SETTINGS)
        with native:
            worst, error, _ = follow(native, reference, tokens, SIZES)
    assert worst < {F32: NEAR, Q8_0: 0.1, Q4_0: 0.5}[cache]
    assert error <= 1.5 * base


@each_kind
@pytest.mark.parametrize("cache", [F16, Q8_0, Q4_0], ids=["f16", "q8_0", "q4_0"])
def test_layers_kept_in_slices(tiny: Tiny, tmp_path: Path, kind: str, cache: int) -> None:
    """Slices share the weights of their layer. Heads that need no more than all have cut it, and nothing else is different."""
    path, config = tiny("qwen3")
    indexer = random_indexer("retention-mlp", config.n_layer, config.n_embd, config.n_head_kv)
    tokens, logits = tokens_of(config, sum(SIZES), seed=3), []
    need = {"indexmem.budget_least": [20 * (i % 2) for i in range(config.n_layer * config.n_head_kv)]}
    asked: dict[str, Any] = SETTINGS | dict(policy="indexer", type_k=cache, type_v=cache, n_threads=1)
    with open_model(path) as model:
        for budgets in ("equal", "sidecar"):
            native = with_memory(tmp_path, model, config, random_memory(kind, config), indexer, layer_budgets=budgets, keys=need, **asked)
            with native:
                assert native.stats().n_classes == 1
                logits.append(np.concatenate([native.feed(tokens[i : i + n], n) for i, n in zip(np.cumsum([0, *SIZES]), SIZES)]))
                assert native.stats().n_evictions > 3
    assert rms(logits[1] - logits[0]) < 1e-3 * logits[0].std()


@each_kind
@pytest.mark.parametrize("heads", [(32, 4, 4), (32, 4, 1), (128, 8, 2)], ids=str)
def test_geometries(tiny: Tiny, tmp_path: Path, kind: str, heads: tuple[int, int, int]) -> None:
    path, config = tiny("llama", **dict(zip(("head_dim", "n_head", "n_head_kv"), heads)))
    tokens = tokens_of(config, sum(SIZES), seed=4)
    with open_model(path) as model:
        native, reference = both(tmp_path, model, config, random_memory(kind, config), **SETTINGS)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert worst < NEAR and error < NEAR * spread


@each_kind
def test_many_layers(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """llama.cpp allocates graphs by the number of tensors of the model, which says nothing of those of a memory."""
    path, config = tiny("llama", n_layer=40, n_head=4, head_dim=32)
    indexer = random_indexer("pairwise-mean", config.n_layer, config.n_embd, config.n_head_kv)
    settings = SETTINGS | dict(policy="indexer")
    with open_model(path) as model:
        with with_memory(tmp_path, model, config, random_memory(kind, config), indexer, **settings) as c:
            c.feed(tokens_of(config, 60), 24)
            c.feed(tokens_of(config, 12), 1)
            assert c.stats().n_evictions > 2


@each_kind
@pytest.mark.parametrize("step", [1, 5, 15])
def test_eviction_step(tiny: Tiny, tmp_path: Path, kind: str, step: int) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, 100, seed=3)
    settings = SETTINGS | dict(evict_step=step)
    with open_model(path) as model:
        native, reference = both(tmp_path, model, config, random_memory(kind, config), **settings)
        with native:
            worst, error, spread = follow(native, reference, tokens, [1] * len(tokens))
            stats = native.stats()
    assert worst < NEAR and error < NEAR * spread
    assert stats.n_evictions == len({e.ubatch for e in reference.evictions}) > 1


@each_kind
def test_budget_as_a_share_of_the_text(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """The slots of a memory are part of the share, and of what it never falls below."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 180, seed=5)
    settings = SETTINGS | dict(budget=60, budget_ratio=0.3, evict_step=3)
    with open_model(path) as model:
        native, reference = both(tmp_path, model, config, random_memory(kind, config), **settings)
        with native:
            worst, error, spread = follow(native, reference, tokens, [24, 13, *[1] * 100, 24, 19])
            assert native.stats().budget_now == reference.budget_now == 54
    assert worst < NEAR and error < NEAR * spread


# ---------------------------------------------------------------------------------------------- settings of the memory


@each_kind
@pytest.mark.parametrize("enabled", [[False, True, True, False], [False] * 4], ids=["some", "none"])
def test_layers_without_memory(tiny: Tiny, tmp_path: Path, kind: str, enabled: list[bool]) -> None:
    path, config = tiny("smollm3")
    tokens = tokens_of(config, sum(SIZES), seed=6)
    memory = replace(random_memory(kind, config), enabled=enabled)
    with open_model(path) as model:
        native, reference = both(tmp_path, model, config, memory, **SETTINGS)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert worst < NEAR and error < NEAR * spread


@pytest.mark.parametrize("n_slots", [1, 2, 27])
@pytest.mark.parametrize("sizes", [SIZES, [1] * 100, [24] * 5], ids=["mixed", "single", "long"])
def test_number_of_slots(tiny: Tiny, n_slots: int, sizes: list[int]) -> None:
    """Asked for without a sidecar: every layer has them, at a gate of 1. 27 leave room for one entry beside the
    protected."""
    path, config = tiny("llama")
    tokens = tokens_of(config, sum(sizes), seed=7)
    memory = Centroid(n_slots, [True] * config.n_layer, [1.0] * config.n_layer)
    with open_model(path) as model:
        asked = dict(memory="centroid", memory_slots=n_slots)
        with Context(model, n_ubatch=24, **asked, **SETTINGS) as native:
            reference = BoundedReference(config, memory=memory, cache_dtype=np.float16, **SETTINGS)
            worst, error, spread = follow(native, reference, tokens, sizes)
    assert worst < NEAR and error < NEAR * spread


def test_slots_for_all_that_leaves_are_a_cache_of_everything(tiny: Tiny) -> None:
    """Each holds one entry as it was: the logits are those of a model that forgets nothing."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 100, seed=8)
    full = forward(config, tokens, cache_dtype=np.float16)
    with open_model(path) as model, Context(model) as original:
        base = rms(original.feed(tokens, 24) - full)
        with Context(model, memory="centroid", memory_slots=80, **SETTINGS | dict(budget=110)) as c:
            logits = np.concatenate([c.feed(tokens[:60], 24), c.feed(tokens[60:], 1)])
            assert c.stats().n_evicted >= 70
    assert rms(logits - full) <= 1.5 * base
    reference = BoundedReference(
        config, memory=Centroid(80, [True] * 2, [1.0] * 2), cache_dtype=np.float16, **SETTINGS | dict(budget=110)
    )  # fmt: skip
    np.testing.assert_allclose(reference.feed_all(tokens, 24), full, rtol=0, atol=1e-9)


@each_kind
def test_nothing_changes_before_the_first_eviction(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Bit for bit, whatever the lengths of ubatches."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 200)
    native = SETTINGS | dict(budget=200 + SLOTS, n_ubatch=96)
    with open_model(path) as model:
        trained = random_memory(kind, config)
        c, off = (with_memory(tmp_path, model, config, trained, memory=asked, **native) for asked in (None, "off"))
        with c, off:
            for first, last in ((0, 90), (90, 130), *((i, i + 1) for i in range(130, 200))):
                np.testing.assert_array_equal(c.decode(tokens[first:last]), off.decode(tokens[first:last]))
            assert c.stats().n_evictions == 0
            rest = tokens_of(config, 90, seed=1)
            c.decode(rest), off.decode(rest)
            assert rms(c.decode([5]) - off.decode([5])) > 1e-2, "the memory is not read"


@each_kind
def test_a_memory_that_is_turned_off(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Whoever turns it off has all of the budget for entries."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 120)
    with open_model(path) as model:
        c = with_memory(tmp_path, model, config, random_memory(kind, config), memory="off", **SETTINGS)
        with c, Context(model, n_ubatch=24, **SETTINGS) as plain:
            np.testing.assert_array_equal(c.feed(tokens, 24), plain.feed(tokens, 24))
            np.testing.assert_equal(c.positions(), plain.positions())


@each_kind
def test_what_a_memory_takes(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Bytes in fp32, the same for any text; slots that are part of the budget."""
    path, config = tiny("smollm3")
    trained = replace(random_memory(kind, config), enabled=[True, False, True, True])
    with open_model(path) as model, with_memory(tmp_path, model, config, trained, **SETTINGS) as c:
        before = c.stats()
        c.feed(tokens_of(config, 100), 24)
        after = c.stats()
    assert (before.memory_bytes, before.kv_bytes) == (after.memory_bytes, after.kv_bytes)
    assert (after.memory.decode(), after.memory_layers, after.memory_slots) == (kind, 3, trained.n_slots)
    per_head = SLOTS * (2 * config.head_dim + 1) if kind == "centroid" else 3 * (config.head_dim + 1)
    assert after.memory_bytes >= 3 * config.n_head_kv * per_head * 4
    assert after.n_kept <= after.budget - trained.n_slots


@each_kind
def test_several_sequences(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """One batch of sequences of different lengths, some of which evict."""
    path, config = tiny("llama")
    lengths, memory = [5, 22, 41, 1], random_memory(kind, config)
    texts = [tokens_of(config, n + 60, seed=s) for s, n in enumerate(lengths)]
    with open_model(path) as model:
        c = with_memory(tmp_path, model, config, memory, n_seq=4, n_ubatch=48, **SETTINGS)
        references = [BoundedReference(config, memory=memory, cache_dtype=np.float16, **SETTINGS) for _ in texts]
        with c:
            for s, n in enumerate(lengths):
                c.feed(texts[s][:n], 4, seq=s)
                references[s].feed_all(texts[s][:n], 4)
            errors, spread, i = [], [], 0
            for n in [1, 1, 3, 12, 5, *[1] * 38]:
                ours = c.decode_many({s: text[lengths[s] + i : lengths[s] + i + n] for s, text in enumerate(texts)})
                for s, text in enumerate(texts):
                    exact = references[s].feed(text[lengths[s] + i : lengths[s] + i + n])
                    errors.append(ours[s] - exact)
                    spread.append(exact)
                    assert references[s].adopt(c.positions(s)) < NEAR
                i += n
    assert all(r.evictions for r in references)
    assert rms(np.concatenate(errors)) < NEAR * np.concatenate(spread).std()


@each_kind
def test_threads_do_not_change_the_result(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, 150)
    results = []
    with open_model(path) as model:
        for n_threads in (1, 2, 3):
            options = SETTINGS | dict(n_threads=n_threads)
            with with_memory(tmp_path, model, config, random_memory(kind, config), **options) as c:
                c.feed(tokens[:100], 20)
                c.feed(tokens[100:], 1)
                results.append(c.save(0))
    assert results[0] == results[1] == results[2]
