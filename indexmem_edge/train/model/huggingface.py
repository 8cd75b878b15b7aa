"""The configuration of a Hugging Face model, config.json, as the metadata of its GGUF file would say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

from ...errors import ModelFileError, ModelNotSupported
from ...files.untrusted import quote, show
from .architectures import ARCHITECTURES, check_config, unsupported
from .decoder import Config
from .rope import Rope, make_rope

FOLDERS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model types, and what GGUF calls them


def read_config(where: str, raw: Mapping[str, Any], n_vocab: int) -> Config:
    """
    Raises:
        ModelFileError: something is missing or contradictory.
        ModelNotSupported: a model that training does not know.
    """
    read = _Reader(where, raw)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelFileError(f"{where}: config.json has no model_type: is it a language model?")
    if kind not in FOLDERS:
        raise ModelNotSupported(
            f"{where} has the architecture {quote(kind)}: folders are read of {', '.join(FOLDERS)} alone; name the GGUF file of "
            "this model"
        )
    arch = FOLDERS[kind]
    _refuse_features(where, raw)
    n_head, n_embd = read.count("num_attention_heads"), read.count("hidden_size")
    head_dim = read.count("head_dim", n_embd // n_head)
    n_ctx = read.count("max_position_embeddings")
    rope = _rope(where, raw, arch, head_dim, n_ctx)
    config = Config(
        arch, read.count("num_hidden_layers"), n_embd, n_head, read.count("num_key_value_heads", n_head), head_dim,
        read.count("intermediate_size"), n_vocab, read.number("rms_norm_eps"), n_ctx, rope,
    )  # fmt: skip
    check_config(where, config)
    return config


def _refuse_features(where: str, raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise unsupported(where, f"the activation {show(raw['hidden_act'])} instead of silu")
    if "quantization_config" in raw:
        raise unsupported(where, "quantised weights (quantization_config in config.json)")
    # qwen2 and qwen3 name a window, and a switch that is usually off
    if raw.get("sliding_window") and raw.get("use_sliding_window", True):
        raise unsupported(where, "a sliding window")
    layers = raw.get("layer_types")
    if isinstance(layers, list) and any(layer != "full_attention" for layer in layers):
        raise unsupported(where, "layers without full attention (layer_types in config.json)")


def _rope(where: str, raw: Mapping[str, Any], arch: str, head_dim: int, n_ctx: int) -> Rope:
    """`rope_parameters` of newer files has what `rope_theta` and `rope_scaling` have in older ones.

    Like the library, which does not read them from the GGUF files of these architectures either, this leaves out betas
    and attention factors of YaRN.
    """
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelFileError(f"{where}: rope_scaling in config.json must be an object, found {show(parameters)}")
    outside = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    read = _Reader(where, outside | parameters)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    known = ARCHITECTURES[arch]
    base, n_dim = read.number("rope_theta", 10000.0), int(head_dim * read.number("partial_rotary_factor", 1.0))
    if kind == "default":
        return make_rope(base=base, n_dim=n_dim, interleaved=known.interleaved)
    if kind in ("linear", "yarn"):
        return make_rope(
            base=base, n_dim=n_dim, interleaved=known.interleaved, kind=kind, factor=read.number("factor"),
            n_ctx_orig=read.count("original_max_position_embeddings", n_ctx),
        )  # fmt: skip
    if kind == "llama3" and known.rope_factors:
        factors = _llama3_factors(read, base, n_dim)
        return make_rope(base=base, n_dim=n_dim, interleaved=known.interleaved, factors=factors)
    raise unsupported(where, f"rope scaling {quote(str(kind))}")


def _llama3_factors(read: _Reader, base: float, n_dim: int) -> tuple[float, ...]:
    """Divisors as converters write them to rope_freqs.weight: 1 for short waves, `factor` for long ones, else between."""
    factor = read.number("factor", 8.0)
    low, high = read.number("low_freq_factor", 1.0), read.number("high_freq_factor", 4.0)
    n_ctx = read.count("original_max_position_embeddings", 8192)
    if factor < 1 or not low < high:
        raise ModelFileError(f"{read.where}: the numbers of rope scaling in config.json contradict each other")
    factors = []
    for i in range(0, n_dim, 2):
        turns = n_ctx / (2 * math.pi * base ** (i / n_dim))  # of this pair within the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


class _Reader:
    """Numbers of config.json. Without a default they must be there; null stands for not there."""

    def __init__(self, where: str, raw: Mapping[str, Any]) -> None:
        self.where, self.raw = where, raw

    def count(self, key: str, default: Optional[int] = None) -> int:
        """A positive integer."""
        value = self._found(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise ModelFileError(f"{self.where}: {key} in config.json must be a positive integer, found {show(value)}")
        return value

    def number(self, key: str, default: Optional[float] = None) -> float:
        """A positive, finite number."""
        value = self._found(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ModelFileError(f"{self.where}: {key} in config.json must be a positive number, found {show(value)}")
        return float(value)

    def _found(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise ModelFileError(f"{self.where}: config.json has no {key}: is it a language model with attention?")
            return default
        return value
