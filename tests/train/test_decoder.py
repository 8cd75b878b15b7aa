"""The decoders in PyTorch against the library: the same logits from the same file, for all that a file can ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import llama_cpp
from indexmem_edge.train.model.decoder import Heads, causal
from indexmem_edge.train.model.gguf_weights import load_gguf
from indexmem_edge.train.model.rope import Rope, Yarn, make_rope
from support.decoders import LINEAR, YARN, library_logits, our_logits, slope, text, tokenize, torch
from tiny.gguf_copy import as_f32, copy_model, first_layers

ARCHITECTURES = ("llama", "qwen2", "qwen3")
LINEAR_OF_OLD = (("rope.scale_linear", 4.0),)
NONE = ("rope.scaling.type", "none"), ("rope.scaling.factor", 4.0)
FEATURES: list[tuple[str, dict[str, Any]]] = [
    *((arch, {}) for arch in ARCHITECTURES),
    *((arch, {"tied": True}) for arch in ARCHITECTURES),
    *((arch, {"metadata": scaling}) for arch in ARCHITECTURES for scaling in (LINEAR, YARN)),
    ("llama", {"metadata": LINEAR_OF_OLD}),
    ("llama", {"metadata": NONE}),
    ("llama", {"metadata": (*YARN, ("rope.scaling.attn_factor", 0.8))}),
    ("llama", {"metadata": (("rope.scaling.attn_factor", 1.25),)}),
    ("llama", {"metadata": YARN[:2]}),  # the original length is then that of the model
    ("llama", {"metadata": (*YARN, ("rope.scaling.yarn_beta_fast", 8.0))}),  # which llama.cpp does not read here
    ("llama", {"rope_factors": True}),
    ("llama", {"rope_factors": True, "metadata": YARN}),
    ("llama", {"qkv_bias": True, "other_bias": True}),
    ("qwen2", {"qkv_bias": False}),
    ("qwen3", {"qkv_bias": True}),
    ("llama", {"n_head": 4, "n_head_kv": 4, "head_dim": 32, "n_layer": 3, "n_embd": 96}),
    ("qwen3", {"n_head": 5, "n_head_kv": 1, "head_dim": 128, "rope_base": 1e6}),
]
PACKABLE = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")  # by the package gguf
BLOCKS = {"n_embd": 256, "n_ff": 256, "n_head": 4, "n_head_kv": 2}  # rows are multiples of every type's blocks


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield










@pytest.mark.parametrize(("arch", "overrides"), FEATURES, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "plain")
def test_logits_are_those_of_the_library(tiny: Tiny, arch: str, overrides: dict[str, Any]) -> None:
    path, _ = tiny(arch, **overrides)
    tokens = text(300)
    theirs = library_logits(path, tokens)
    np.testing.assert_allclose(our_logits(load_gguf(path, torch.float32), tokens), theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "overrides", [{"metadata": LINEAR}, {"metadata": YARN}, {"rope_factors": True}, {"qkv_bias": True}], ids="-".join
)
def test_what_was_compared_matters(tiny: Tiny, overrides: dict[str, Any]) -> None:
    """The bound above would notice if a feature was left out."""
    tokens = text(300)
    plain, other = (our_logits(load_gguf(tiny("llama", **o)[0], torch.float32), tokens) for o in ({}, overrides))
    assert np.abs(plain - other).max() > 0.1


@pytest.mark.parametrize("kind", PACKABLE)
def test_types_that_are_dequantised(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """The library runs the dequantised weights: on quantised ones it quantises what they are multiplied with, too."""
    path, config = tiny("llama", tensor_type=kind, **BLOCKS)
    decoder, tokens = load_gguf(path, torch.float32), text(100)
    for name, w in config.weights.items():
        np.testing.assert_array_equal(decoder.weights[name].numpy(), w, err_msg=name)
    theirs = library_logits(copy_model(path, tmp_path / "f32.gguf", tensor=as_f32), tokens)
    np.testing.assert_allclose(our_logits(decoder, tokens), theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("ftype", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "TQ1_0"])
def test_files_that_the_library_quantised(tiny: Tiny, tmp_path: Path, ftype: str) -> None:
    """Against the quantised file itself. Activations are rounded to 8 bits there, which moves these logits by 2 %."""
    source, _ = tiny("llama", **BLOCKS)
    path, tokens = tmp_path / "quantised.gguf", text(100)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}"), 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params) == 0
    theirs, ours = library_logits(path, tokens), our_logits(load_gguf(path, torch.float32), tokens)
    assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)


def test_positions_start_where_they_are_told(tiny: Tiny) -> None:
    """Rotary embedding is relative: the same text later gives the same logits, with other keys."""
    decoder, tokens = load_gguf(tiny("qwen3")[0], torch.float32), text(40)
    np.testing.assert_allclose(our_logits(decoder, tokens), our_logits(decoder, tokens, first=500), rtol=0, atol=1e-3)
    x = decoder.embed(torch.tensor([tokens]))
    keys = [decoder.heads(0, x, torch.arange(first, first + 40)).k for first in (0, 500)]
    assert (keys[0] - keys[1]).abs().max() > 0.1


def test_batches_are_sequences_of_their_own(tiny: Tiny) -> None:
    decoder = load_gguf(tiny("llama")[0], torch.float32)
    both = torch.tensor([text(20), text(20)[::-1]])
    np.testing.assert_allclose(decoder(both)[1:].numpy(), decoder(both[1:]).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_half_precision_keeps_norms(tiny: Tiny, arch: str) -> None:
    path, tokens = tiny(arch)[0], text(60)
    exact, half = load_gguf(path, torch.float32), load_gguf(path)
    assert half.dtype == torch.bfloat16
    for name, w in half.weights.items():
        assert w.dtype == (torch.float32 if name.endswith("norm.weight") else torch.bfloat16), name
    converted = exact.to("cpu", torch.bfloat16)
    for name, w in half.weights.items():
        assert torch.equal(w, converted.weights[name]) and w.dtype == converted.weights[name].dtype, name
    heads = half.heads(0, half.embed(torch.tensor([tokens])), torch.arange(len(tokens)))
    assert {t.dtype for t in (heads.hidden, heads.q, heads.k, heads.v)} == {torch.bfloat16}
    ours, theirs = our_logits(half, tokens), our_logits(exact, tokens)
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_flow_through_attention(tiny: Tiny, arch: str) -> None:
    """To what `attend` adds, through all later layers, and not to the weights."""
    decoder = load_gguf(tiny(arch)[0], torch.float32).to("cpu", torch.float64)
    gates = torch.zeros(decoder.config.n_layer, dtype=torch.float64, requires_grad=True)

    def attend(heads: Heads) -> Any:
        return causal(heads) * (1 + gates[heads.layer]) + 0 * heads.hidden.sum()

    tokens = torch.tensor([text(12)])

    def loss() -> Any:
        return decoder.logits(decoder(tokens, attend)).logsumexp(-1).sum()

    with torch.enable_grad():
        loss().backward()
    assert not any(w.requires_grad for w in decoder.weights.values())
    for il in range(len(gates)):
        assert gates.grad[il].item() == pytest.approx(slope(loss, gates, il), rel=1e-3)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("n_dim", [8, 16])
def test_rotation_of_some_dimensions(interleaved: bool, n_dim: int) -> None:
    """Pairs as complex numbers; what is not rotated stays, whatever the magnitude."""
    rope = Rope(100.0, n_dim, interleaved, magnitude=1.5)
    x, positions = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 7, 500, 9000])
    ours = rope.rotate(x, *rope.table(positions)).numpy()
    a = x.numpy().astype(np.float64)
    first, second = (np.s_[..., 0:n_dim:2], np.s_[..., 1:n_dim:2]) if interleaved else (
        np.s_[..., : n_dim // 2], np.s_[..., n_dim // 2 : n_dim]
    )  # fmt: skip
    angles = positions.numpy()[:, None] * 100.0 ** (-np.arange(n_dim // 2) * 2 / n_dim)
    turned = 1.5 * (a[first] + 1j * a[second]) * np.exp(1j * angles)
    np.testing.assert_allclose(ours[first], turned.real, atol=2e-3)
    np.testing.assert_allclose(ours[second], turned.imag, atol=2e-3)
    np.testing.assert_array_equal(ours[..., n_dim:], x[..., n_dim:])


def test_yarn_keeps_high_frequencies_and_scales_low_ones() -> None:
    plain = make_rope(base=1e6, n_dim=128, interleaved=False)
    rope = make_rope(base=1e6, n_dim=128, interleaved=False, kind="yarn", factor=4.0, n_ctx_orig=32768)
    share = rope.frequencies() / plain.frequencies()
    assert rope.yarn == Yarn(32768) and rope.magnitude == pytest.approx(1 + 0.1 * np.log(4))
    np.testing.assert_allclose(share[[0, 10, 50, 63]], [1, 1, 0.25, 0.25])
    assert (np.diff(share) <= 1e-12).all()


def test_the_demo_model(demo_model: Path, tmp_path: Path) -> None:
    """Trained weights and real text: its first layers, dequantised, in both."""
    metadata = {"llama.block_count": 3, "tokenizer.chat_template": None}
    path = copy_model(demo_model, tmp_path / "short.gguf", metadata=metadata, tensor=first_layers(3))
    tokens = tokenize(path, Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8"), 200)
    ours, theirs = our_logits(load_gguf(path, torch.float32), tokens), library_logits(path, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def test_the_demo_model_as_it_is(demo_model: Path) -> None:
    """All its layers in Q4_1. The library rounds activations to 8 bits there: a deviation of 0.2 where logits have one of 8."""
    tokens = tokenize(demo_model, Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8"), 100)
    ours, theirs = our_logits(load_gguf(demo_model, torch.float32), tokens), library_logits(demo_model, tokens)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.5 and theirs.std() > 5
    assert np.mean(ours.argmax(-1) == theirs.argmax(-1)) > 0.9


