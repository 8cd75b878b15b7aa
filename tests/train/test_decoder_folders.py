"""Decoders from folders as Hugging Face has them: the same as from the GGUF file, and refused if they are anything else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from tiny.gguf_copy import copy_model
from tiny.huggingface import huggingface_weights, with_images, write_folder
from tiny.models import BOS

torch = pytest.importorskip("torch")

from indexmem_edge.errors import ModelFileError, ModelNotSupported
from indexmem_edge.train.model.decoder import Decoder
from indexmem_edge.train.model.gguf_weights import load_gguf
from indexmem_edge.train.model.load import load_decoder
from indexmem_edge.train.model.safetensors_weights import load_safetensors

TOKENS = [BOS, *np.random.default_rng(1).integers(3, 320, 80).tolist()]
EACH = [
    ("llama", {}),
    ("llama", {"tied": True, "n_head": 4, "n_head_kv": 4, "head_dim": 32}),
    ("llama", {"qkv_bias": True, "other_bias": True}),
    ("qwen2", {}),
    ("qwen3", {"tied": True}),
    ("gemma", {}),
    ("gemma", {"rope_base": 5e4, "head_dim": 32}),
    ("gemma3", {}),
    ("gemma3", {"n_layer": 6, "full_layers": (1, 2, 5)}),
    ("granite", {}),
    ("granite", {"qkv_bias": True, "other_bias": True}),
    ("phi3", {}),
    ("phi3", {"rope_dim": 48}),
    ("phi3", {"long_factors": True, "n_ctx_orig": 64, "rope_magnitude": 2**0.5}),
    ("qwen3moe", {}),
    ("smollm3", {"n_layer": 9, "tied": True}),
    ("qwen2vl", {}),
    ("qwen3vl", {"tied": True}),
]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


def assert_same(ours: Decoder, theirs: Decoder) -> None:
    """Weights to the bit, numbers to the rounding of a GGUF file's float32."""
    assert ours.weights.keys() == theirs.weights.keys()
    for name, w in theirs.weights.items():
        assert ours.weights[name].dtype == w.dtype and torch.equal(ours.weights[name], w), name
    for a, b in ((ours.config, theirs.config), (ours.config.rope, theirs.config.rope)):
        for key, value in vars(b).items():
            if isinstance(value, float):
                assert getattr(a, key) == pytest.approx(value), key
            elif key not in ("rope", "window_rope", "factors"):
                assert getattr(a, key) == value, key
    for il in range(theirs.config.n_layer):
        rope, expected = ours.config.rope_of(il), theirs.config.rope_of(il)
        assert (rope is None) == (expected is None)
        if rope is not None and expected is not None:
            np.testing.assert_allclose(rope.frequencies(), expected.frequencies(), rtol=1e-6)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("arch", "overrides"), EACH)
def test_they_are_the_gguf_file(tiny: Tiny, tmp_path: Path, arch: str, overrides: dict[str, Any], shards: int) -> None:
    path, config = tiny(arch, **overrides)
    folder = write_folder(tmp_path / "model", config, shards=shards)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(load_decoder(folder, dtype), load_decoder(path, dtype))


@pytest.mark.parametrize("arch", ["qwen3vl", "qwen2vl", "gemma3"])
def test_text_inside_a_model_of_images(tiny: Tiny, tmp_path: Path, arch: str) -> None:
    path, config = tiny(arch, tied=True)
    raw, weights = with_images(config)
    folder = write_folder(tmp_path / "model", config, weights=weights, only=raw)
    assert_same(load_decoder(folder, torch.float32), load_decoder(path, torch.float32))
    older = {name.replace("model.language_model.", "language_model.model."): w for name, w in weights.items()}
    folder = write_folder(tmp_path / "older", config, weights=older, only=raw)
    assert_same(load_decoder(folder, torch.float32), load_decoder(path, torch.float32))


def test_factors_follow_the_context(tiny: Tiny, tmp_path: Path) -> None:
    path, config = tiny("phi3", long_factors=True, n_ctx_orig=64, rope_magnitude=2**0.5)
    folder, seen = write_folder(tmp_path / "model", config), []
    for n_ctx in (64, 65):
        ours = load_decoder(folder, torch.float32, n_ctx=n_ctx)
        assert_same(ours, load_decoder(path, torch.float32, n_ctx=n_ctx))
        seen.append(ours.config.rope.factors)
    assert seen[0] != seen[1]


