"""Tiny models as Hugging Face has them: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tiny.config import TinyConfig, Weights
from tiny.trained import EXPERT_FF, EXPERTS, EXPERTS_USED

MODEL_TYPES = {"qwen3moe": "qwen3_moe", "qwen2vl": "qwen2_vl", "qwen3vl": "qwen3_vl", "gemma3": "gemma3_text"}

_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}, **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
}  # fmt: skip
_NAMES_OF = {
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "qwen3moe": {"ffn_gate_inp": "mlp.gate"},
}  # fmt: skip


def huggingface_weights(c: TinyConfig) -> Weights:
    """The weights by their Hugging Face names; those of queries and keys with halves of a head apart, not neighbours."""
    out = {}
    for name, w in c.weights.items():
        *layer, stem, kind = name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        if stem.endswith("_exps"):
            stem = stem.removeprefix("ffn_").removesuffix("_exps")
            out |= {f"{prefix}mlp.experts.{i}.{stem}_proj.{kind}": np.ascontiguousarray(part) for i, part in enumerate(w)}
            continue
        if stem.startswith("rope_factors"):
            continue
        if c.arch.startswith("gemma") and stem.endswith("norm"):
            w = w.astype(np.float64) - 1
        if not c.rope_neox and stem in ("attn_q", "attn_k"):
            heads = c.n_head if stem == "attn_q" else c.n_head_kv
            w = w.reshape(heads, c.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
        out[f"{prefix}{(_NAMES | _NAMES_OF.get(c.arch, {}))[stem]}.{kind}"] = np.ascontiguousarray(w)
    return out


def huggingface_config(c: TinyConfig) -> dict[str, Any]:
    common = {
        "model_type": MODEL_TYPES.get(c.arch, c.arch), "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_head_kv, "head_dim": c.head_dim,
        "intermediate_size": c.n_ff, "hidden_act": "gelu_pytorch_tanh" if c.gelu else "silu", "rms_norm_eps": c.eps,
        "rope_theta": c.rope_base, "max_position_embeddings": c.n_ctx_train, "vocab_size": c.n_vocab,
        "tie_word_embeddings": c.tied, "use_sliding_window": False, "sliding_window": 4096, "rope_scaling": None,
    }  # fmt: skip
    own = _CONFIGS.get(c.arch)
    return common | (own(c) if own else {})


def _gemma3(c: TinyConfig) -> dict[str, Any]:
    kinds = ["full_attention" if il in c.full_layers else "sliding_attention" for il in range(c.n_layer)]
    return {
        "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": c.sliding_window, "layer_types": kinds,
        "rope_local_base_freq": c.rope_base / 100, "query_pre_attn_scalar": c.head_dim, "attn_logit_softcapping": None,
    }  # fmt: skip


def _granite(c: TinyConfig) -> dict[str, Any]:
    return {
        "attention_multiplier": c.attention_scale, "embedding_multiplier": c.embedding_scale,
        "residual_multiplier": c.residual_scale, "logits_scaling": c.logit_scale, "sliding_window": None,
    }  # fmt: skip


def _phi3(c: TinyConfig) -> dict[str, Any]:
    factors = {f"{name}_factor": c.weights[f"rope_factors_{name}.weight"].tolist() for name in ("long", "short") if c.long_factors}
    return {
        "sliding_window": 262144, "use_sliding_window": None, "partial_rotary_factor": c.n_rot / c.head_dim,
        "original_max_position_embeddings": c.n_ctx_orig or c.n_ctx_train,
        "rope_scaling": {"type": "longrope", **factors} if factors else None,
    }  # fmt: skip


def _qwen3moe(c: TinyConfig) -> dict[str, Any]:
    return {
        "num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_USED, "moe_intermediate_size": EXPERT_FF, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


def _smollm3(c: TinyConfig) -> dict[str, Any]:
    return {"no_rope_layers": [int(c.has_rope(il)) for il in range(c.n_layer)], "no_rope_layer_interval": c.nope_step}


def _mrope(c: TinyConfig) -> dict[str, Any]:
    n = c.n_rot // 2
    turns = {"mrope_interleaved": True} if c.arch == "qwen3vl" else {}
    return {"rope_scaling": {"type": "mrope", "mrope_section": [n - 2 * (n // 3), n // 3, n // 3], **turns}}


_CONFIGS: dict[str, Callable[[TinyConfig], dict[str, Any]]] = {
    "gemma3": _gemma3, "granite": _granite, "phi3": _phi3, "qwen3moe": _qwen3moe, "smollm3": _smollm3, "qwen2vl": _mrope,
    "qwen3vl": _mrope,
}  # fmt: skip


def with_images(c: TinyConfig) -> tuple[dict[str, Any], Weights]:
    """Configuration and weights as models have them that look at images as well: the text model lies inside."""
    config, weights = huggingface_config(c), huggingface_weights(c)
    outside = {key: config.pop(key) for key in ("model_type", "tie_word_embeddings")}
    weights = {name.replace("model.", "model.language_model.", 1): w for name, w in weights.items()}
    weights["model.visual.patch_embed.proj.weight"] = np.ones((4, 3), np.float32)
    return outside | {"text_config": config, "vision_config": {"depth": 1}}, weights


def write_folder(
    folder: Path, c: TinyConfig, *, shards: int = 1, weights: Weights | None = None, only: dict[str, Any] | None = None, **config: Any
) -> Path:
    """Writes a model; `config` replaces what config.json would say, None takes it away; `only`: all that it says."""
    folder.mkdir(exist_ok=True)
    raw = {key: value for key, value in ((huggingface_config(c) if only is None else only) | config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    weights = huggingface_weights(c) if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({name: w for name, w in weights.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return folder
