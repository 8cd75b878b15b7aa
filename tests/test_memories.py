"""The latent memories: the references among themselves, the ops, then contexts with a memory against the plain reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import native_ops
import numpy as np
import pytest
from conftest import Tiny
from indexers import Indexer, random_indexer
from memories import Centroid, CentroidMemory, Memory, random_centroid, random_residual, write_memory_sidecar
from native_context import F16, F32, Q4_0, Q8_0, Context, open_model
from policies import BoundedReference
from reference import forward
from test_bounded import EVICTING, SIZES, follow, rms, tokens_of
from tiny_models import SUPPORTED, TinyConfig

KINDS = ["centroid", "residual"]
each_kind = pytest.mark.parametrize("kind", KINDS)
SLOTS = 8
SETTINGS: dict[str, Any] = dict(budget=40, sinks=3, window=9, policy="knorm")
LONG = [80, 70, 1, 1, 90, 3]  # ubatches whose attention is not ours


def random_memory(kind: str, config: TinyConfig, n_slots: int = SLOTS, seed: int = 0) -> Memory:
    if kind == "centroid":
        return random_centroid(config.n_layer, n_slots, seed)
    return random_residual(config.n_layer, config.head_dim, seed=seed)


def with_memory(folder: Path, model: Any, config: TinyConfig, memory: Memory, indexer: Optional[Indexer] = None,
                **options: Any) -> Context:  # fmt: skip
    """A native context with a sidecar that holds the memory and the indexer."""
    path = folder / "memory.gguf"
    write_memory_sidecar(path, memory, indexer, n_embd=config.n_embd, n_head_kv=config.n_head_kv)
    return Context(model, **dict(sidecar=path, n_ubatch=24) | options)


def both(folder: Path, model: Any, config: TinyConfig, memory: Memory, indexer: Optional[Indexer] = None,
         cache: int = F16, n_ubatch: int = 24, **settings: Any) -> tuple[Context, BoundedReference]:  # fmt: skip
    """And the reference, which rounds K and V only if the cache type is the usual one."""
    options = dict(type_k=cache, type_v=cache, n_ubatch=n_ubatch)
    native = with_memory(folder, model, config, memory, indexer, **options, **settings)
    rounded = np.float16 if cache == F16 else None
    return native, BoundedReference(config, memory=memory, indexer=indexer, cache_dtype=rounded, **settings)


# ---------------------------------------------------------------------------------------------- the references


@pytest.mark.parametrize("n_slots", [1, 3, 16, 64])
def test_one_entry_at_a_time_the_rules_of_writing_are_one(n_slots: int) -> None:
    keys, values = np.random.default_rng(n_slots).standard_normal((2, 50, 12))
    ours, method = (CentroidMemory(n_slots, 12, 12) for _ in range(2))
    for k, v in zip(keys, values):
        ours.write(k[None], v[None])
    method.write_one_by_one(keys, values)
    np.testing.assert_array_equal(ours.counts, method.counts)
    np.testing.assert_allclose(ours.keys, method.keys, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.values, method.values, rtol=0, atol=1e-12)


def test_entries_that_leave_together_do_not_see_each_other() -> None:
    """Three keys of a line: the second would pull the slot of the first past the third, were they written in turn."""
    keys = np.array([[0.0], [10.0], [4.0], [5.2]])
    ours, method = (CentroidMemory(2, 1, 1) for _ in range(2))
    ours.write(keys, keys)
    method.write_one_by_one(keys, keys)
    np.testing.assert_allclose(ours.keys[:, 0], [2.0, 7.6])
    np.testing.assert_allclose(method.keys[:, 0], [(0 + 4 + 5.2) / 3, 10])


@pytest.mark.parametrize("group,n_feature,head_dim", [(1, 8, 16), (3, 24, 64), (4, 5, 33)])
def test_residual_memory_in_numpy_pytorch_and_native(group: int, n_feature: int, head_dim: int) -> None:
    torch = pytest.importorskip("torch")
    from memories_torch import ResidualMemory

    n_head, draw = 2, np.random.default_rng(3)
    memory = random_residual(2, head_dim, n_feature, seed=5)
    ours, theirs = [memory.head(1, head_dim) for _ in range(n_head)], ResidualMemory(memory, 1)
    state = theirs.start(n_head, head_dim)
    native = np.zeros((1, n_head, head_dim + 1, n_feature), np.float32)
    q = draw.standard_normal((n_head * group, 7, head_dim)).astype(np.float32)
    kept = draw.standard_normal(q.shape).astype(np.float32)
    np.testing.assert_array_equal(theirs(state, torch.from_numpy(q), torch.from_numpy(kept)), kept, "nothing was written")
    for n in (1, 40, 3):
        k, v = draw.standard_normal((2, n_head, n, head_dim)).astype(np.float32)
        state = theirs.write(state, torch.from_numpy(k), torch.from_numpy(v))
        plan, ctl = native_ops.plan_of(np.tile(np.arange(n), (1, n_head, 1))), native_ops.ctl(1, n_evict=n)
        arguments = (native, memory.phi[1], k[None], v[None], plan, ctl)
        native = native_ops.residual(*arguments, rate=ours[0].eta, decay=ours[0].decay)
        for h in range(n_head):
            ours[h].write(k[h].astype(np.float64), v[h].astype(np.float64))
            np.testing.assert_allclose(state[0][h], ours[h].matrix, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(state[1][h], ours[h].normaliser, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(native[0, h, :-1].T, ours[h].matrix, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(native[0, h, -1], ours[h].normaliser, rtol=1e-4, atol=1e-4)
    out = theirs(state, torch.from_numpy(q), torch.from_numpy(kept)).numpy()
    for head in range(n_head * group):
        read = ours[head // group].gate * ours[head // group].read(q[head].astype(np.float64))
        np.testing.assert_allclose(out[head], kept[head] + read, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_slots", [1, 5, 64])
@pytest.mark.parametrize("groups", [[1] * 9, [4, 30, 1], [40, 40], [70]], ids=str)
def test_native_centroid_op(n_slots: int, groups: list[int]) -> None:
    """Two sequences of three heads, an f16 cache of 90 slots, some of which leave."""
    shape, draw = (2, 3), np.random.default_rng(4)
    rows = [CentroidMemory(n_slots, 16, 8) for _ in np.ndindex(shape)]
    means, count = np.full((*shape, n_slots, 24), np.nan, np.float32), np.zeros((*shape, n_slots), np.float32)
    for n in groups:
        k, v = (draw.standard_normal((*shape, 90, d)).astype(np.float16) for d in (16, 8))
        gone = np.stack([np.sort(draw.permutation(90)[:n]) for _ in rows]).reshape(*shape, n)
        means, count = native_ops.centroid(means, count, k, v, native_ops.plan_of(gone), native_ops.ctl(2, n_evict=n))
        for row, (s, h) in zip(rows, np.ndindex(shape)):
            row.write(k[s, h, gone[s, h]].astype(np.float64), v[s, h, gone[s, h]].astype(np.float64))
            np.testing.assert_array_equal(count[s, h], row.counts)
            held = row.counts > 0
            expected = np.concatenate((row.keys, row.values), axis=-1)
            np.testing.assert_allclose(means[s, h][held], expected[held], rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_native_attention_with_slots(softcap: float) -> None:
    """Biases given as counts and as a mask; the soft cap is of the product alone."""
    draw, (n_seq, n_head, n_slots, n_kv) = np.random.default_rng(6), (2, 2, 5, 150)
    q = draw.standard_normal((n_seq * n_head, 3, 4, 16)).astype(np.float32) * 2
    k, v = draw.standard_normal((2, n_seq * n_head, n_kv, 16)).astype(np.float32)
    count = draw.integers(0, 30, (n_seq, n_head, n_slots)).astype(np.float32)
    mask = np.where(draw.random((n_seq, 4, n_kv)) < 0.7, 0, -np.inf)
    mask[..., :n_slots] = 0
    logits = 0.5 * np.einsum("sgtd,snd->sgtn", q.astype(np.float64), k)
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    logits += np.repeat(mask, n_head, axis=0)[:, None]
    with np.errstate(divide="ignore"):
        logits[..., :n_slots] += np.log(count.reshape(-1, 1, 1, n_slots))
    weights = np.exp(logits - np.logaddexp.reduce(logits, axis=-1)[..., None])
    expected = np.einsum("sgtn,snd->stgd", weights, v)
    per_head = np.repeat(mask, n_head, axis=0)
    counted = native_ops.attend(q, k, v, per_head, count.reshape(-1, n_slots), 0.5, softcap)
    np.testing.assert_allclose(counted, expected, rtol=0, atol=1e-5)
    biased = native_ops.bias(mask, count)
    np.testing.assert_allclose(native_ops.attend(q, k, v, biased, None, 0.5, softcap), expected, rtol=0, atol=5e-3)


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
    assert worst < 2e-2
    assert error <= 1.5 * base
    assert error < 0.02 * spread


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
    assert worst < 2e-2 and error < 0.02 * spread


@each_kind
@pytest.mark.parametrize("arch,variant", [("llama", "retention-mlp"), ("qwen3", "pairwise-mean"), ("phi3", "fast_kvzip")])
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
    assert worst < 2e-2 and error < 0.02 * spread


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
    assert worst < 2e-2 and error < 0.02 * spread


@each_kind
@pytest.mark.parametrize("cache", [F32, Q8_0, Q4_0], ids=["f32", "q8_0", "q4_0"])
def test_cache_types(tiny: Tiny, tmp_path: Path, kind: str, cache: int) -> None:
    """Quantised caches are rotated, and so is what a memory holds of them."""
    path, config = tiny("qwen3")
    tokens = tokens_of(config, sum(SIZES), seed=2)
    full = forward(config, tokens)
    with open_model(path) as model:
        with Context(model, type_k=cache, type_v=cache) as original:
            base = rms(original.feed(tokens, 24) - full)
        native, reference = both(tmp_path, model, config, random_memory(kind, config), cache=cache, **SETTINGS)
        with native:
            worst, error, _ = follow(native, reference, tokens, SIZES)
    assert worst < {F32: 2e-2, Q8_0: 0.1, Q4_0: 0.5}[cache]
    assert error <= 1.5 * base


@each_kind
@pytest.mark.parametrize("heads", [(32, 4, 4), (32, 4, 1), (128, 8, 2)], ids=str)
def test_geometries(tiny: Tiny, tmp_path: Path, kind: str, heads: tuple[int, int, int]) -> None:
    path, config = tiny("llama", **dict(zip(("head_dim", "n_head", "n_head_kv"), heads)))
    tokens = tokens_of(config, sum(SIZES), seed=4)
    with open_model(path) as model:
        native, reference = both(tmp_path, model, config, random_memory(kind, config), **SETTINGS)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert worst < 2e-2 and error < 0.02 * spread


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
    assert worst < 2e-2 and error < 0.02 * spread
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
    assert worst < 2e-2 and error < 0.02 * spread


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
    assert worst < 2e-2 and error < 0.02 * spread


@pytest.mark.parametrize("n_slots", [1, 2, 27])
@pytest.mark.parametrize("sizes", [SIZES, [1] * 100, [24] * 5], ids=["mixed", "single", "long"])
def test_number_of_slots(tiny: Tiny, n_slots: int, sizes: list[int]) -> None:
    """Asked for without a sidecar: every layer has them, at a gate of 1. 27 leave room for one entry beside the protected."""
    path, config = tiny("llama")
    tokens = tokens_of(config, sum(sizes), seed=7)
    memory = Centroid(n_slots, [True] * config.n_layer, [1.0] * config.n_layer)
    with open_model(path) as model:
        asked = dict(memory="centroid", memory_slots=n_slots)
        with Context(model, n_ubatch=24, **asked, **SETTINGS) as native:
            reference = BoundedReference(config, memory=memory, cache_dtype=np.float16, **SETTINGS)
            worst, error, spread = follow(native, reference, tokens, sizes)
    assert worst < 2e-2 and error < 0.02 * spread


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
        c, off = (with_memory(tmp_path, model, config, random_memory(kind, config), memory=m, **native) for m in (None, "off"))
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
                    assert references[s].adopt(c.positions(s)) < 2e-2
                i += n
    assert all(r.evictions for r in references)
    assert rms(np.concatenate(errors)) < 0.02 * np.concatenate(spread).std()


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
