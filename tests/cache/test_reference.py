"""The NumPy references against llama.cpp with its own, unbounded cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import llama_cpp
from reference.decoder import Decoder, causal, forward
from reference.policies import POLICIES, BoundedReference, Full, hash_rank
from reference.rotary import ROTARY_KINDS
from tiny.models import BOS, REFUSED, SUPPORTED, TinyConfig

F32, F16 = 0, 1
SHAPES = [
    *((arch, {}) for arch in SUPPORTED),
    ("llama", {"n_head": 4, "n_head_kv": 4, "head_dim": 32, "n_layer": 4, "n_embd": 96}),
    ("qwen3", {"n_head": 5, "n_head_kv": 1, "head_dim": 128}),
    ("qwen2", {"n_head": 14, "n_head_kv": 2, "head_dim": 32}),
]
each_shape = pytest.mark.parametrize(("arch", "overrides"), SHAPES, ids=lambda x: x if isinstance(x, str) else len(x))
each_policy = pytest.mark.parametrize("policy", [p for p in POLICIES if p != "full"])


@contextmanager
def stock(path: Path, cache_type: int = F32, **kwargs: Any) -> Iterator[llama_cpp.Llama]:
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        n_gpu_layers=0, type_k=cache_type, type_v=cache_type, **kwargs,
    )  # fmt: skip
    try:
        yield model
    finally:
        model.close()


def feed(model: llama_cpp.Llama, tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of one ubatch."""
    model.eval(tokens)
    return model.scores[model.n_tokens - len(tokens) : model.n_tokens].copy()


def text(config: TinyConfig, n: int, seed: int = 0) -> list[int]:
    return [BOS, *np.random.default_rng(seed).integers(3, config.n_vocab, n - 1).tolist()]


def split(tokens: Sequence[int], *sizes: int) -> list[Sequence[int]]:
    """Pieces of the given sizes, then single tokens."""
    ends = np.cumsum(sizes).tolist()
    pieces = [tokens[end - n : end] for n, end in zip(sizes, ends)]
    return pieces + [[t] for t in tokens[ends[-1] :]]


