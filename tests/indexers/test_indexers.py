"""Contexts with a sidecar against the plain reference: scores, positions and logits of every kind of indexer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import gguf
import numpy as np
import pytest

from conftest import Tiny
from reference.decoder import forward
from reference.indexers import VARIANTS, Indexer, random_indexer, write_sidecar
from reference.policies import BoundedReference
from support.comparing import SIZES, follow, rms, tokens_of
from support.native_context import F16, F32, Q4_0, Q8_0, Capture, Context, open_model
from tiny.models import SUPPORTED, TinyConfig

each_variant = pytest.mark.parametrize("variant", VARIANTS)
SETTINGS: dict[str, Any] = dict(budget=40, sinks=3, window=9, policy="indexer")


def make(folder: Path, config: TinyConfig, variant: str, outtype: str = "f32", seed: int = 0) -> tuple[Path, Indexer]:
    """A random sidecar for a model, and the indexer that is in it."""
    path = folder / f"{variant}-{outtype}-{seed}.gguf"
    indexer = random_indexer(variant, config.n_layer, config.n_embd, config.n_head_kv, seed)
    return path, write_sidecar(path, indexer, outtype, architecture=config.arch)


def both(
    model: Any, config: TinyConfig, sidecar: Optional[Path], indexer: Indexer, cache: int = F16, **settings: Any
) -> tuple[Context, BoundedReference]:
    """The native context and the reference, which rounds K and V only if the cache type is the usual one."""
    native = Context(model, sidecar=sidecar, n_ubatch=24, type_k=cache, type_v=cache, **settings)
    rounded = np.float16 if cache == F16 else None
    return native, BoundedReference(config, indexer=indexer, cache_dtype=rounded, **settings)


# ---------------------------------------------------------------------------------------------- the references


@each_variant
def test_numpy_and_pytorch_agree(variant: str) -> None:
    torch = pytest.importorskip("torch")
    from reference.indexers_torch import module

    indexer = random_indexer(variant, 2, 64, 3)
    hidden = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    made, state = module(indexer, 1), indexer.state(1, hidden)
    np.testing.assert_allclose(made(torch.from_numpy(hidden)).numpy(), state, rtol=0, atol=1e-5)
    if indexer.kind == "pairwise":
        n, reduce = indexer.constants["query_count"], indexer.constants["reduce"]
        scores = made.scores(torch.from_numpy(hidden[-n:]), torch.from_numpy(hidden)).numpy()
        ranks = indexer.rank(state[:, 0], np.arange(50), 49, indexer.queries(1, hidden))
        np.testing.assert_allclose(getattr(scores, reduce)(axis=0), ranks, rtol=0, atol=1e-5)


@each_variant
@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_the_converter_reads_what_was_written(tmp_path: Path, variant: str, outtype: str) -> None:
    """Two implementations of docs/sidecar.md that share nothing."""
    reader = pytest.importorskip("indexmem_edge.convert.sidecar")
    path = tmp_path / "a.gguf"
    indexer = write_sidecar(path, random_indexer(variant, 2, 64, 3), outtype)
    read = reader.read_sidecar(path).checkpoint
    assert read.kind == indexer.kind
    for key, value in indexer.constants.items():
        assert read.constants[key] == (pytest.approx(value) if isinstance(value, float) else value)
    for ours, theirs in zip(indexer.layers, read.layers):
        assert ours.keys() == theirs.keys()
        for name, a in ours.items():
            np.testing.assert_array_equal(a, theirs[name])


# ---------------------------------------------------------------------------------------------- scores


@each_variant
@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_scores(tiny: Tiny, tmp_path: Path, variant: str, outtype: str) -> None:
    """Of hidden states as the native code has them. The reference knows that f16 and q8_0 round the matrices; ggml then
    rounds what it multiplies with them as well."""
    path, config = tiny("llama")
    sidecar, indexer = make(tmp_path, config, variant, outtype)
    capture = Capture("attn_norm-", "indexmem_state-", "indexmem_queries-")
    with open_model(path) as model, Context(model, sidecar=sidecar, n_ubatch=64, capture=capture, **SETTINGS) as c:
        c.decode(tokens_of(config, 50))
    tolerance = {"f32": 1e-5, "f16": 3e-3, "q8_0": 5e-2}[outtype]
    for il in range(config.n_layer):
        hidden = capture[f"attn_norm-{il}"]
        expected = indexer.state(il, hidden)
        error = np.abs(capture[f"indexmem_state-{il}"] - expected).max(axis=0) / expected.std(axis=0)
        assert error.max() < tolerance
        if indexer.kind == "pairwise":
            queries = indexer.queries(il, hidden)
            assert np.abs(capture[f"indexmem_queries-{il}"] - queries).max() < tolerance * queries.std()


# ---------------------------------------------------------------------------------------------- positions and logits


@pytest.mark.parametrize(
    "arch,variant",
    [
        *(("llama", variant) for variant in VARIANTS),
        *((arch, "retention-mlp") for arch in SUPPORTED if arch != "llama"),
        *(("qwen3", "fast_kvzip"), ("phi3", "kvzap-mlp"), ("gemma", "pairwise-mean"), ("granite", "retention-linear")),
    ],
)
def test_positions_and_logits_follow_the_reference(tiny: Tiny, tmp_path: Path, arch: str, variant: str) -> None:
    path, config = tiny(arch)
    tokens = tokens_of(config, sum(SIZES), seed=1)
    full = forward(config, tokens, cache_dtype=np.float16)
    with open_model(path) as model:
        with Context(model) as original:
            base = rms(original.feed(tokens, 24) - full)
        native, reference = both(model, config, *make(tmp_path, config, variant), **SETTINGS)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert reference.evictions
    assert worst < 2e-2
    assert error <= 1.5 * base
    assert error < 0.02 * spread


@pytest.mark.parametrize("arch", ["llama", "phi3", "qwen3"])
@pytest.mark.parametrize("variant", ["retention-mlp", "fast_kvzip", "pairwise-mean"])
def test_many_layers(tiny: Tiny, tmp_path: Path, arch: str, variant: str) -> None:
    """llama.cpp allocates graphs by the number of tensors of the model, which says nothing of those of an indexer."""
    path, config = tiny(arch, n_layer=40, n_head=4, head_dim=32)
    sidecar, _ = make(tmp_path, config, variant)
    with open_model(path) as model, Context(model, sidecar=sidecar, **SETTINGS) as c:
        c.feed(tokens_of(config, 70), 32)
        assert c.stats().n_kept <= 40


@pytest.mark.parametrize("variant", ["retention-mlp", "pairwise-max"])
@pytest.mark.parametrize("cache", [F32, Q8_0, Q4_0], ids=["f32", "q8_0", "q4_0"])
def test_cache_types(tiny: Tiny, tmp_path: Path, variant: str, cache: int) -> None:
    path, config = tiny("qwen3")
    tokens = tokens_of(config, sum(SIZES), seed=2)
    full = forward(config, tokens)
    with open_model(path) as model:
        with Context(model, type_k=cache, type_v=cache) as original:
            base = rms(original.feed(tokens, 24) - full)
        native, reference = both(model, config, *make(tmp_path, config, variant), cache, **SETTINGS)
        with native:
            worst, error, _ = follow(native, reference, tokens, SIZES)
    assert worst < {F32: 2e-2, Q8_0: 0.2, Q4_0: 1.0}[cache]
    assert error <= 1.5 * base


@pytest.mark.parametrize("heads", [(32, 4, 4), (32, 4, 1), (128, 8, 2)], ids=str)
@pytest.mark.parametrize("variant", ["retention-mlp", "pairwise-mean"])
def test_geometries(tiny: Tiny, tmp_path: Path, variant: str, heads: tuple[int, int, int]) -> None:
    path, config = tiny("llama", **dict(zip(("head_dim", "n_head", "n_head_kv"), heads)))
    tokens = tokens_of(config, sum(SIZES), seed=4)
    with open_model(path) as model:
        native, reference = both(model, config, *make(tmp_path, config, variant), **SETTINGS)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert worst < 2e-2 and error < 0.02 * spread


@pytest.mark.parametrize("variant", ["retention-mlp", "pairwise-mean"])
@pytest.mark.parametrize("step", [1, 5, 32])
def test_eviction_step(tiny: Tiny, tmp_path: Path, variant: str, step: int) -> None:
    """Steps below, at and above what is scored at once."""
    path, config = tiny("llama")
    tokens = tokens_of(config, 150, seed=3)
    settings = SETTINGS | dict(budget=50, window=8, evict_step=step)
    with open_model(path) as model:
        native, reference = both(model, config, *make(tmp_path, config, variant), **settings)
        with native:
            worst, _, _ = follow(native, reference, tokens, [1] * len(tokens))
            stats = native.stats()
    assert worst < 2e-2
    assert stats.n_evictions == len({e.ubatch for e in reference.evictions}) > 0


@pytest.mark.parametrize(
    "sizes",
    [[1] * 31, [1] * 32, [1] * 33, [5] * 13, [24, 8, 1, 24, 9], [24, 9, 24, 8]],
    ids=lambda sizes: f"{len(sizes)}ubatches{sum(sizes)}tokens",
)
def test_tokens_that_wait_to_be_scored(tiny: Tiny, tmp_path: Path, sizes: list[int]) -> None:
    """Before the first eviction, ubatches that just fill the waiting line, or do not."""
    path, config = tiny("llama")
    sizes = [*sizes, *[1] * (69 - sum(sizes)), 3, *[1] * 15]
    tokens = tokens_of(config, sum(sizes), seed=8)
    with open_model(path) as model:
        native, reference = both(model, config, *make(tmp_path, config, "retention-mlp"), **SETTINGS | dict(budget=70))
        with native:
            worst, _, _ = follow(native, reference, tokens, sizes)
    assert reference.evictions and worst < 2e-2


@pytest.mark.parametrize("policy", ["indexer", "knorm"])
@pytest.mark.parametrize("ratio,step", [(0.5, 0), (0.25, 1), (0.3, 40), (0.9, 3)])
def test_budget_as_a_share_of_the_text(tiny: Tiny, tmp_path: Path, policy: str, ratio: float, step: int) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, 180, seed=5)
    settings = SETTINGS | dict(budget=60, policy=policy, budget_ratio=ratio, evict_step=step)
    sidecar, indexer = make(tmp_path, config, "retention-mlp")
    with open_model(path) as model:
        native, reference = both(model, config, sidecar if policy == "indexer" else None, indexer, **settings)
        with native:
            for start, sizes in ((0, [24, 13, *[1] * 43]), (80, [24, 24, 5, *[1] * 47])):
                worst, _, _ = follow(native, reference, tokens[start:], sizes)
                stats = native.stats()
                assert worst < 2e-2
                assert stats.budget_now == reference.budget_now and stats.budget == 60
                assert stats.n_kept == len(reference.kept[0][0]) <= stats.budget_now
    assert reference.evictions


@pytest.mark.parametrize("variant", ["retention-mlp", "pairwise-mean"])
def test_several_sequences(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    """One batch of sequences that have different lengths, and different numbers of tokens that wait to be scored."""
    path, config = tiny("llama")
    sidecar, indexer = make(tmp_path, config, variant)
    lengths = [5, 22, 41, 1]
    texts = [tokens_of(config, n + 60, seed=s) for s, n in enumerate(lengths)]
    settings = SETTINGS | dict(budget=44)
    with open_model(path) as model, Context(model, sidecar=sidecar, n_seq=4, n_ubatch=48, **settings) as c:
        references = [BoundedReference(config, indexer=indexer, cache_dtype=np.float16, **settings) for _ in texts]
        for s, n in enumerate(lengths):
            c.feed(texts[s][:n], 4, seq=s)
            for i in range(0, n, 4):
                references[s].feed(texts[s][i : min(i + 4, n)])
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


def test_threads_do_not_change_the_result(tiny: Tiny, tmp_path: Path) -> None:
    path, config = tiny("llama")
    tokens = tokens_of(config, 150)
    for variant in ("retention-mlp", "pairwise-mean"):
        sidecar, _ = make(tmp_path, config, variant)
        results = []
        with open_model(path) as model:
            for n_threads in (1, 2, 3):
                with Context(model, sidecar=sidecar, n_threads=n_threads, **SETTINGS) as c:
                    c.feed(tokens[:100], 32)
                    c.feed(tokens[100:], 1)
                    results.append(c.positions())
        for other in results[1:]:
            np.testing.assert_equal(other, results[0])


def test_of_equal_scores_the_later_position_leaves(tiny: Tiny, tmp_path: Path) -> None:
    path, config = tiny("llama")
    indexer = random_indexer("kvzap-linear", config.n_layer, config.n_embd, config.n_head_kv)
    for layer in indexer.layers:
        layer["out_proj.weight"][:] = 0
    write_sidecar(tmp_path / "a.gguf", indexer)
    with open_model(path) as model, Context(model, sidecar=tmp_path / "a.gguf", **SETTINGS) as c:
        c.feed(tokens_of(config, 70), 10)
        c.feed(tokens_of(config, 10), 1)
        n = c.stats().n_kept
        for layer in c.positions():
            for positions in layer:
                assert positions.tolist() == [*range(n - 9), *range(71, 80)]


# ---------------------------------------------------------------------------------------------- with an adapter


def write_lora(path: Path, config: TinyConfig, rank: int = 4, alpha: float = 6.0) -> TinyConfig:
    """Writes a LoRA for all projections of the attention and the ffn; returns the model with it merged."""
    draw, weights = np.random.default_rng(9), dict(config.weights)
    writer = gguf.GGUFWriter(path, config.arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, w in config.weights.items():
        if name.startswith("blk.") and w.ndim == 2:
            a = (draw.standard_normal((rank, w.shape[1])) * w.shape[1] ** -0.5).astype(np.float32)
            b = (draw.standard_normal((w.shape[0], rank)) * 0.3).astype(np.float32)
            writer.add_tensor(f"{name}.lora_a", a)
            writer.add_tensor(f"{name}.lora_b", b)
            weights[name] = w + alpha / rank * b @ a
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return replace(config, weights=weights)


@pytest.mark.parametrize("variant", ["retention-mlp", "pairwise-mean"])
def test_adapter_of_the_model(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    """A LoRA changes the hidden states, which the indexer reads as they are; its own matrices have no part in it."""
    path, config = tiny("llama")
    merged = write_lora(tmp_path / "lora.gguf", config)
    tokens = tokens_of(config, sum(SIZES), seed=6)
    assert rms(forward(merged, tokens) - forward(config, tokens)) > 0.1, "too weak to test anything"
    with open_model(path) as model:
        native, reference = both(model, merged, *make(tmp_path, config, variant), **SETTINGS)
        with native:
            native.use_lora(tmp_path / "lora.gguf")
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert reference.evictions
    assert worst < 2e-2 and error < 0.02 * spread
