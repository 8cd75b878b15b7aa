"""Tiny models of recurrent layers and layers that attend to all of the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tiny import recurrent
from tiny.config import Draw, TinyConfig, Weights, attention_metadata
from tiny.layers import (
    N_EXPERT,
    assemble,
    attention,
    draft,
    expert_metadata,
    experts,
    feed_forward,
    head_counts,
    latent_attention,
    latent_metadata,
    norms,
)  # fmt: skip

Model = tuple[dict[str, Any], Weights]


def _qwen(c: TinyConfig, draw: Draw) -> Model:
    """Gated delta nets, and attention whose output has a gate, too."""
    mixed = c.arch != "qwen3next"  # positions of several dimensions
    meta = attention_metadata(c) | recurrent.metadata(c, recurrent.N_SSM_HEAD * recurrent.N_STATE)
    meta["attention.recurrent_layers"] = [il not in c.full_layers for il in range(c.n_layer)] + [False] * c.draft_layers
    if c.draft_layers:
        meta["nextn_predict_layers"] = c.draft_layers
    if mixed:
        n = c.n_rot // 2
        meta["rope.dimension_sections"] = [n - 2 * (n // 3), n // 3, n // 3, 0]
    if c.arch != "qwen35":
        meta |= expert_metadata(c) | {"expert_shared_feed_forward_length": c.n_ff}
    layers = []
    for il in range(c.n_layer + c.draft_layers):
        full = il in c.full_layers or il >= c.n_layer
        layer = norms(c, draw, "attn_norm", "post_attention_norm")
        layer |= (
            attention(c, draw, gated=True, qk_norm="head") if full else recurrent.delta_net(c, draw, joint=not mixed)
        )
        if c.arch == "qwen35":
            layer |= feed_forward(c, draw)
        else:
            layer |= experts(c, draw, shared=True) | {"ffn_gate_inp_shexp": draw.normal(c.n_embd, std=c.n_embd**-0.5)}
        layers.append(layer if il < c.n_layer else draft(c, draw, layer))
    return meta, assemble(c, draw, layers)


def _nemotron_h(c: TinyConfig, draw: Draw) -> Model:
    """A layer is either a state, or attention, or a feed-forward network: the last two come together here."""
    feeding = [il - 1 in c.full_layers for il in range(c.n_layer)]
    meta = attention_metadata(c) | recurrent.metadata(c, 2 * c.n_embd) | {
        "attention.head_count_kv": head_counts(c), "feed_forward_length": [c.n_ff if ff else 0 for ff in feeding],
        "attention.layer_norm_epsilon": c.eps,
    }  # fmt: skip
    if c.arch == "nemotron_h_moe":
        meta |= expert_metadata(c) | {"expert_shared_feed_forward_length": c.n_ff, "expert_shared_count": 1}

    def feeding_part() -> Weights:
        if c.arch == "nemotron_h":
            return feed_forward(c, draw, gated=False)
        part = experts(c, draw, shared=True) | {"exp_probs_b.bias": draw.normal(N_EXPERT, std=0.1)}
        return {name: a for name, a in part.items() if name not in ("ffn_gate_exps", "ffn_gate_shexp")}

    layers = []
    for il in range(c.n_layer):
        part = (
            attention(c, draw) if il in c.full_layers
            else feeding_part() if feeding[il]
            else recurrent.mamba2(c, draw)
        )  # fmt: skip
        layers.append(norms(c, draw, "attn_norm") | part)
    return meta, assemble(c, draw, layers)


def _alternating(c: TinyConfig, draw: Draw) -> Model:
    """A state or attention, and a feed-forward network in every layer."""
    meta = attention_metadata(c) | {"attention.head_count_kv": head_counts(c)}
    if c.arch == "granitehybrid":
        meta |= {k: getattr(c, k) for k in ("embedding_scale", "residual_scale", "logit_scale")}
        meta |= {"attention.scale": c.scale, "rope.scaling.finetuned": False}  # the latter: no rotation at all
    if c.arch.startswith("lfm2"):
        meta["shortconv.l_cache"] = recurrent.N_CONV
    else:
        n_rank = recurrent.RANK if c.arch == "jamba" else recurrent.N_SSM_HEAD
        meta |= recurrent.metadata(c, 2 * c.n_embd, n_rank, 0 if c.arch == "jamba" else recurrent.N_GROUP)
    n_dense = c.n_layer
    if c.arch == "lfm2moe":
        n_dense = 1
        meta |= expert_metadata(c) | {"leading_dense_block_count": n_dense, "expert_gating_func": 2}  # a sigmoid
    state = {"jamba": recurrent.mamba, "granitehybrid": recurrent.mamba2}.get(c.arch, recurrent.short_convolution)
    layers = []
    for il in range(c.n_layer):
        layer = norms(c, draw, "attn_norm", "ffn_norm")
        if il in c.full_layers:
            layer |= attention(c, draw, qk_norm="head" if c.arch.startswith("lfm2") else "")
        else:
            layer |= state(c, draw)
        if il < n_dense:
            layer |= feed_forward(c, draw)
        else:
            layer |= experts(c, draw) | {"exp_probs_b.bias": draw.normal(N_EXPERT, std=0.1)}
        layers.append(layer)
    return meta, assemble(c, draw, layers, "token_embd_norm" if c.arch.startswith("lfm2") else "output_norm")


def _minimax(c: TinyConfig, draw: Draw) -> Model:
    """Linear attention with a decay by distance, and experts in every layer."""
    meta = attention_metadata(c) | expert_metadata(c) | {
        "attention.recurrent_layers": [il not in c.full_layers for il in range(c.n_layer)], "residual_scale": 1.0,
    }  # fmt: skip
    layers = [
        norms(c, draw, "attn_norm", "ffn_norm")
        | (attention(c, draw) if il in c.full_layers else recurrent.lightning(c, draw))
        | experts(c, draw)
        for il in range(c.n_layer)
    ]
    return meta, assemble(c, draw, layers)


def _plamo2(c: TinyConfig, draw: Draw) -> Model:
    """Fused projections, and norms with a multiplier for each head."""
    meta = attention_metadata(c) | recurrent.metadata(c, 2 * c.n_embd, n_group=0)
    meta["attention.head_count_kv"] = head_counts(c)
    layers = []
    for il in range(c.n_layer):
        layer = norms(c, draw, "attn_norm", "post_attention_norm.", "ffn_norm", "post_ffw_norm.")
        ffn = feed_forward(c, draw)
        layer |= {"ffn_up": np.concatenate([ffn["ffn_gate"], ffn["ffn_up"]]), "ffn_down": ffn["ffn_down"]}
        if il in c.full_layers:
            part = attention(c, draw)
            layer |= {
                "attn_qkv": np.concatenate([part[f"attn_{x}"] for x in "qkv"]),
                "attn_output": part["attn_output"],
            }
            for x, n in (("q", c.n_head), ("k", c.n_head_kv)):
                layer[f"attn_{x}_norm"] = draw.norm(n * c.head_dim, c.sharpness).reshape(n, c.head_dim)
        else:
            layer |= recurrent.plamo_mamba(c, draw)
        layers.append(layer)
    return meta, assemble(c, draw, layers)


def _falcon_h1(c: TinyConfig, draw: Draw) -> Model:
    """Every layer has both, side by side."""
    meta = attention_metadata(c) | recurrent.metadata(c, 2 * c.n_embd)
    layers = [
        norms(c, draw, "attn_norm", "ffn_norm.")
        | attention(c, draw)
        | recurrent.mamba2(c, draw)
        | feed_forward(c, draw)
        for _ in range(c.n_layer)
    ]
    return meta, assemble(c, draw, layers)


def _kimi_linear(c: TinyConfig, draw: Draw) -> Model:
    """Latent attention without rotation beside recurrent layers."""
    meta = latent_metadata(c, rank_q=0) | {
        "attention.head_count_kv": [int(il in c.full_layers) for il in range(c.n_layer)],
        "ssm.conv_kernel": recurrent.N_CONV, "kda.head_dim": recurrent.N_STATE,
        "expert_feed_forward_length": c.n_ff, "expert_shared_count": 0, "expert_gating_func": 2,
        "leading_dense_block_count": c.n_layer,
    }  # fmt: skip
    layers = []
    for il in range(c.n_layer):
        part = latent_attention(c, draw, rank_q=0) if il in c.full_layers else recurrent.kimi_delta(c, draw)
        layers.append(norms(c, draw, "attn_norm", "ffn_norm") | part | feed_forward(c, draw))
    return meta, assemble(c, draw, layers)


def _kimi_k3(c: TinyConfig, draw: Draw) -> Model:
    """Experts on a shorter row, layers that read what several before them have left, and gates behind both kinds of attention."""
    latent = c.n_embd // 2
    meta = latent_metadata(c) | expert_metadata(c) | {
        "attention.head_count_kv": [int(il in c.full_layers) for il in range(c.n_layer)],
        "ssm.conv_kernel": recurrent.N_CONV, "kda.head_dim": recurrent.N_STATE, "kda.gate_lower_bound": -0.5,
        "expert_shared_count": 1, "expert_gating_func": 2, "leading_dense_block_count": 1, "expert_latent_length": latent,
        "attn_res.block_size": 2, "activation.situ_beta": 4.0, "activation.situ_linear_beta": 4.0,
    }  # fmt: skip
    layers = []
    for il in range(c.n_layer):
        layer = norms(c, draw, "attn_norm", "ffn_norm") | norms(c, draw, "attn_res_score", "ffn_res_score", gain=c.n_embd**-0.5)
        if il in c.full_layers:
            layer |= latent_attention(c, draw) | {"attn_gate": draw.matrix(c.n_head * c.head_dim, c.n_embd)}
        else:
            layer |= recurrent.kimi_delta_whole(c, draw)
        if il == 0:
            layer |= feed_forward(c, draw)
        else:
            inner = replace(c, n_embd=latent)
            parts = experts(inner, draw) | {f"{name}_shexp": a for name, a in feed_forward(c, draw).items()}
            layer |= parts | {
                "ffn_gate_inp": draw.matrix(N_EXPERT, c.n_embd), "exp_probs_b.bias": draw.normal(N_EXPERT, std=0.1),
                "ffn_routed_down": draw.matrix(latent, c.n_embd), "ffn_routed_up": draw.matrix(c.n_embd, latent),
                "ffn_routed_norm": draw.norm(latent),
            }  # fmt: skip
        layers.append(layer)
    return meta, assemble(c, draw, layers) | {"output_res_score.weight": draw.norm(c.n_embd, c.n_embd**-0.5)}


def _bailingmoe3(c: TinyConfig, draw: Draw) -> Model:
    """Latent attention that is rotated, each head with a gate, beside recurrent layers."""
    meta = latent_metadata(c) | expert_metadata(c) | {
        "attention.head_count_kv": [int(il in c.full_layers) for il in range(c.n_layer)],
        "ssm.conv_kernel": recurrent.N_CONV, "kda.head_dim": recurrent.N_STATE, "kda.gate_lower_bound": -0.5,
        "expert_shared_count": 1, "expert_gating_func": 2, "leading_dense_block_count": 1,
    }  # fmt: skip
    layers = []
    for il in range(c.n_layer):
        layer = norms(c, draw, "attn_norm", "ffn_norm")
        if il in c.full_layers:
            layer |= latent_attention(c, draw) | {"attn_gate": draw.matrix(c.n_head, c.n_embd)}
        else:
            layer |= recurrent.kimi_delta_whole(c, draw)
        if il == 0:
            layer |= feed_forward(c, draw)
        else:
            layer |= experts(c, draw, shared=True) | {"exp_probs_b.bias": draw.normal(N_EXPERT, std=0.1)}
        layers.append(layer)
    return meta, assemble(c, draw, layers)


_COMMON: dict[str, Any] = {"n_layer": 4, "full_layers": (1, 3), "head_dim": 32, "n_head": 4, "n_ff": 64, "n_vocab": 272}
_QWEN = _COMMON | {"rope_neox": True, "rope_dim": 16}
HYBRID: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen35": (_qwen, _QWEN),
    "qwen35-draft": (_qwen, _QWEN | {"arch": "qwen35", "draft_layers": 1}),
    "qwen35moe": (_qwen, _QWEN),
    "qwen3next": (_qwen, _QWEN),
    "nemotron_h": (_nemotron_h, _COMMON | {"n_layer": 6, "full_layers": (1, 4)}),
    "nemotron_h_moe": (_nemotron_h, _COMMON | {"n_layer": 6, "full_layers": (1, 4)}),
    "granitehybrid": (
        _alternating,
        _COMMON | {"embedding_scale": 6.0, "residual_scale": 0.4, "attention_scale": 0.2, "logit_scale": 3.0},
    ),
    "falcon-h1": (_falcon_h1, _COMMON | {"n_layer": 2, "full_layers": (0, 1), "rope_neox": True}),
    "jamba": (_alternating, _COMMON),
    "lfm2": (_alternating, _COMMON | {"rope_neox": True}),
    "lfm2-window": (_alternating, _COMMON | {"arch": "lfm2", "rope_neox": True, "sliding_window": 16}),
    "lfm2moe": (_alternating, _COMMON | {"rope_neox": True}),
    "minimax-01": (_minimax, _COMMON | {"rope_neox": True, "rope_dim": 16}),
    "plamo2": (_plamo2, _COMMON | {"rope_neox": True}),
    "kimi-linear": (_kimi_linear, _COMMON | {"rope_dim": 32}),
    "kimi-k3": (_kimi_k3, _COMMON | {"rope_dim": 32}),
    "bailingmoe3": (_bailingmoe3, _COMMON | {"rope_dim": 32}),
}
