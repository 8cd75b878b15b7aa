"""The configuration of a decoder from the metadata of its GGUF file, read as llama.cpp reads them."""

from __future__ import annotations

import math
from typing import Any, Optional

import numpy as np

from ...errors import ModelFileError
from ...files.gguffile import GGUFFile
from ...files.untrusted import quote
from .architectures import (
    ARCHITECTURES,
    LONG_FACTORS,
    LONGROPE,
    SHORT_FACTORS,
    architecture,
    check_config,
    check_tensors,
    factor_names,
    unsupported,
)
from .decoder import Config
from .rope import make_rope, still_pairs

_INTEGERS = ("u16", "u32", "i32", "u64")
_FLOATS = ("f32", "f64")
_SCALINGS = ("none", "linear", "yarn", LONGROPE)
_GEMMA3_27B = 62  # layers; the one Gemma 3 whose queries are not scaled by the size of their heads
_FEATURES = {  # keys, the values that change nothing, and what any other value means where an architecture does not read it
    "expert_count": ((0,), "expert layers"),
    "expert_group_count": ((0, 1), "groups of experts"),
    "attention.sliding_window": ((0,), "a sliding window"),
    "attn_logit_softcapping": ((0,), "a soft cap of attention logits"),
    "final_logit_softcapping": ((0,), "a soft cap of logits"),
    "attention.clamp_kqv": ((0,), "clamped queries, keys and values"),
    "attention.max_alibi_bias": ((0,), "ALiBi"),
    "attention.causal": ((True,), "attention that is not causal"),
    "logit_scale": ((0, 1), "a scale of logits"),
    "embedding_scale": ((0, 1), "a scale of embeddings"),
    "residual_scale": ((0, 1), "a scale of residuals"),
    "nextn_predict_layers": ((0,), "layers that predict further tokens"),
    "deepstack_mapping": ((), "image features that are added in its layers"),
}


