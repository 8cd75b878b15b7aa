"""Tiny models as Hugging Face has them: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tiny.config import TinyConfig, Weights

_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}, **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
}  # fmt: skip


def huggingface_weights(c: TinyConfig) -> Weights:
    """The weights by their Hugging Face names; those of queries and keys with halves of a head apart, not neighbours."""
    out = {}
    for name, w in c.weights.items():
        *layer, stem, kind = name.split(".")
        if c.arch == "llama" and stem in ("attn_q", "attn_k"):
            heads = c.n_head if stem == "attn_q" else c.n_head_kv
            w = w.reshape(heads, c.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        out[f"{prefix}{_NAMES[stem]}.{kind}"] = np.ascontiguousarray(w)
    return out


def huggingface_config(c: TinyConfig) -> dict[str, Any]:
    return {
        "model_type": c.arch, "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_head_kv, "head_dim": c.head_dim, "intermediate_size": c.n_ff, "hidden_act": "silu",
        "rms_norm_eps": c.eps, "rope_theta": c.rope_base, "max_position_embeddings": c.n_ctx_train,
        "vocab_size": c.n_vocab, "tie_word_embeddings": c.tied, "use_sliding_window": False, "sliding_window": 4096,
        "rope_scaling": None,
    }  # fmt: skip


def write_folder(folder: Path, c: TinyConfig, *, shards: int = 1, weights: Weights | None = None, **config: Any) -> Path:
    """Writes a model; `config` replaces what config.json would say, None takes it away."""
    folder.mkdir(exist_ok=True)
    raw = {key: value for key, value in (huggingface_config(c) | config).items() if value is not None}
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