def test_windows_by_their_distance_and_rotations_by_their_kind(tiny: Tiny, tmp_path: Path) -> None:
    """The older and the newer way to say it."""
    path, config = tiny("gemma3", n_layer=6, full_layers=(2, 5), metadata=(("rope.scaling.type", "linear"), ("rope.scaling.factor", 8.0)))
    linear = {"rope_type": "linear", "factor": 8.0}
    by_kind = {
        "full_attention": {**linear, "rope_theta": config.rope_base},
        "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_base / 100},
    }
    for i, change in enumerate((
        {"layer_types": None, "sliding_window_pattern": 3, "rope_scaling": linear},
        {"rope_parameters": by_kind, "rope_theta": None, "rope_local_base_freq": None},
    )):  # fmt: skip
        folder = write_folder(tmp_path / str(i), config, **change)
        assert_same(load_safetensors(folder, torch.float32), load_gguf(path, torch.float32))


def test_rows_are_permuted_as_the_rotation_is(tiny: Tiny) -> None:
    """The weights of Hugging Face with its rotation give the logits of the GGUF file with the other one, from other keys."""
    path, config = tiny("llama")
    gguf = load_gguf(path, torch.float32)
    theirs = {name: torch.from_numpy(w) for name, w in huggingface_weights(config).items()}
    halves = {f"blk.{il}.attn_{x}.weight": theirs[f"model.layers.{il}.self_attn.{x}_proj.weight"] for il in (0, 1) for x in "qk"}
    other = Decoder(replace(gguf.config, rope=replace(gguf.config.rope, interleaved=False)), dict(gguf.weights) | halves)
    tokens, positions = torch.tensor([TOKENS]), torch.arange(len(TOKENS))
    torch.testing.assert_close(other(tokens), gguf(tokens), rtol=0, atol=1e-4)
    assert (other.heads(0, other.embed(tokens), positions).k - gguf.heads(0, gguf.embed(tokens), positions).k).abs().max() > 1


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("scaling", "metadata"),
    [
        ({"type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            {"type": "yarn", "factor": 4.0, "original_context_length": 512},
        ),
        ({"rope_type": "yarn", "factor": 2.0}, {"type": "yarn", "factor": 2.0}),
        ({"rope_type": "default"}, {}),
    ],
)
def test_scaling_of_positions(tiny: Tiny, tmp_path: Path, key: str, scaling: dict[str, Any], metadata: dict[str, Any]) -> None:
    path, config = tiny("qwen3", metadata=tuple((f"rope.scaling.{name}", value) for name, value in metadata.items()))
    raw = {key: scaling}
    if key == "rope_parameters":  # where the base lies in it, too
        raw = {key: {**scaling, "rope_theta": config.rope_base}, "rope_theta": None}
    folder = write_folder(tmp_path / "model", config, **raw)
    assert_same(load_safetensors(folder, torch.float32), load_gguf(path, torch.float32))