def assert_close(ours: np.ndarray, theirs: np.ndarray, config: TinyConfig, tolerance: float = 1e-4) -> None:
    """Logits have a deviation of about 2. GELU by table flips a float16 rounding now and then."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=20 * tolerance if config.gelu else tolerance)


@each_shape
def test_prefill_and_decode(tiny: Tiny, arch: str, overrides: dict[str, Any]) -> None:
    path, config = tiny(arch, **overrides)
    pieces = split(text(config, 80), 40, 24)
    decoder = Decoder(config)
    with stock(path) as model:
        for piece in pieces:
            assert_close(decoder.append(piece), feed(model, piece), config)


@pytest.mark.parametrize("kind", ROTARY_KINDS)
def test_kinds_of_rotary_embeddings(tiny: Tiny, kind: str) -> None:
    arch, overrides = ROTARY_KINDS[kind]
    path, config = tiny(arch, **overrides)
    tokens = text(config, 120)
    with stock(path) as model:
        theirs = np.concatenate([feed(model, tokens[i : i + 60]) for i in (0, 60)])
    assert_close(forward(config, tokens, n_ctx=256), theirs, config)


@pytest.mark.parametrize("arch", SUPPORTED)
def test_removed_entries_stay_invisible(tiny: Tiny, arch: str) -> None:
    """Tokens after a removal do not see the gap; what was computed before it keeps what it saw."""
    path, config = tiny(arch)
    tokens = text(config, 64)
    visible = causal(0, len(tokens))
    visible[40:, 5:30] = False
    logits = forward(config, tokens, [[visible] * config.n_head_kv] * config.n_layer)
    assert np.abs(logits - forward(config, tokens))[40:].max() > 0.1
    with stock(path) as model:
        assert_close(logits[:40], feed(model, tokens[:40]), config)
        assert model._ctx.kv_cache_seq_rm(0, 5, 30)
        assert_close(logits[40:], feed(model, tokens[40:]), config)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_float16_cache(tiny: Tiny, arch: str) -> None:
    """Queries meet float16 keys in float16 as well, which the reference does not copy."""
    path, config = tiny(arch)
    tokens = text(config, 60)
    logits = forward(config, tokens, cache_dtype=np.float16)
    with stock(path, F16) as model:
        assert_close(logits, feed(model, tokens), config, 2e-2)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_quantised_weights(tiny: Tiny, kind: str) -> None:
    """llama.cpp rounds activations to the type of the weights."""
    path, config = tiny("llama", tensor_type=kind)
    tokens = text(config, 30)
    with stock(path) as model:
        error = forward(config, tokens) - feed(model, tokens)
    assert np.sqrt(np.mean(error**2)) < 0.1


def test_text_round_trip(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    with stock(path) as model:
        tokens = model.tokenize(b"Hello, world!\n  x = {1: 'y'}", add_bos=True)
        assert tokens[0] == BOS and len(tokens) == 1 + 28
        assert model.detokenize(tokens) == b"Hello, world!\n  x = {1: 'y'}"
        assert model.tokenize(b"<|im_end|>", add_bos=False, special=True) == [261]


@pytest.mark.parametrize("arch", REFUSED)
def test_refused_models_are_real(tiny: Tiny, arch: str) -> None:
    path, config = tiny(arch)
    with stock(path) as model:
        traits = {
            "mamba": llama_cpp.llama_model_is_recurrent(model.model),
            "t5": llama_cpp.llama_model_has_encoder(model.model),
        }
        assert traits.get(arch, True)
        if arch != "t5":  # decodes only after encoding
            assert np.isfinite(feed(model, text(config, 8))).all()


def bounded(config: TinyConfig, policy: str, **kwargs: Any) -> BoundedReference:
    return BoundedReference(config, policy=policy, **({"budget": 40, "sinks": 2, "window": 8, "seed": 7} | kwargs))


def test_streaming_is_removal(tiny: Tiny) -> None:
    """With a rule that ignores heads, a bounded cache is a cache with entries removed."""
    path, config = tiny("llama")
    ref = bounded(config, "streaming")
    with stock(path) as model:
        for piece in split(text(config, 90), 30, 25, 3):
            assert_close(ref.feed(piece), feed(model, piece), config)
            for p in {p for e in ref.evictions if e.ubatch == ref.n_ubatches - 1 for p in e.positions}:
                assert model._ctx.kv_cache_seq_rm(0, p, p + 1)
    assert ref.kept[0][0][:2] == [0, 1] and len(ref.evictions) > 20


@each_policy
def test_invariants(tiny: Tiny, policy: str) -> None:
    _, config = tiny("llama")
    ref = bounded(config, policy, pin=5)
    assert ref.step == 3
    for piece in split(text(config, 90), 30, 25):
        before = [[list(head) for head in layer] for layer in ref.kept]
        ref.feed(piece)
        for il, h in ref.heads():
            entries = before[il][h] + list(range(ref.n_seen - len(piece), ref.n_seen))
            over = len(entries) - ref.budget
            n_kept = len(entries) - max(over, ref.step) if over > 0 else len(entries)
            assert len(ref.kept[il][h]) == n_kept
            assert set(ref.kept[il][h]) <= set(entries) and ref.kept[il][h] == sorted(ref.kept[il][h])
            assert set(range(5)) | set(range(ref.n_seen - 8, ref.n_seen)) <= set(ref.kept[il][h])
    assert ref.min_gap() >= 0
    first = [e.positions for e in ref.evictions if e.ubatch == 1]
    assert len(first) == 4 and (len(set(first)) == 1) == (policy == "streaming")


@each_policy
def test_incremental_equals_masked(tiny: Tiny, policy: str) -> None:
    """Evaluated at once, with a mask that tells when each entry left, the same logits come out."""
    _, config = tiny("qwen3")
    ref, tokens = bounded(config, policy), text(config, 70)
    pieces = split(tokens, 30, 25)
    logits = np.concatenate([ref.feed(piece) for piece in pieces])
    ends = np.cumsum([len(piece) for piece in pieces])
    visible = [[causal(0, len(tokens)) for _ in layer] for layer in ref.kept]
    for e in ref.evictions:
        visible[e.layer][e.head][ends[e.ubatch] :, e.positions] = False
    np.testing.assert_allclose(forward(config, tokens, visible), logits, rtol=0, atol=1e-9)
    assert np.abs(forward(config, tokens) - logits).max() > 0.1


def test_adopted_choices_are_judged(tiny: Tiny) -> None:
    _, config = tiny("llama")
    ref = bounded(config, "knorm")
    ref.feed_all(text(config, 60), 30)
    kept = [[list(head) for head in layer] for layer in ref.kept]
    assert ref.adopt(kept) == 0
    last = next(e for e in ref.evictions if e.ubatch == 1 and (e.layer, e.head) == (1, 0))
    candidate = next(p for p in kept[1][0] if 2 <= p < 52)
    swapped = [[list(head) for head in layer] for layer in kept]
    swapped[1][0][kept[1][0].index(candidate)] = last.positions[0]
    assert last.gap <= ref.adopt(swapped) < np.inf
    assert ref.kept[1][0] == sorted(swapped[1][0])
    assert ref.adopt([[head[1:] for head in layer] for layer in kept]) == np.inf
    assert ref.adopt([[[-1, *head[1:]] for head in layer] for layer in kept]) == np.inf


def test_full_refuses(tiny: Tiny) -> None:
    _, config = tiny("llama")
    ref = bounded(config, "full")
    ref.feed(text(config, 40))
    with pytest.raises(Full):
        ref.feed([5])
    assert ref.n_seen == 40


def test_hash_is_splitmix64() -> None:
    assert hash_rank(0, 0, 0, 0) == (0xE220A8397B1DCDAF >> 40) / 2**24
    assert len({hash_rank(3, il, h, p) for il in range(4) for h in range(4) for p in range(64)}) > 1000