def read_config(where: str, file: GGUFFile) -> Config:
    """
    Raises:
        ModelFileError: something is missing or contradictory.
        ModelNotSupported: it is fine, but nothing that training knows.
    """
    if file.get("general.type", "string") not in (None, "model"):
        raise ModelFileError(f"{where} is no model: its general.type is {quote(file.get('general.type', 'string'))}")
    if (file.get("split.count", *_INTEGERS) or 1) > 1:
        raise ModelFileError(f"{where} is one part of a split model: merge the parts with llama-gguf-split --merge")
    arch = file.get("general.architecture", "string")
    if arch is None:
        raise ModelFileError(f"{where} has no general.architecture: is it a language model?")
    known = architecture(where, arch)
    for key, (neutral, meaning) in _FEATURES.items():
        value = file.metadata.get(f"{arch}.{key}")
        if value is not None and key not in known.reads and (value.type.endswith("array") or value.value not in neutral):
            raise unsupported(where, f"{meaning} ({arch}.{key})")

    read = _Metadata(where, file, arch)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.dims) != 2:
        raise ModelFileError(f"{where} lacks the matrix token_embd.weight: is it a language model?")
    n_head, n_embd = read.count("attention.head_count"), read.count("embedding_length")
    head_dim = read.count("attention.key_length", n_embd // n_head)
    if read.count("attention.value_length", n_embd // n_head) != head_dim:
        raise unsupported(where, "values of another length than keys")
    n_layer = read.count("block_count")
    rope: dict[str, Any] = {
        "n_dim": read.count("rope.dimension_count", head_dim), "interleaved": known.interleaved,
        "kind": _scaling(read), "attn_factor": read.number("rope.scaling.attn_factor", 1.0),
        "n_ctx_orig": original_length(file, arch), "still": _still(read, head_dim),
    }  # fmt: skip
    factor = read.number("rope.scaling.factor", read.number("rope.scale_linear", 0.0))  # the second is its old name
    config = Config(
        arch, n_layer, n_embd, n_head, read.count("attention.head_count_kv", n_head), head_dim,
        _feed_forward_length(read), embedding.dims[1], read.number("attention.layer_norm_rms_epsilon"),
        read.count("context_length"), make_rope(base=read.number("rope.freq_base", 10000.0), factor=factor, **rope),
        unrotated=_unrotated(read, n_layer), gelu=known.gelu, **_windows(read, n_layer, head_dim, rope), **_experts(read),
        **_scales(read, n_layer, n_embd, n_head, head_dim),
    )  # fmt: skip
    check_config(where, config)
    shapes = {name: info.dims[::-1] for name, info in file.tensors.items()}
    check_tensors(where, config, shapes, factor_names(arch, rope["kind"]))
    return config


def factors_for(file: GGUFFile, arch: str, n_ctx: Optional[int]) -> Optional[str]:
    """The tensor with the divisors of rotary frequencies that llama.cpp uses in a context of n_ctx tokens, if there is one.

    None stands for the length that the model was trained for: so far reach the positions of a bounded cache, however
    long the text.
    """
    names = factor_names(arch, file.get(f"{arch}.rope.scaling.type", "string") or "linear")
    if LONG_FACTORS in names:
        n_ctx = n_ctx or file.get(f"{arch}.context_length", *_INTEGERS)
        names = (LONG_FACTORS if n_ctx > original_length(file, arch) else SHORT_FACTORS,)
    return next((name for name in names if name in file.tensors), None)


def original_length(file: GGUFFile, arch: str) -> int:
    """Tokens that the model was trained for before its positions were stretched."""
    found = file.get(f"{arch}.rope.scaling.original_context_length", *_INTEGERS)
    return int(found or file.get(f"{arch}.context_length", *_INTEGERS) or 0)


class _Metadata:
    """Numbers of one architecture. Without a default they must be there."""

    def __init__(self, where: str, file: GGUFFile, arch: str) -> None:
        self.where, self.file, self.arch = where, file, arch

    def count(self, key: str, default: Optional[int] = None) -> int:
        """A positive integer; lists, one value for each layer, must agree."""
        value: Any = self.file.get(f"{self.arch}.{key}", *_INTEGERS, *(f"{t} array" for t in _INTEGERS))
        if isinstance(value, (list, np.ndarray)):
            if len(set(value)) != 1:
                raise unsupported(self.where, f"{self.arch}.{key} that differs between layers")
            value = value[0]
        value = self._found(key, value, default)
        if not 0 < value < 1 << 31:
            raise ModelFileError(f"{self.where} is damaged: {self.arch}.{key} is {value}")
        return int(value)

    def number(self, key: str, default: Optional[float] = None) -> float:
        """A finite number that is not negative."""
        value = self._found(key, self.file.get(f"{self.arch}.{key}", *_FLOATS), default)
        if not 0 <= value < math.inf:
            raise ModelFileError(f"{self.where} is damaged: {self.arch}.{key} is {value}")
        return float(value)

    def whole(self, key: str, default: int = 0) -> int:
        """An integer that may be 0."""
        value = self._found(key, self.get(key, *_INTEGERS), default)
        if value < 0:
            raise ModelFileError(f"{self.where} is damaged: {self.arch}.{key} is {value}")
        return int(value)

    def get(self, key: str, *types: str) -> Any:
        """The value as it is, None if it is not there."""
        return self.file.get(f"{self.arch}.{key}", *types)

    def _found(self, key: str, value: Any, default: Any) -> Any:
        if value is None and default is None:
            raise ModelFileError(f"{self.where} has no {self.arch}.{key}: is it a language model with attention?")
        return default if value is None else value


def _scaling(read: _Metadata) -> str:
    kind: str = read.get("rope.scaling.type", "string") or "linear"
    if kind not in _SCALINGS:
        raise unsupported(read.where, f"rope scaling {quote(kind)}")
    return kind


def _still(read: _Metadata, head_dim: int) -> tuple[int, ...]:
    """Pairs that text does not turn."""
    how, key = ARCHITECTURES[read.arch].sections, "rope.dimension_sections"
    if not how:
        return ()
    found = read.get(key, *(f"{t} array" for t in _INTEGERS))
    if found is None:
        raise ModelFileError(f"{read.where} has no {read.arch}.{key}: is it a language model with attention?")
    sections = [int(n) for n in found][:4]
    if len(sections) < 3 or min(sections) < 0 or not 0 < sum(sections) <= head_dim:
        raise ModelFileError(f"{read.where} is damaged: {read.arch}.{key} is {sections}")
    return still_pairs([*sections, 0][:4], head_dim // 2, interleaved=how == "turns")


def _feed_forward_length(read: _Metadata) -> int:
    """Of an expert where there are several."""
    if "expert_count" not in ARCHITECTURES[read.arch].reads:
        return read.count("feed_forward_length")
    if read.get("expert_feed_forward_length", *_INTEGERS, *(f"{t} array" for t in _INTEGERS)):
        return read.count("expert_feed_forward_length")
    return read.count("feed_forward_length") // read.count("expert_used_count")


def _experts(read: _Metadata) -> dict[str, Any]:
    if "expert_count" not in ARCHITECTURES[read.arch].reads:
        return {}
    return {"n_expert": read.count("expert_count"), "n_expert_used": read.count("expert_used_count")}


def _unrotated(read: _Metadata, n_layer: int) -> tuple[int, ...]:
    if read.arch == "granite" and read.get("rope.scaling.finetuned", "bool") is False:  # there it is a switch
        return tuple(range(n_layer))
    step = ARCHITECTURES[read.arch].unrotated_every
    return tuple(il for il in range(n_layer) if step and (il + 1) % step == 0)


def _windows(read: _Metadata, n_layer: int, head_dim: int, rope: dict[str, Any]) -> dict[str, Any]:
    """Which layers have a sliding window, of how many tokens, and their rotation, which is not stretched."""
    every = ARCHITECTURES[read.arch].window_every
    window = read.whole("attention.sliding_window") if every else 0
    if window == 0:
        return {}
    for key, expected in (
        ("attention.key_length_swa", head_dim), ("attention.value_length_swa", head_dim),
        ("rope.dimension_count_swa", rope["n_dim"]),
    ):  # fmt: skip
        if read.count(key, expected) != expected:
            raise unsupported(read.where, f"heads of another kind in its window layers ({read.arch}.{key})")
    key = "attention.sliding_window_pattern"
    pattern = read.get(key, *_INTEGERS, "u32 array", "i32 array", "bool array")
    if isinstance(pattern, (list, np.ndarray)):
        layers = [il for il in range(n_layer) if il < len(pattern) and pattern[il]]
    else:
        every = read.whole(key, every)
        layers = [il for il in range(n_layer) if every == 0 or il % every < every - 1]
    base = read.number("rope.freq_base_swa", 10000.0)
    return {"window": window, "windowed": tuple(layers), "window_rope": make_rope(base=base, **rope)}


def _scales(read: _Metadata, n_layer: int, n_embd: int, n_head: int, head_dim: int) -> dict[str, Any]:
    """Every factor that is not 1, and every cap."""
    known, scales = ARCHITECTURES[read.arch], dict[str, Any]()
    if known.scaled_embedding:
        scales["embedding_scale"] = math.sqrt(n_embd)
    if read.arch == "gemma3" and n_layer == _GEMMA3_27B:
        scales["attention_scale"] = (n_embd // n_head) ** -0.5
    if "final_logit_softcapping" in known.reads:
        scales["logit_softcap"] = read.number("final_logit_softcapping", 0.0)
    if "logit_scale" in known.reads:
        scales["logit_scale"] = read.number("logit_scale")
        if scales["logit_scale"] == 0:
            raise ModelFileError(f"{read.where} is damaged: {read.arch}.logit_scale is 0, and logits are divided by it")
        scales["attention_scale"] = read.number("attention.scale", 0.0)
        for name in ("embedding_scale", "residual_scale"):
            scales[name] = read.number(name, 0.0) or 1.0  # 0 stands for none
    elif (scale := read.number("attention.scale", 0.0)) and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise unsupported(read.where, f"a scale of attention of its own ({read.arch}.attention.scale)")
    return scales