def test_factors_of_llama_3(tiny: Tiny, tmp_path: Path) -> None:
    """By wavelengths, as the authors put it, in the GGUF file; ours counts turns."""
    plain, config = tiny("llama")
    wavelengths = 2 * np.pi * config.rope_base ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    smooth = (512 / wavelengths - 1) / (4 - 1)
    mixed = 1 / ((1 - smooth) / 8 + smooth)
    factors = np.where(wavelengths < 512 / 4, 1, np.where(wavelengths > 512 / 1, 8, mixed))
    assert len(set(factors)) > 4  # some between
    path = copy_model(plain, tmp_path / "f.gguf", more={"rope_freqs.weight": factors.astype(np.float32)})
    folder = write_folder(tmp_path / "model", config, rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert_same(load_safetensors(folder, torch.float32), load_gguf(path, torch.float32))


def test_what_may_be_left_out_and_what_is_ignored(tiny: Tiny, tmp_path: Path) -> None:
    path, config = tiny("llama", n_head=4, n_head_kv=4, head_dim=16, tied=True)
    weights = huggingface_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1  # not read, the embedding is
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    folder = write_folder(
        tmp_path / "model", config, weights=weights, model_type="mistral",
        **dict.fromkeys(("num_key_value_heads", "head_dim", "rope_theta", "hidden_act", "sliding_window")),
    )  # fmt: skip
    assert_same(load_decoder(folder, torch.float32), load_decoder(path, torch.float32))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gemma2"}, "architecture 'gemma2': folders are read of llama, mistral, qwen2, .* alone; name the GGUF"),
    ({"hidden_act": "gelu"}, "activation 'gelu' instead of silu"),
    ({"quantization_config": {"bits": 4}}, "quantised weights"),
    ({"use_sliding_window": True}, "a sliding window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layers without full attention"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    ({"model_type": "qwen2", "rope_scaling": {"type": "llama3"}}, "rope scaling 'llama3'"),
    ({"partial_rotary_factor": 0.5}, "32 rotated dimensions of 64"),
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model_type": None}, "no model_type"),
    ({"hidden_size": None}, "config.json has no hidden_size"),
    ({"hidden_size": "64"}, "hidden_size in config.json must be a positive integer, found '64'"),
    ({"num_attention_heads": True}, "must be a positive integer, found True"),
    ({"num_attention_heads": 5}, "5 query heads cannot share 2 KV heads"),
    ({"head_dim": 63}, "heads of 63 dimensions"),
    ({"head_dim": 32}, r"is \[128, 64\] \(output, input\), expected \[64, 64\]"),
    ({"num_hidden_layers": 10**9}, "1000000000 layers and only"),
    ({"num_hidden_layers": 3}, "lacks the tensors 'blk.2.attn_q.weight'"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps in config.json must be a positive number, found nan"),
    ({"rope_theta": 1.0}, "base of its rotary frequencies is 1.0"),
    ({"rope_scaling": [4.0]}, "rope_scaling in config.json must be an object, found a list"),
    ({"rope_scaling": {"type": "linear"}}, "config.json has no factor"),
    ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "contradict each other"),
]


@pytest.mark.parametrize(
    ("change", "message", "kind"),
    [*((*case, ModelNotSupported) for case in REFUSED), *((*case, ModelFileError) for case in WRONG)],
)
def test_configurations(tiny: Tiny, tmp_path: Path, change: dict[str, Any], message: str, kind: type[Exception]) -> None:
    folder = write_folder(tmp_path / "model", tiny("llama")[1], **change)
    with pytest.raises(kind, match=message):
        load_safetensors(folder)


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("qwen3moe", {"norm_topk_prob": False}, "weights of experts that do not add up to 1"),
        ("qwen3moe", {"norm_topk_prob": None}, "weights of experts that do not add up to 1"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "layers without experts among those that have them"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "layers without experts among those that have them"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "other layers without rotation than every 4th"),
        ("smollm3", {"no_rope_layer_interval": 3}, "other layers without rotation than every 4th"),
        ("gemma", {"hidden_act": "silu"}, "the activation 'silu' instead of gelu_pytorch_tanh"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "a scale of attention of its own"),
        ("gemma3", {"use_bidirectional_attention": True}, "attention that is not causal"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "a soft cap of attention logits"),
        ("granite", {"position_embedding_type": "nope"}, "positions that are not rotary"),
        ("qwen3vl", {"rope_scaling": {"mrope_section": [6, 5, 5], "mrope_interleaved": False}}, "another order of the dimensions"),
    ],
)
def test_what_folders_of_one_kind_may_not_say(
    tiny: Tiny, tmp_path: Path, arch: str, change: dict[str, Any], message: str
) -> None:
    folder = write_folder(tmp_path / "model", tiny(arch)[1], **change)
    with pytest.raises(ModelNotSupported, match=message):
        load_safetensors(folder)


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types in config.json must name the attention of each layer"),
        ("gemma3", {"layer_types": None, "num_hidden_layers": 10**9}, "1000000000 layers and only"),
        ("smollm3", {"no_rope_layers": None, "num_hidden_layers": 10**9}, "1000000000 layers and only"),
        ("granite", {"attention_multiplier": None}, "config.json has no attention_multiplier"),
        ("qwen2vl", {"rope_scaling": {"type": "mrope"}}, "mrope_section in config.json must be three numbers of pairs"),
        ("qwen2vl", {"text_config": [1]}, "text_config in config.json must be an object"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "short_factor in config.json must be 32 numbers"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [-1.0] * 32}}, "must have positive numbers only"),
    ],
)
def test_folders_of_one_kind_that_are_damaged(tiny: Tiny, tmp_path: Path, arch: str, change: dict[str, Any], message: str) -> None:
    folder = write_folder(tmp_path / "model", tiny(arch)[1], **change)
    with pytest.raises(ModelFileError, match=message):
        load_safetensors(folder)


