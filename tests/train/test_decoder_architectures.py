"""What sets architectures apart, against the library: windows, two rotations, experts, fused matrices, scales and caps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from support.decoders import LINEAR, YARN, library_logits, our_logits, slope, text
from support.native_context import F32, Context, open_model
from tiny.gguf_copy import Stored, copy_model

torch = pytest.importorskip("torch")

from indexmem_edge.train.model import feedforward
from indexmem_edge.train.model.attention import BLOCK, Heads, attention, causal
from indexmem_edge.train.model.decoder import Decoder
from indexmem_edge.train.model.gguf_weights import load_gguf

NEW = ("gemma", "gemma3", "granite", "phi3", "qwen2vl", "qwen3moe", "qwen3vl", "qwen3vlmoe", "smollm3")
SECTIONS = "rope.dimension_sections"
PATTERN = "attention.sliding_window_pattern"
LONGROPE = ("rope.scaling.type", "longrope")
LONG = {"long_factors": True, "rope_magnitude": 1.2}
FEATURES: list[tuple[str, dict[str, Any]]] = [
    *((arch, {}) for arch in NEW),
    ("gemma3", {"metadata": ((PATTERN, 2),)}),
    ("gemma3", {"metadata": ((PATTERN, 0),)}),  # windows in all layers
    ("gemma3", {"n_layer": 6, "full_layers": (1, 2, 5)}),
    ("gemma3", {"sliding_window": 0}),
    ("gemma3", {"metadata": LINEAR}),  # of the layers with full attention alone
    ("gemma3", {"metadata": YARN}),
    ("gemma3", {"metadata": (("rope.freq_base_swa", 500.0),)}),
    ("gemma3", {"metadata": (("final_logit_softcapping", 2.0),)}),
    ("gemma3", {"n_head_kv": 1, "rope_dim": 16, "tied": False}),
    ("gemma3", {"n_layer": 62, "full_layers": (5, 61), "n_head": 2, "n_embd": 48, "n_ff": 32, "n_head_kv": 1, "sharpness": 0.7}),
    ("granite", {"rope_factors": True, "other_bias": True}),
    ("granite", {"metadata": (("residual_scale", 0.0), ("embedding_scale", 0.0))}),  # which stand for none
    ("granite", {"metadata": (("attention.scale", 0.0),)}),
    ("granite", {"metadata": (("rope.scaling.finetuned", False),)}),
    ("granite", {"long_factors": True, "n_ctx_orig": 64, "metadata": (LONGROPE,)}),
    ("llama", {"long_factors": True, "metadata": (LONGROPE, ("rope.scaling.factor", 2.0))}),
    ("phi3", {"qkv_bias": True}),
    ("phi3", {"sliding_window": 16}),  # which llama.cpp does not use
    ("phi3", {"rope_dim": 48, **LONG}),
    ("phi3", {"n_ctx_orig": 64, **LONG}),
    ("qwen3moe", {"tied": True, "qkv_bias": True}),
    *((arch, {"metadata": ((SECTIONS, [5, 4, 5, 2]),)}) for arch in ("qwen2vl", "qwen3vl")),  # not all pairs turn
    ("qwen3vl", {"metadata": ((SECTIONS, [6, 2, 4, 1]),)}),
    ("qwen2vl", {"metadata": ((SECTIONS, [4, 2, 2, 1]), *YARN)}),
    ("smollm3", {"n_layer": 9, "tied": True}),
]  # fmt: skip
NAMES = [f"{arch}-{'-'.join(overrides) or 'plain'}-{i}" for i, (arch, overrides) in enumerate(FEATURES)]


def hashable(overrides: dict[str, Any]) -> dict[str, Any]:
    """As keys of the cache of models, in which metadata are lists at times."""
    return {key: _Items(value) if isinstance(value, tuple) else value for key, value in overrides.items()}


class _Items(tuple):  # type: ignore[type-arg]
    def __hash__(self) -> int:
        return hash(repr(tuple(self)))


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU as the CPU of the library has it: a table over float16 between -10 and 10."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(x.half().to(x.dtype), approximate="tanh").half().to(x.dtype)
        return torch.where(x <= -10, 0, torch.where(x >= 10, x, y))

    monkeypatch.setattr(feedforward, "gelu", rounded)


def assert_close(ours: np.ndarray, theirs: np.ndarray, arch: str) -> None:
    """Sums in another order; where that moves the argument of a table to its neighbour, by what lies between the two."""
    most, mean = (5e-3, 5e-4) if arch.startswith("gemma") else (1e-3, 1e-4)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=most)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < mean


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("arch", "overrides"), FEATURES, ids=NAMES)
def test_logits_are_those_of_the_library(tiny: Tiny, arch: str, overrides: dict[str, Any]) -> None:
    path, config = tiny(arch, **hashable(overrides))
    tokens = text(300, config.n_vocab)
    assert_close(our_logits(load_gguf(path, torch.float32), tokens), library_logits(path, tokens), arch)


@pytest.mark.parametrize("arch", ["gemma", "gemma3"])
def test_exact_gelu_differs_by_the_rounding_of_the_table(tiny: Tiny, arch: str) -> None:
    path, config = tiny(arch)
    tokens = text(300, config.n_vocab)
    theirs = library_logits(path, tokens)
    np.testing.assert_allclose(our_logits(load_gguf(path, torch.float32), tokens), theirs, rtol=0, atol=0.01)


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("gemma3", {"sliding_window": 0}),
    ("gemma3", {"sliding_window": 15}),
    ("gemma3", {"metadata": ((PATTERN, 4),)}),
    ("gemma3", {"metadata": LINEAR}),
    ("gemma3", {"metadata": (("rope.freq_base_swa", 500.0),)}),
    ("gemma3", {"metadata": (("final_logit_softcapping", 2.0),)}),
    ("granite", {"metadata": (("rope.scaling.finetuned", False),)}),
    ("granite", {"metadata": (("attention.scale", 0.0),)}),
    ("granite", {"metadata": (("residual_scale", 1.0),)}),
    ("granite", {"metadata": (("embedding_scale", 1.0),)}),
    ("granite", {"metadata": (("logit_scale", 1.0),)}),
    ("qwen3moe", {"metadata": (("expert_used_count", 3),)}),
    ("qwen2vl", {"metadata": ((SECTIONS, [4, 2, 2, 1]),)}),
    ("qwen3vl", {"metadata": ((SECTIONS, [6, 2, 4, 1]),)}),
]


@pytest.mark.parametrize(("arch", "overrides"), CHANGES, ids=[f"{arch}-{i}" for i, (arch, _) in enumerate(CHANGES)])
def test_what_was_compared_matters(tiny: Tiny, arch: str, overrides: dict[str, Any]) -> None:
    """The bound above would notice if a feature was left out."""
    tokens = text(300, 272)
    plain, other = (our_logits(load_gguf(tiny(arch, **hashable(o))[0], torch.float32), tokens) for o in ({}, overrides))
    assert np.abs(plain - other).max() > 0.05


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("arch", NEW)
def test_chunks_of_the_library_and_ours(tiny: Tiny, arch: str) -> None:
    """The library reads ubatches of 40 into a cache, windows keep what they need; ours continues on keys and values."""
    path, config = tiny(arch)
    tokens = text(300, config.n_vocab)
    exact: dict[str, Any] = {"type_k": F32, "type_v": F32, "flash_attn": False}
    with open_model(path) as model, Context(model, n_threads=1, n_ubatch=40, **exact) as context:
        theirs = context.decode(tokens)
    decoder = load_gguf(path, torch.float32)
    assert_close(in_chunks(decoder, tokens, 77), theirs, arch)


def in_chunks(decoder: Decoder, tokens: list[int], size: int) -> np.ndarray:
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(heads: Heads) -> torch.Tensor:
        k, v = heads.k, heads.v
        if heads.layer in kept:
            k, v = (torch.cat(parts, dim=2) for parts in zip(kept[heads.layer], (k, v)))
        kept[heads.layer] = k, v
        return attention(heads.q, k, v, heads.scale, heads.window)

    parts = [
        our_logits(decoder, tokens[i : i + size], attend=attend, first=i) for i in range(0, len(tokens), size)
    ]
    return np.concatenate(parts)


@pytest.mark.usefixtures("table")
def test_a_file_that_says_nothing_of_its_windows_has_them_in_five_of_six_layers(tiny: Tiny, tmp_path: Path) -> None:
    """As that of Gemma 3 270M; their base is then 10000."""
    source, config = tiny("gemma3", n_layer=6)
    unsaid = {f"gemma3.{key}": None for key in (PATTERN, "rope.freq_base_swa")}
    path, tokens = copy_model(source, tmp_path / "m.gguf", metadata=unsaid), text(300, config.n_vocab)
    decoder = load_gguf(path, torch.float32)
    assert decoder.config.bounded == (5,) and decoder.config.rope_of(0).base == 10000.0  # type: ignore[union-attr]
    assert_close(our_logits(decoder, tokens), library_logits(path, tokens), "gemma3")


@pytest.mark.parametrize("n_ctx", [32, 33, 100, None])
def test_the_context_decides_between_two_rotations(tiny: Tiny, n_ctx: int | None) -> None:
    """As the library does it: the long one beyond the original length; None is the length that was trained for."""
    path, config = tiny("phi3", n_ctx_orig=32, **LONG)
    decoder, tokens = load_gguf(path, torch.float32, n_ctx=n_ctx), text(30)
    name = "short" if n_ctx == 32 else "long"
    np.testing.assert_array_equal(decoder.config.rope.factors, config.weights[f"rope_factors_{name}.weight"])
    if n_ctx != 32:  # the library rounds contexts up to 256
        np.testing.assert_allclose(our_logits(decoder, tokens), library_logits(path, tokens), rtol=0, atol=1e-3)


def test_fused_projections_are_taken_apart(tiny: Tiny, tmp_path: Path) -> None:
    """Any architecture may have them."""
    source, config = tiny("llama", qkv_bias=True)
    tokens = text(60)

    def separate(name: str) -> bool:
        return name.split(".")[-2] in ("attn_q", "attn_k", "attn_v")

    def kept(name: str, stored: Stored) -> Stored | None:
        return None if separate(name) else stored

    fused = {
        f"blk.{il}.attn_qkv.{kind}": np.concatenate([config.weights[f"blk.{il}.attn_{x}.{kind}"] for x in "qkv"])
        for il in range(2) for kind in ("weight", "bias")
    }  # fmt: skip
    path = copy_model(source, tmp_path / "m.gguf", tensor=kept, more=fused)
    ours, plain = load_gguf(path, torch.float32), load_gguf(source, torch.float32)
    assert ours.weights.keys() == plain.weights.keys()
    assert all(torch.equal(ours.weights[name], w) for name, w in plain.weights.items())
    np.testing.assert_allclose(our_logits(ours, tokens), library_logits(path, tokens), rtol=0, atol=1e-3)


@pytest.mark.parametrize("window", [0, 1, 7, 100, BLOCK + 9])
@pytest.mark.parametrize("past", [0, 5, 300])
@pytest.mark.parametrize("total", [1, 64, 2 * BLOCK + 33])
def test_windowed_attention_is_that_of_a_mask(window: int, past: int, total: int) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, total, 8, generator=draw, requires_grad=True)
    k, v = (torch.randn(2, 2, past + total, 8, generator=draw, requires_grad=True) for _ in range(2))
    rows, keys = torch.arange(past, past + total)[:, None], torch.arange(past + total)
    hidden = (keys > rows) | ((keys <= rows - window) if window else torch.zeros((), dtype=torch.bool))
    with torch.enable_grad():
        s = 0.3 * q.unflatten(1, (2, 2)) @ k[:, :, None].mT
        dense = (s.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, None]).flatten(1, 2)
        ours = attention(q, k, v, 0.3, window)
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-4)
        for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, dense))):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("arch", NEW)
def test_gradients_flow_through_attention(tiny: Tiny, arch: str) -> None:
    """Through experts, windows, norms and caps: against differences."""
    decoder = load_gguf(tiny(arch)[0], torch.float32).to("cpu", torch.float64)
    decoder = Decoder(replace(decoder.config, window=min(decoder.config.window, 5)), decoder.weights)
    gates = torch.zeros(decoder.config.n_layer, dtype=torch.float64, requires_grad=True)

    def attend(heads: Heads) -> Any:
        return causal(heads) * (1 + gates[heads.layer])

    tokens = torch.tensor([text(12, decoder.config.n_vocab)])

    def loss() -> Any:
        return decoder.logits(decoder(tokens, attend)).logsumexp(-1).sum()

    with torch.enable_grad():
        (grad,) = torch.autograd.grad(loss(), gates)
    for il in range(len(gates)):
        assert grad[il].item() == pytest.approx(slope(loss, gates, il), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("arch", NEW)
def test_half_precision_keeps_norms_and_routers(tiny: Tiny, arch: str) -> None:
    path, config = tiny(arch)
    tokens = text(60, config.n_vocab)
    exact, half = load_gguf(path, torch.float32), load_gguf(path)
    for name, w in half.weights.items():
        small = name.endswith(("norm.weight", "ffn_gate_inp.weight"))
        assert w.dtype == (torch.float32 if small else torch.bfloat16), name
    heads = half.heads(0, half.embed(torch.tensor([tokens])), torch.arange(len(tokens)))
    assert {t.dtype for t in (heads.hidden, heads.q, heads.k, heads.v)} == {torch.bfloat16}
    ours, theirs = our_logits(half, tokens), our_logits(exact, tokens)
    assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)


def test_bounded_layers_are_those_with_full_attention(tiny: Tiny) -> None:
    gemma = load_gguf(tiny("gemma3", n_layer=6, full_layers=(2, 5))[0]).config
    assert gemma.bounded == (2, 5) and gemma.windowed == (0, 1, 3, 4) and gemma.window == 16
    assert gemma.rope_of(2).base == 1e5 and gemma.rope_of(0).base == 1e3  # type: ignore[union-attr]
    assert load_gguf(tiny("gemma3-window")[0]).config.bounded == ()
    assert load_gguf(tiny("smollm3")[0]).config.bounded == (0, 1, 2, 3)
    assert load_gguf(tiny("smollm3")[0]).config.rope_of(3) is None
