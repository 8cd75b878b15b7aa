"""Tiny models whose layers attend to a window of the text, but for some that attend to all of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiny.config import Draw, TinyConfig, Weights, attention_metadata
from tiny.layers import N_EXPERT, assemble, attention, expert_metadata, experts, feed_forward, norms

Model = tuple[dict[str, Any], Weights]
_POST = ("post_attention_norm", "post_ffw_norm")
N_ALTUP, LAUREL_RANK, N_EMBD_ALTUP = 4, 64, 256  # of gemma3n, whose files cannot say them
N_PER_LAYER = 16  # of gemma4


def _behind_gain(c: TinyConfig) -> float:
    """Of what a layer adds: small in deep models, which would make rounding errors grow."""
    return min(1.0, 2 / c.n_layer**0.5)


def _metadata(c: TinyConfig) -> dict[str, Any]:
    return attention_metadata(c) | {
        "attention.sliding_window_pattern": [il not in c.full_layers for il in range(c.n_layer)],
    }  # fmt: skip


def _gemma(c: TinyConfig, draw: Draw) -> Model:
    """Gemma 2 and 3: norms in front and behind; the third has two rotary bases."""
    third = c.arch == "gemma3"
    meta = _metadata(c) | ({"rope.freq_base_swa": c.rope_base / 100} if third else {})
    layers = [
        norms(c, draw, "attn_norm", "ffn_norm", *_POST)
        | attention(c, draw, qk_norm="head" if third else "")
        | feed_forward(c, draw)
        for _ in range(c.n_layer)
    ]
    return meta, assemble(c, draw, layers)


def _behind(c: TinyConfig, draw: Draw) -> Model:
    """Norms behind alone: OLMo 2 and 3 (whose full layers have YaRN, and the others not), EXAONE 4 (which rotates in
    window layers alone)."""
    layers = [
        norms(c, draw, *_POST, gain=_behind_gain(c))
        | attention(c, draw, qk_norm="all" if c.arch == "olmo2" else "head")
        | feed_forward(c, draw)
        for _ in range(c.n_layer)
    ]
    return _metadata(c), assemble(c, draw, layers)


def _cohere2(c: TinyConfig, draw: Draw) -> Model:
    """Attention and feed-forward side by side; no rotation in full layers."""
    meta = _metadata(c) | {"logit_scale": 1.0, "attention.layer_norm_epsilon": c.eps}
    layers = [norms(c, draw, "attn_norm") | attention(c, draw) | feed_forward(c, draw) for _ in range(c.n_layer)]
    return meta, assemble(c, draw, layers)


def _gpt_oss(c: TinyConfig, draw: Draw) -> Model:
    """A logit per head that takes part in the softmax, and stands for nothing."""
    meta = _metadata(c) | expert_metadata(c)
    layers = []
    for _ in range(c.n_layer):
        layer = norms(c, draw, "attn_norm", "post_attention_norm") | attention(c, draw) | experts(c, draw)
        sizes = {
            name: layer[name].shape[:-1]
            for name in layer
            if name.startswith(("attn_o", "attn_q", "attn_k", "attn_v", "ffn"))
        }
        layer |= {f"{name}.bias": draw.normal(*shape, std=0.3) for name, shape in sizes.items()}
        layers.append(layer | {"attn_sinks": draw.normal(c.n_head) + 2})
    return meta, assemble(c, draw, layers)


def _mimo2(c: TinyConfig, draw: Draw) -> Model:
    """Sinks in some layers; values are shorter than keys, of which a part is rotated."""
    value_dim = c.head_dim // 2
    meta = _metadata(c) | {
        "attention.value_length": value_dim, "rope.freq_base_swa": c.rope_base / 100, "attention.value_scale": 1.5,
        "expert_feed_forward_length": c.n_ff,
    }  # fmt: skip
    layers = []
    for il in range(c.n_layer):
        layer = (
            norms(c, draw, "attn_norm", "ffn_norm") | attention(c, draw, value_dim=value_dim) | feed_forward(c, draw)
        )
        layers.append(layer | ({"attn_sinks": draw.normal(c.n_head) + 2} if il < 2 else {}))
    return meta, assemble(c, draw, layers)


def _afmoe(c: TinyConfig, draw: Draw) -> Model:
    """Norms on both sides, and a gate of what attention gives; every fourth layer is not rotated."""
    meta = _metadata(c) | {
        "leading_dense_block_count": c.n_layer, "expert_feed_forward_length": c.n_ff, "expert_shared_count": 0,
    }  # fmt: skip
    layers = [
        norms(c, draw, "attn_norm", "ffn_norm", *_POST)
        | attention(c, draw, qk_norm="head")
        | {"attn_gate": draw.matrix(c.n_head * c.head_dim, c.n_embd)}
        | feed_forward(c, draw)
        for _ in range(c.n_layer)
    ]
    return meta, assemble(c, draw, layers)


def _step35(c: TinyConfig, draw: Draw) -> Model:
    """Full layers rotate half of what window layers rotate, in another base; a gate for each head."""
    meta = _metadata(c) | {"rope.freq_base_swa": c.rope_base / 100, "expert_feed_forward_length": c.n_ff}
    layers = [
        norms(c, draw, "attn_norm", "ffn_norm")
        | attention(c, draw, qk_norm="head")
        | {"attn_gate": draw.matrix(c.n_head, c.n_embd)}
        | feed_forward(c, draw)
        for _ in range(c.n_layer)
    ]
    return meta, assemble(c, draw, layers)


def _llama4(c: TinyConfig, draw: Draw) -> Model:
    """Chunks of 8192 tokens, whatever the file says; full layers are not rotated; their scores grow with positions."""
    meta = _metadata(c) | expert_metadata(c) | {"interleave_moe_layer_step": 2}
    layers = []
    for il in range(c.n_layer):
        part = experts(c, draw, shared=True) if il % 2 else feed_forward(c, draw)
        layers.append(norms(c, draw, "attn_norm", "ffn_norm") | attention(c, draw) | part)
    return meta, assemble(c, draw, layers)


def _exaone_moe(c: TinyConfig, draw: Draw) -> Model:
    """As EXAONE 4, with norms in front, and experts in all layers but the first."""
    meta = _metadata(c) | expert_metadata(c) | {
        "leading_dense_block_count": 1, "expert_shared_count": 1, "expert_gating_func": 2,
    }  # fmt: skip
    layers = []
    for il in range(c.n_layer):
        part = experts(c, draw, shared=True) | {"exp_probs_b.bias": draw.normal(N_EXPERT, std=0.1)} if il else feed_forward(c, draw)
        layers.append(norms(c, draw, "attn_norm", "ffn_norm") | attention(c, draw, qk_norm="head") | part)
    return meta, assemble(c, draw, layers)


def _granite_swa(c: TinyConfig, draw: Draw) -> Model:
    """Granite with sinks in all layers, of which the file says what is rotated: here all but the last."""
    meta = _metadata(c) | {k: getattr(c, k) for k in ("embedding_scale", "residual_scale", "logit_scale")}
    meta |= {"attention.scale": c.scale, "attention.rope_pattern": [int(il + 1 < c.n_layer) for il in range(c.n_layer)]}
    layers = [
        norms(c, draw, "attn_norm", "ffn_norm")
        | attention(c, draw)
        | {"attn_sinks": draw.normal(c.n_head) + 2}
        | feed_forward(c, draw)
        for _ in range(c.n_layer)
    ]
    return meta, assemble(c, draw, layers)


def _gemma3n(c: TinyConfig, draw: Draw) -> Model:
    """Layers from the 21st on read what the 20th (full) and the 19th (window) have cached."""
    meta = _metadata(c) | {"rope.freq_base_swa": c.rope_base / 100}
    layers = []
    for _ in range(c.n_layer):
        layer = norms(c, draw, "attn_norm", "ffn_norm", "altup_router_norm")
        layer |= norms(c, draw, *_POST, "post_norm", "laurel_post_norm", gain=_behind_gain(c))
        layer |= attention(c, draw, qk_norm="head") | feed_forward(c, draw)
        layer |= {
            "inp_gate": draw.matrix(N_EMBD_ALTUP, c.n_embd), "proj": draw.matrix(c.n_embd, N_EMBD_ALTUP),
            "altup_correct_coef": draw.matrix(N_ALTUP, N_ALTUP, 0.1), "altup_correct_scale": draw.norm(c.n_embd),
            "altup_predict_coef": draw.matrix(N_ALTUP**2, N_ALTUP, 0.1),
            "altup_router": draw.normal(N_ALTUP, c.n_embd, std=8),
            "laurel_l": draw.matrix(LAUREL_RANK, c.n_embd), "laurel_r": draw.matrix(c.n_embd, LAUREL_RANK),
        }  # fmt: skip
        layers.append(layer)
    return meta, assemble(c, draw, layers) | {
        "altup_proj.weight": np.stack([draw.matrix(c.n_embd, c.n_embd) for _ in range(N_ALTUP - 1)]),
        "altup_unembd_proj.weight": np.stack([draw.matrix(c.n_embd, c.n_embd) for _ in range(N_ALTUP - 1)]),
        **_per_layer(c, draw, N_EMBD_ALTUP),
    }


def _per_layer(c: TinyConfig, draw: Draw, n: int) -> Weights:
    """What each token gives to each layer."""
    return {
        "per_layer_token_embd.weight": draw.normal(c.n_vocab, n * c.n_layer, std=n**-0.5),
        "per_layer_model_proj.weight": draw.matrix(n * c.n_layer, c.n_embd),
        "per_layer_proj_norm.weight": draw.norm(n),
    }


def _gemma4(c: TinyConfig, draw: Draw) -> Model:
    """Full layers have wider heads, and fewer that are cached. The big ones take keys as values there and have experts;
    the small ones have layers that cache nothing, and inputs per layer."""
    small = c.shared_layers > 0
    n_per_layer = N_PER_LAYER if small else 0
    heads = [max(1, c.n_head_kv // 2) if il in c.full_layers else c.n_head_kv for il in range(c.n_layer)]
    meta = _metadata(c) | {
        "attention.head_count_kv": heads, "rope.freq_base_swa": c.rope_base / 100,
        "attention.key_length": 2 * c.head_dim, "attention.value_length": 2 * c.head_dim,
        "attention.key_length_swa": c.head_dim, "attention.value_length_swa": c.head_dim,
        "rope.dimension_count": 2 * c.head_dim, "rope.dimension_count_swa": c.head_dim,
        "embedding_length_per_layer_input": n_per_layer, "attention.shared_kv_layers": c.shared_layers,
    }  # fmt: skip
    if not small:
        meta |= expert_metadata(c)
    layers = []
    for il in range(c.n_layer):
        full = il in c.full_layers
        layer = norms(c, draw, "attn_norm", "ffn_norm", *_POST)
        layer |= attention(c, draw, heads[il], (1 + full) * c.head_dim, qk_norm="head") | feed_forward(c, draw)
        if il >= c.n_layer - c.shared_layers:
            layer = {name: a for name, a in layer.items() if name not in ("attn_k", "attn_v", "attn_k_norm")}
        if full and not small:
            del layer["attn_v"]
        if small:
            layer |= norms(c, draw, "post_norm") | {
                "inp_gate": draw.matrix(n_per_layer, c.n_embd), "proj": draw.matrix(c.n_embd, n_per_layer),
            }  # fmt: skip
        else:
            layer |= experts(c, draw) | norms(c, draw, "post_ffw_norm_1", "post_ffw_norm_2", "pre_ffw_norm_2")
            layer["ffn_gate_inp.scale"] = draw.norm(c.n_embd, c.n_embd**0.5)
        layers.append(layer)
    w = assemble(c, draw, layers)
    w["rope_freqs.weight"] = np.exp(np.linspace(0, 2, c.head_dim, dtype=np.float32))
    return meta, w | (_per_layer(c, draw, n_per_layer) if small else {})


_COMMON: dict[str, Any] = {
    "n_layer": 4, "full_layers": (1, 3), "head_dim": 32, "n_head": 4, "n_ff": 64, "n_vocab": 272, "sliding_window": 16,
}  # fmt: skip
_NEOX = _COMMON | {"rope_neox": True}
_GEMMA = _NEOX | {"gelu": True, "tied": True, "rope_base": 1e5}
WINDOW: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma2": (_gemma, _GEMMA),
    "gemma3": (_gemma, _GEMMA),
    "gemma3-window": (_gemma, _GEMMA | {"arch": "gemma3", "full_layers": ()}),
    "gemma3n": (_gemma3n, _GEMMA | {"attention_scale": 1.0}),
    "gemma3n-shared": (
        _gemma3n,
        _GEMMA
        | {"arch": "gemma3n", "n_layer": 22, "full_layers": (9, 19, 21), "shared_layers": 2, "attention_scale": 1.0},
    ),
    "gemma4": (_gemma4, _GEMMA | {"attention_scale": 1.0}),
    "gemma4-shared": (
        _gemma4,
        _GEMMA | {"arch": "gemma4", "n_layer": 6, "full_layers": (1, 3, 5), "shared_layers": 2, "attention_scale": 1.0},
    ),
    "gpt-oss": (_gpt_oss, _NEOX),
    "mimo2": (_mimo2, _NEOX | {"head_dim": 64, "rope_dim": 32, "rope_base": 1e5}),
    "afmoe": (_afmoe, _NEOX),
    "step35": (_step35, _NEOX | {"rope_base": 1e5}),
    "olmo2": (_behind, _NEOX | {"yarn": 4.0, "n_ctx_orig": 64}),
    "exaone4": (
        _behind,
        _NEOX | {"n_layer": 64, "full_layers": tuple(range(3, 64, 4)), "n_head": 2, "n_head_kv": 1, "n_ff": 32},
    ),
    "exaone-moe": (_exaone_moe, _NEOX),
    "granite_swa": (
        _granite_swa,
        _COMMON | {"embedding_scale": 6.0, "residual_scale": 0.4, "attention_scale": 0.2, "logit_scale": 3.0},
    ),
    "cohere2": (_cohere2, _COMMON | {"tied": True}),
    "llama4": (_llama4, _COMMON | {"sliding_window": 8192}),
}
