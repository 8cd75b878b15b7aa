"""The configuration of a Hugging Face model, config.json, as the metadata of its GGUF file would say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

from ...errors import ModelFileError, ModelNotSupported
from ...files.untrusted import quote, show
from .architectures import ARCHITECTURES, check_config, check_factors, unsupported
from .decoder import Config
from .rope import Rope, make_rope, still_pairs

FOLDERS = {  # model types, and what GGUF calls them
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "smollm3": "smollm3",
    "granite": "granite", "phi3": "phi3", "gemma": "gemma", "gemma3": "gemma3", "gemma3_text": "gemma3", "qwen2_vl": "qwen2vl",
    "qwen2_5_vl": "qwen2vl", "qwen3_vl": "qwen3vl",
}  # fmt: skip
_LEFT_OUT: dict[str, dict[str, Any]] = {  # what folders of these do not say where it is so
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma3": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 4096, "tie_word_embeddings": True,
    },
    "smollm3": {"tie_word_embeddings": True},
}  # fmt: skip
_GEMMA3_27B = 62  # layers; the one Gemma 3 whose queries are not scaled by the size of their heads
_MOST_LAYERS = 4096  # that lists are made of; more than there are tensors is refused later
_UNUSED_WINDOW = ("phi3",)  # which llama.cpp does not use
_FEATURES = {  # keys, the values that change nothing, and what any other value means
    "quantization_config": ((), "quantised weights"),
    "attn_logit_softcapping": ((0,), "a soft cap of attention logits"),
    "use_bidirectional_attention": ((False,), "attention that is not causal"),
    "norm_topk_prob": ((True,), "weights of experts that do not add up to 1"),
    "decoder_sparse_step": ((1,), "layers without experts among those that have them"),
    "mlp_only_layers": (([],), "layers without experts among those that have them"),
    "position_embedding_type": (("rope",), "positions that are not rotary"),
}


def text_settings(where: str, raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What GGUF calls the architecture, and what config.json says of the text model, defaults included.

    Raises:
        ModelFileError: it says of no model.
        ModelNotSupported: a model that training does not know, or not in a folder.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelFileError(f"{where}: config.json has no model_type: is it a language model?")
    if kind not in FOLDERS:
        raise ModelNotSupported(
            f"{where} has the architecture {quote(kind)}: folders are read of {', '.join(FOLDERS)} alone; name the GGUF file of "
            "this model"
        )
    text = raw.get("text_config") or {}
    if not isinstance(text, dict):
        raise ModelFileError(f"{where}: text_config in config.json must be an object, found {show(text)}")
    said = {key: value for key, value in {**raw, **text}.items() if value is not None}
    return FOLDERS[kind], _LEFT_OUT.get(FOLDERS[kind], {}) | said


def read_config(where: str, arch: str, raw: Mapping[str, Any], n_vocab: int, n_ctx: Optional[int] = None) -> Config:
    """
    Args:
        arch, raw: of `text_settings`.
        n_ctx: tokens of the context that it will run in, as of `load_gguf`.

    Raises:
        ModelFileError: something is missing or contradictory.
        ModelNotSupported: it computes what training does not.
    """
    read = _Reader(where, raw)
    known = ARCHITECTURES[arch]
    _refuse_features(where, arch, raw)
    n_head, n_embd, n_layer = read.count("num_attention_heads"), read.count("hidden_size"), read.count("num_hidden_layers")
    head_dim = read.count("head_dim", n_embd // n_head)
    trained = read.count("max_position_embeddings")
    experts, listed = "expert_count" in known.reads, min(n_layer, _MOST_LAYERS)
    config = Config(
        arch, n_layer, n_embd, n_head, read.count("num_key_value_heads", n_head), head_dim,
        read.count("moe_intermediate_size" if experts else "intermediate_size"), n_vocab, read.number("rms_norm_eps"), trained,
        _rope(where, raw, arch, head_dim, trained, n_ctx or trained), unrotated=_unrotated(read, arch, listed), gelu=known.gelu,
        n_expert=read.count("num_experts") if experts else 0, n_expert_used=read.count("num_experts_per_tok") if experts else 0,
        **_windows(read, listed, head_dim) if known.window_every else {},
        **_scales(read, arch, n_layer, n_embd, n_head, head_dim),
    )  # fmt: skip
    check_config(where, config)
    return config


def _refuse_features(where: str, arch: str, raw: Mapping[str, Any]) -> None:
    gelu = ARCHITECTURES[arch].gelu
    act = raw.get("hidden_activation") or raw.get("hidden_act") or ("gelu" if gelu else "silu")
    if act not in (("gelu", "gelu_pytorch_tanh") if gelu else ("silu", "swish")):  # what Gemma calls gelu is the other one
        raise unsupported(where, f"the activation {show(act)} instead of {'gelu_pytorch_tanh' if gelu else 'silu'}")
    for key, (neutral, meaning) in _FEATURES.items():
        if key in raw and raw[key] not in neutral:
            raise unsupported(where, f"{meaning} ({key} in config.json)")
    if "expert_count" in ARCHITECTURES[arch].reads and "norm_topk_prob" not in raw:
        raise unsupported(where, "weights of experts that do not add up to 1 (no norm_topk_prob in config.json)")
    if ARCHITECTURES[arch].window_every or arch in _UNUSED_WINDOW:
        return
    # qwen2, qwen3 and smollm3 name a window, and a switch that is usually off
    if raw.get("sliding_window") and raw.get("use_sliding_window", True):
        raise unsupported(where, "a sliding window")
    layers = raw.get("layer_types")
    if isinstance(layers, list) and any(layer != "full_attention" for layer in layers):
        raise unsupported(where, "layers without full attention (layer_types in config.json)")


def _unrotated(read: _Reader, arch: str, n_layer: int) -> tuple[int, ...]:
    step = ARCHITECTURES[arch].unrotated_every
    if step == 0:
        return ()
    rotated = [(il + 1) % step != 0 for il in range(n_layer)]
    for key, expected in (("no_rope_layers", [int(r) for r in rotated]), ("no_rope_layer_interval", step)):
        if read.raw.get(key, expected) != expected:
            raise unsupported(read.where, f"other layers without rotation than every {step}th ({key} in config.json)")
    return tuple(il for il in range(n_layer) if not rotated[il])


def _windows(read: _Reader, n_layer: int, head_dim: int) -> dict[str, Any]:
    """Which layers have a sliding window, of how many tokens, and their rotation, which is not stretched."""
    layers = read.raw.get("layer_types")
    if layers is None:
        every = read.count("sliding_window_pattern", 6)
        layers = ["full_attention" if (il + 1) % every == 0 else "sliding_attention" for il in range(n_layer)]
    if not isinstance(layers, list) or len(layers) != n_layer or not set(layers) <= {"full_attention", "sliding_attention"}:
        raise ModelFileError(f"{read.where}: layer_types in config.json must name the attention of each layer, found {show(layers)}")
    by_kind = read.raw.get("rope_parameters") or {}
    local = by_kind.get("sliding_attention") if isinstance(by_kind, dict) else None
    base = _Reader(read.where, local).number("rope_theta", 1e4) if isinstance(local, dict) else read.number("rope_local_base_freq", 1e4)
    return {
        "window": read.count("sliding_window"),
        "windowed": tuple(il for il, kind in enumerate(layers) if kind != "full_attention"),
        "window_rope": make_rope(base=base, n_dim=head_dim, interleaved=False),
    }


def _scales(read: _Reader, arch: str, n_layer: int, n_embd: int, n_head: int, head_dim: int) -> dict[str, Any]:
    """Every factor that is not 1, and every cap."""
    if arch == "granite":
        return {
            "attention_scale": read.number("attention_multiplier"), "embedding_scale": read.number("embedding_multiplier", 1.0),
            "residual_scale": read.number("residual_multiplier", 1.0), "logit_scale": read.number("logits_scaling", 1.0),
        }  # fmt: skip
    scales: dict[str, Any] = {"embedding_scale": math.sqrt(n_embd)} if ARCHITECTURES[arch].scaled_embedding else {}
    if arch == "gemma3":
        of = n_embd // n_head if n_layer == _GEMMA3_27B else head_dim
        if read.number("query_pre_attn_scalar", of) != of:
            raise unsupported(read.where, "a scale of attention of its own (query_pre_attn_scalar in config.json)")
        scales |= {"attention_scale": of**-0.5} if n_layer == _GEMMA3_27B else {}
        scales["logit_softcap"] = read.number("final_logit_softcapping", 0.0) if "final_logit_softcapping" in read.raw else 0.0
    return scales


def _rope(where: str, raw: Mapping[str, Any], arch: str, head_dim: int, trained: int, n_ctx: int) -> Rope:
    """`rope_parameters` of newer files has what `rope_theta` and `rope_scaling` have in older ones; where layers differ, of
    each of their kinds.

    Like the library, which does not read them from the GGUF files of these architectures either, this leaves out betas
    and attention factors of YaRN.
    """
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if isinstance(parameters, dict):
        parameters = parameters.get("full_attention", parameters)
    if not isinstance(parameters, dict):
        raise ModelFileError(f"{where}: rope_scaling in config.json must be an object, found {show(parameters)}")
    outside = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    read = _Reader(where, outside | parameters)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    known = ARCHITECTURES[arch]
    rope: dict[str, Any] = {
        "base": read.number("rope_theta", 10000.0), "n_dim": int(head_dim * read.number("partial_rotary_factor", 1.0)),
        "interleaved": known.interleaved, "still": _still(read, arch, head_dim),
    }  # fmt: skip
    if kind == "default" or (kind == "mrope" and known.sections):
        return make_rope(**rope)
    if kind in ("linear", "yarn"):
        n_ctx_orig = read.count("original_max_position_embeddings", trained)
        return make_rope(**rope, kind=kind, factor=read.number("factor"), n_ctx_orig=n_ctx_orig)
    if kind == "llama3" and known.rope_factors and not known.long_factors:
        return make_rope(**rope, factors=_llama3_factors(read, rope["base"], rope["n_dim"]))
    if kind in ("longrope", "su") and known.long_factors:
        return make_rope(**rope, **_long_factors(read, raw, rope["n_dim"] // 2, trained, n_ctx))
    raise unsupported(where, f"rope scaling {quote(str(kind))}")


def _still(read: _Reader, arch: str, head_dim: int) -> tuple[int, ...]:
    """Pairs that text does not turn."""
    how = ARCHITECTURES[arch].sections
    if not how:
        return ()
    sections = read.raw.get("mrope_section")
    if (
        not isinstance(sections, list)
        or len(sections) != 3
        or not all(isinstance(n, int) and n >= 0 for n in sections)
        or not 0 < sum(sections) <= head_dim
    ):
        raise ModelFileError(f"{read.where}: mrope_section in config.json must be three numbers of pairs, found {show(sections)}")
    if read.raw.get("mrope_interleaved", how == "turns") != (how == "turns"):
        raise unsupported(read.where, "another order of the dimensions of positions (mrope_interleaved in config.json)")
    return still_pairs([*sections, 0], head_dim // 2, interleaved=how == "turns")


def _long_factors(read: _Reader, raw: Mapping[str, Any], n: int, trained: int, n_ctx: int) -> dict[str, Any]:
    """Divisors for texts as long as the context, and a magnitude that follows from how far the model was stretched."""
    original = _Reader(read.where, dict(raw) | dict(read.raw)).count("original_max_position_embeddings", trained)
    name = "long_factor" if n_ctx > original else "short_factor"
    values = read.raw.get(name)
    if not isinstance(values, list) or len(values) != n or not all(isinstance(v, (int, float)) for v in values):
        raise ModelFileError(f"{read.where}: {name} in config.json must be {n} numbers, found {show(values)}")
    stretched = trained / original
    return {
        "factors": check_factors(read.where, f"{name} in config.json", map(float, values)),
        "attn_factor": math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0,
    }


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
