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
from tiny.huggingface import huggingface_weights, write_folder
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
            elif key not in ("rope", "factors"):
                assert getattr(a, key) == value, key
    np.testing.assert_allclose(ours.config.rope.frequencies(), theirs.config.rope.frequencies(), rtol=1e-6)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("arch", "overrides"), EACH)
def test_they_are_the_gguf_file(tiny: Tiny, tmp_path: Path, arch: str, overrides: dict[str, Any], shards: int) -> None:
    path, config = tiny(arch, **overrides)
    folder = write_folder(tmp_path / "model", config, shards=shards)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(load_decoder(folder, dtype), load_decoder(path, dtype))


def test_rows_are_permuted_as_the_rotation_is(tiny: Tiny) -> None:
    """The weights of Hugging Face with its rotation give the logits of the GGUF file with the other one, from other keys."""
    path, config = tiny("llama")
    gguf = load_gguf(path, torch.float32)
    theirs = {name: torch.from_numpy(w) for name, w in huggingface_weights(config).items()}
    halves = {f"blk.{il}.attn_{x}.weight": theirs[f"model.layers.{il}.self_attn.{x}_proj.weight"] for il in (0, 1) for x in "qk"}
    other = Decoder(replace(gguf.config, rope=replace(gguf.config.rope, interleaved=False)), gguf.weights | halves)
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
    ({"model_type": "gemma2"}, "architecture 'gemma2': folders are read of llama, mistral, qwen2, qwen3 alone; name the GGUF"),
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