def test_experts_that_are_missing_or_differ(tiny: Tiny, tmp_path: Path) -> None:
    _, config = tiny("qwen3moe")
    one = "model.layers.1.mlp.experts.2.up_proj.weight"
    weights = huggingface_weights(config)
    for change, message in (
        ({one: None}, "has the experts 0, 1, 3, 4, 5 of 'blk.1.ffn_up_exps.weight': some are missing"),
        ({one: weights[one][:-1]}, "the experts of 'blk.1.ffn_up_exps.weight' differ in shape"),
        ({one: np.full_like(weights[one], np.inf)}, f"tensor '{one}' has values that are not finite"),
    ):
        changed = {name: w for name, w in (weights | change).items() if w is not None}
        with pytest.raises(ModelFileError, match=message):
            load_safetensors(write_folder(tmp_path / "model", config, weights=changed))


def test_tensors(tiny: Tiny, tmp_path: Path) -> None:
    _, config = tiny("llama")
    q, experts = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight"
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({q: None}, ModelFileError, "lacks the tensors 'blk.1.attn_q.weight'"),
        ({experts: np.ones((4, 4), np.float32)}, ModelNotSupported, f"the tensors '{experts}', which training would leave out"),
        ({q: np.ones((384, 64), np.int32)}, ModelFileError, f"tensor '{q}' has type I32, expected one of F64, F32, F16, BF16"),
        ({q: np.full((384, 64), np.nan, np.float32)}, ModelFileError, f"tensor '{q}' has values that are not finite"),
        ({"lm_head.weight": None}, ModelFileError, "lacks lm_head.weight, and its config.json does not say"),
        ({"model.embed_tokens.weight": None}, ModelFileError, "lacks the matrix model.embed_tokens.weight"),
    ]
    for i, (change, kind, message) in enumerate(cases):
        weights = {name: w for name, w in (huggingface_weights(config) | change).items() if w is not None}
        with pytest.raises(kind, match=message):
            load_safetensors(write_folder(tmp_path / str(i), config, weights=weights))


def test_files(tiny: Tiny, tmp_path: Path) -> None:
    _, config = tiny("llama")
    with pytest.raises(ModelFileError, match="is not a folder"):
        load_safetensors(tmp_path / "absent")
    folder = write_folder(tmp_path / "model", config)
    for content, message in (("{", "is damaged"), ("[]", "expected an object, found a list"), ("[" * 99999, "is damaged")):
        (folder / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ModelFileError, match=rf"config.json {message}|config.json is damaged: {message}"):
            load_safetensors(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelFileError, match="config.json does not exist: name a folder with a model"):
        load_safetensors(folder)
    write_folder(folder, config)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ModelFileError, match="not a readable safetensors file"):
            load_safetensors(folder)
    file.unlink()
    with pytest.raises(ModelFileError, match="model.safetensors is missing and there is no index of shards"):
        load_safetensors(folder)


def test_shards(tiny: Tiny, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tiny("llama")[1], shards=2)
    index, first = folder / "model.safetensors.index.json", folder / "model-00001-of-00002.safetensors"
    names = json.loads(index.read_text())["weight_map"]
    moved = next(name for name, file in names.items() if file != first.name)
    for weight_map, message in (
        ([], "weight_map must name a file in the same folder"),
        (names | {moved: "../model-00001-of-00002.safetensors"}, "weight_map must name a file in the same folder"),
        (names | {moved: None}, "weight_map must name a file in the same folder"),
        (names | {moved: first.name}, f"lacks '{moved}', which model.safetensors.index.json says it has"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelFileError, match=message):
            load_safetensors(folder)
    index.write_text(json.dumps({"weight_map": names}))
    first.unlink()
    with pytest.raises(ModelFileError, match="00001-of-00002.safetensors is missing; model.safetensors.index.json names it"):
        load_safetensors(folder)
