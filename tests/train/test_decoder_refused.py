"""GGUF files that training does not read: damaged ones, and models that compute what it does not. The error says which."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import gguf
import numpy as np
import pytest

from conftest import Tiny
from tiny.gguf_copy import Stored, copy_model

torch = pytest.importorskip("torch")

from indexmem_edge.errors import IndexMemError, ModelFileError, ModelNotSupported
from indexmem_edge.train.model import architectures, gguf_weights
from indexmem_edge.train.model.architectures import trainable
from indexmem_edge.train.model.gguf_weights import load_gguf
from indexmem_edge.train.model.load import load_decoder

# architectures that the package gguf does not name yet
NEWER = {
    "bailingmoe3", "deepseek32", "deepseek4", "dflash", "dots3note", "eagle3", "gemma4-assistant", "glm5-next", "granite_swa",
    "hy_v4", "kimi-k3", "minimax-01", "minimax-m3", "qwen3tts", "qwen4exp",
}  # fmt: skip
FEATURES: list[tuple[dict[str, Any], str]] = [
    ({"llama.expert_count": 8}, "expert layers"),
    ({"llama.attention.sliding_window": 4096}, "a sliding window"),
    ({"llama.attn_logit_softcapping": 50.0}, "a soft cap of attention logits"),
    ({"llama.final_logit_softcapping": 30.0}, "a soft cap of logits"),
    ({"llama.attention.clamp_kqv": 8.0}, "clamped queries"),
    ({"llama.attention.max_alibi_bias": 8.0}, "ALiBi"),
    ({"llama.attention.causal": False}, "attention that is not causal"),
    ({"llama.attention.scale": 0.2}, "a scale of attention of its own"),
    ({"llama.logit_scale": 3.0}, "a scale of logits"),
    ({"llama.embedding_scale": 6.0}, "a scale of embeddings"),
    ({"llama.residual_scale": 0.4}, "a scale of residuals"),
    ({"llama.nextn_predict_layers": 1}, "layers that predict further tokens"),
    ({"llama.rope.scaling.type": "dynamic"}, "rope scaling 'dynamic'"),
    ({"llama.expert_group_count": 4}, "groups of experts"),
    ({"llama.deepstack_mapping": [0, 1]}, "image features"),
    ({"llama.rope.dimension_count": 32}, "32 rotated dimensions of 64"),
    ({"llama.attention.value_length": 32}, "values of another length than keys"),
    ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv that differs between layers"),
]
METADATA: list[tuple[dict[str, Any], str]] = [
    ({"general.type": "adapter"}, "is no model: its general.type is 'adapter'"),
    ({"split.count": 2}, "one part of a split model: merge"),
    ({"llama.attention.head_count": None}, "has no llama.attention.head_count"),
    ({"llama.attention.head_count": 0}, "is damaged: llama.attention.head_count is 0"),
    ({"llama.attention.head_count": 5}, "5 query heads cannot share 2 KV heads"),
    ({"llama.attention.head_count": "six"}, "'llama.attention.head_count' is string, expected"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
    ({"llama.rope.freq_base": 0.0}, "base of its rotary frequencies is 0.0"),
    ({"llama.rope.scaling.factor": -2.0}, "rope.scaling.factor is -2.0"),
    ({"llama.block_count": 3}, "lacks the tensors 'blk.2.attn_q.weight'"),
    ({"llama.block_count": 10**9}, "1000000000 layers and only"),
    ({"llama.feed_forward_length": 95}, r"is \[96, 64\] \(output, input\), expected \[95, 64\]"),
    ({f"llama.attention.{x}_length": 63 for x in ("key", "value")}, "heads of 63 dimensions"),
]
HARMLESS: dict[str, Any] = {
    "llama.expert_count": 0, "llama.attention.sliding_window": 0, "llama.attention.scale": 0.125, "llama.logit_scale": 1.0,
    "llama.attention.head_count_kv": [2, 2], "general.type": "model", "llama.attention.causal": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "message", "kind"),
    [*((*case, ModelNotSupported) for case in FEATURES), *((*case, ModelFileError) for case in METADATA)],
)
def test_metadata(tiny: Tiny, tmp_path: Path, metadata: dict[str, Any], message: str, kind: type[Exception]) -> None:
    path = copy_model(tiny("llama")[0], tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(kind, match=message) as error:
        load_gguf(path)
    assert str(path) in str(error.value)
    if kind is ModelNotSupported:
        assert "which training does not compute" in str(error.value) and "--kv-policy" in str(error.value)


def test_metadata_that_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama")[0]
    assert load_gguf(copy_model(source, tmp_path / "m.gguf", metadata=HARMLESS)).config == load_gguf(source).config


OTHERS = {
    "gemma2": "its attention logits have a soft cap", "mamba": "it is recurrent", "jamba": "it has recurrent layers beside",
    "qwen35": "it has recurrent layers beside", "gpt-oss": "its attention has sinks", "gemma4": "read the keys and values of",
    "cohere2": "its graph is not among", "deepseek2": "its attention is latent (MLA)", "bloom": "biased by distance", "t5": "it is an encoder", "chatglm": "its graph is not among",
}  # fmt: skip


@pytest.mark.parametrize("arch", OTHERS)
def test_other_architectures(tiny: Tiny, arch: str) -> None:
    with pytest.raises(ModelNotSupported) as error:
        load_decoder(tiny(arch)[0])
    message = str(error.value)
    assert f"has the architecture '{arch}': {trainable(arch)}" in message and "\n" not in message
    assert ("train with --engine native" in message) == (arch not in ("mamba", "bloom", "t5"))
    assert OTHERS[arch] in trainable(arch)


def test_every_architecture_has_an_answer() -> None:
    """The table names none that llama.cpp does not have, and none twice; what is not in it has no graph here."""
    known = set(gguf.MODEL_ARCH_NAMES.values()) | NEWER
    names = [name for names in architectures._REASONS.values() for name in names.split()]
    assert len(set(names)) == len(names) and known.issuperset(names) and known.issuperset(architectures.ARCHITECTURES)
    assert not set(names) & set(architectures.ARCHITECTURES)
    for name in known:
        assert (trainable(name) == "") == (name in architectures.ARCHITECTURES)
    assert trainable("of another year") == trainable("chatglm") != ""


def test_the_page_lists_what_is_read() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "design.md").read_text(encoding="utf-8")
    listed = page.split("**Architectures** that are read: ")[1].split(";")[0]
    assert listed.replace("\n", " ") == architectures.KNOWN


EXPERTS = {"expert_count": "has no qwen3moe.expert_count", "expert_used_count": "has no qwen3moe.expert_used_count"}
DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    *(("qwen3moe", {f"qwen3moe.{key}": None}, message) for key, message in EXPERTS.items()),
    ("qwen3moe", {"qwen3moe.expert_used_count": 7}, "7 of 6 experts for each token"),
    ("qwen3moe", {"qwen3moe.expert_feed_forward_length": 47}, r"'blk.0.ffn_gate_exps.weight' is \[6, 48, 64\]"),
    ("granite", {"granite.logit_scale": None}, "has no granite.logit_scale"),
    ("granite", {"granite.logit_scale": 0.0}, "granite.logit_scale is 0"),
    ("phi3", {"phi3.rope.dimension_count": 66}, "66 rotated dimensions of 64"),
    ("phi3", {"phi3.rope.dimension_count": 47}, "47 rotated, cannot be rotated in pairs"),
    ("phi3", {"phi3.feed_forward_length": 95}, r"'blk.0.ffn_up.weight' is \[192, 384\] .* expected 190 rows: 95 of"),
    ("qwen3vl", {"qwen3vl.rope.dimension_sections": None}, "has no qwen3vl.rope.dimension_sections"),
    ("qwen3vl", {"qwen3vl.rope.dimension_sections": [0, 0, 0, 0]}, r"dimension_sections is \[0, 0, 0, 0\]"),
    ("qwen3vl", {"qwen3vl.rope.dimension_sections": [70, -9, 3, 0]}, r"dimension_sections is \[70, -9, 3, 0\]"),
    ("gemma3", {"gemma3.rope.freq_base_swa": 0.5}, "base of its rotary frequencies is 0.5"),
    ("gemma3", {"gemma3.final_logit_softcapping": float("nan")}, "final_logit_softcapping is nan"),
]


@pytest.mark.parametrize(("arch", "metadata", "message"), DAMAGED)
def test_damaged_models_of_other_architectures(
    tiny: Tiny, tmp_path: Path, arch: str, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFileError, match=message):
        load_gguf(copy_model(tiny(arch)[0], tmp_path / "m.gguf", metadata=metadata))


def test_window_layers_with_other_heads(tiny: Tiny, tmp_path: Path) -> None:
    for key in ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"):
        path = copy_model(tiny("gemma3")[0], tmp_path / "m.gguf", metadata={f"gemma3.{key}": 16})
        with pytest.raises(ModelNotSupported, match=f"heads of another kind in its window layers .gemma3.{key}"):
            load_gguf(path)


def replaced(wanted: str, stored: Optional[Stored]) -> Callable[[str, Stored], Optional[Stored]]:
    return lambda name, old: stored if name == wanted else old


def f32(*shape: int, value: float = 1.0) -> Stored:
    return np.full(shape, value, np.float32), gguf.GGMLQuantizationType.F32


I8 = np.ones((64,), np.int8), gguf.GGMLQuantizationType.I8
TENSORS: list[tuple[str, Optional[Stored], str]] = [
    ("blk.1.ffn_down.weight", None, "lacks the tensors 'blk.1.ffn_down.weight' of a llama model"),
    ("output_norm.weight", None, "lacks the tensors 'output_norm.weight'"),
    ("token_embd.weight", None, "lacks the matrix token_embd.weight"),
    ("token_embd.weight", f32(320), "lacks the matrix token_embd.weight"),
    ("output.weight", f32(319, 64), r"'output.weight' is \[319, 64\] \(output, input\), expected \[320, 64\]"),
    ("blk.0.attn_norm.weight", f32(1, 64), r"'blk.0.attn_norm.weight' is \[1, 64\]"),
    ("blk.0.attn_q.weight", f32(384, 64, value=np.inf), "'blk.0.attn_q.weight' has values that are not finite"),
    ("output_norm.weight", I8, "'output_norm.weight' has type I8, which the installed package gguf cannot dequantise"),
]


@pytest.mark.parametrize(("name", "stored", "message"), TENSORS)
def test_tensors(tiny: Tiny, tmp_path: Path, name: str, stored: Optional[Stored], message: str) -> None:
    path = copy_model(tiny("llama")[0], tmp_path / "m.gguf", tensor=replaced(name, stored))
    with pytest.raises(ModelFileError, match=message) as error:
        load_gguf(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "blk.0.attn_sinks.weight", "blk.2.attn_q.weight"])
def test_tensors_that_would_be_left_out(tiny: Tiny, tmp_path: Path, arch: str, name: str) -> None:
    path = copy_model(tiny(arch)[0], tmp_path / "m.gguf", more={name: np.ones((4, 64), np.float32)})
    with pytest.raises(ModelNotSupported, match=f"has the tensors '{name}', which training would leave out"):
        load_gguf(path)


def test_fused_projections_that_contradict_others(tiny: Tiny, tmp_path: Path) -> None:
    source, name = tiny("llama")[0], "blk.0.attn_qkv.weight"
    for rows, message in ((640, "it has 'blk.0.attn_q.weight' twice"), (639, r"'blk.0.attn_qkv.weight' is \[639, 64\]")):
        path = copy_model(source, tmp_path / "m.gguf", more={name: np.ones((rows, 64), np.float32)})
        with pytest.raises(ModelFileError, match=message):
            load_gguf(path)


def test_factors_of_frequencies(tiny: Tiny, tmp_path: Path) -> None:
    for arch, factors, kind, message in (
        ("llama", np.zeros(32), ModelFileError, "rope_freqs.weight must have positive numbers only"),
        ("llama", np.full(32, np.nan), ModelFileError, "rope_freqs.weight must have positive numbers only"),
        ("llama", np.ones(16), ModelFileError, r"'rope_freqs.weight' is \[16\]"),
        ("qwen3", np.ones(32), ModelNotSupported, "the tensors 'rope_freqs.weight'"),  # llama.cpp does not read it there
    ):
        path = copy_model(tiny(arch)[0], tmp_path / "m.gguf", more={"rope_freqs.weight": factors.astype(np.float32)})
        with pytest.raises(kind, match=message):
            load_gguf(path)


def test_numbers_that_the_dtype_cannot_hold(tiny: Tiny, tmp_path: Path) -> None:
    large = replaced("blk.0.attn_q.weight", f32(384, 64, value=1e5))
    path = copy_model(tiny("llama")[0], tmp_path / "m.gguf", tensor=large)
    assert load_gguf(path, torch.bfloat16).weights["blk.0.attn_q.weight"].max() > 9e4
    with pytest.raises(ModelFileError, match="'blk.0.attn_q.weight' has values that are not finite in torch.float16"):
        load_gguf(path, torch.float16)


def with_type(source: Path, target: Path, name: str, kind: int) -> Path:
    """A copy whose header gives a matrix another type."""
    data = bytearray(source.read_bytes())
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", data, at) == (0,)
    struct.pack_into("<I", data, at, kind)
    target.write_bytes(data)
    return target


def test_types(tiny: Tiny, tmp_path: Path) -> None:
    name, source = "blk.0.attn_q.weight", tiny("llama")[0]
    for kind, message in (
        (99, f"tensor '{name}' has type 99, which the installed package gguf does not know: update it"),
        (gguf.GGMLQuantizationType.Q8_1, f"tensor '{name}' has type Q8_1, which the installed package gguf cannot dequantise"),
        (gguf.GGMLQuantizationType.Q4_K, f"tensor '{name}' has rows of 64, no multiple of the 256 elements in a block of Q4_K"),
    ):
        with pytest.raises(ModelFileError, match=message):
            load_gguf(with_type(source, tmp_path / "m.gguf", name, kind))


def test_paths(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04")
    for path, message in (
        (tmp_path / "absent.gguf", "does not exist"), (other, "is not a GGUF model"), (tmp_path, "config.json does not exist"),
    ):  # fmt: skip
        with pytest.raises(ModelFileError, match=message):
            load_decoder(path)
    with pytest.raises(ModelFileError, match="is a folder"):
        load_gguf(tmp_path)


def test_truncated_files(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the first tensor is read."""

    def never(*args: Any) -> None:
        raise AssertionError("a tensor was read")

    data, path = tiny("llama")[0].read_bytes(), tmp_path / "m.gguf"
    monkeypatch.setattr(gguf_weights, "_load", never)
    for cut in (4, 20, 1000, len(data) // 4, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:cut])
        with pytest.raises(ModelFileError, match="truncated|damaged"):
            load_gguf(path)


def test_damaged_headers(tiny: Tiny, tmp_path: Path) -> None:
    """Wherever a byte is wrong, the answer is one of ours, and comes at once."""
    data = tiny("llama", n_vocab=262)[0].read_bytes()
    metadata = data.index(b"llama.context_length") - 8
    tensors = data.index(b"token_embd.weight") - 8
    end = data.index(b"output.weight") + 40
    rng, path, loaded = np.random.default_rng(0), tmp_path / "m.gguf", 0
    places = [*rng.integers(0, 200, 30), *rng.integers(metadata, metadata + 600, 60), *rng.integers(tensors, end, 160)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            load_gguf(path)
            loaded += 1
        except IndexMemError as error:
            assert "\n" not in str(error)
    assert loaded < len(places) / 2
