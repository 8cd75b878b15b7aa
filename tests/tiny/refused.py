"""Tensors and metadata of tiny models that cannot be bounded, or rotate their keys in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tiny.config import Draw, TinyConfig, Weights, base_metadata, decoder


def _grok(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    """Attention with a soft cap, and two experts."""
    meta, w = decoder(c, draw)
    for il in range(c.n_layer):
        w |= {f"blk.{il}.{x}_norm.weight": draw.norm(c.n_embd) for x in ("attn_output", "layer_output")}
        w[f"blk.{il}.ffn_gate_inp.weight"] = draw.matrix(2, c.n_embd)
        for x in ("gate", "up", "down"):
            one = w.pop(f"blk.{il}.ffn_{x}.weight")
            w[f"blk.{il}.ffn_{x}_exps.weight"] = np.stack([one, -one])
    return meta | {"expert_count": 2, "expert_used_count": 1}, w


def _ssm_layer(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    n_inner, n_state, n_conv, rank = 2 * c.n_embd, 8, 4, 4
    meta = {
        "ssm.conv_kernel": n_conv, "ssm.inner_size": n_inner, "ssm.state_size": n_state, "ssm.time_step_rank": rank,
    }  # fmt: skip
    layer = {
        "ssm_in.weight": draw.matrix(2 * n_inner, c.n_embd),
        "ssm_conv1d.weight": draw.matrix(n_inner, n_conv), "ssm_conv1d.bias": draw.normal(n_inner, std=0.1),
        "ssm_x.weight": draw.matrix(rank + 2 * n_state, n_inner),
        "ssm_dt.weight": draw.matrix(n_inner, rank), "ssm_dt.bias": draw.normal(n_inner, std=0.1),
        "ssm_a": -np.abs(draw.normal(n_inner, n_state)), "ssm_d": draw.norm(n_inner),
        "ssm_out.weight": draw.matrix(c.n_embd, n_inner),
    }  # fmt: skip
    return meta, layer


def _mamba(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    """Recurrent: no attention at all."""
    meta = base_metadata(c) | {"attention.head_count": 0, "attention.head_count_kv": 0, "feed_forward_length": 0}
    w = {"token_embd.weight": draw.normal(c.n_vocab, c.n_embd), "output_norm.weight": draw.norm(c.n_embd)}
    for il in range(c.n_layer):
        ssm_meta, layer = _ssm_layer(c, draw)
        meta |= ssm_meta
        layer["attn_norm.weight"] = draw.norm(c.n_embd)
        w |= {f"blk.{il}.{name}": a for name, a in layer.items()}
    return meta, w


def _bloom(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    """ALiBi: a bias by distance is added to the attention scores."""
    meta = base_metadata(c) | {"attention.head_count_kv": c.n_head, "attention.layer_norm_epsilon": c.eps}
    w = {f"{x}_norm.weight": draw.norm(c.n_embd) for x in ("token_embd", "output")}
    shapes = {
        "attn_qkv": (3 * c.n_embd, c.n_embd), "attn_output": (c.n_embd, c.n_embd),
        "ffn_up": (c.n_ff, c.n_embd), "ffn_down": (c.n_embd, c.n_ff),
    }  # fmt: skip
    for il in range(c.n_layer):
        w |= {f"blk.{il}.{x}.weight": draw.matrix(*shape) for x, shape in shapes.items()}
        w |= {f"blk.{il}.{x}_norm.weight": draw.norm(c.n_embd) for x in ("attn", "ffn")}
    w |= {name.replace("weight", "bias"): draw.normal(len(a), std=0.1) for name, a in w.items()}
    return meta, w | {"token_embd.weight": draw.normal(c.n_vocab, c.n_embd)}


def _t5(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    """Encoder-decoder."""
    n_bucket, n_q = 8, c.n_head * (c.n_embd // c.n_head)
    meta = base_metadata(c) | {
        "attention.head_count_kv": c.n_head, "attention.relative_buckets_count": n_bucket, "decoder_start_token_id": 0,
    }  # fmt: skip
    w = {"token_embd.weight": draw.normal(c.n_vocab, c.n_embd)}
    for side, blocks in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
        w[f"{side}.output_norm.weight"] = draw.norm(c.n_embd)
        for il in range(c.n_layer):
            layer = {f"{b}_norm": draw.norm(c.n_embd) for b in (*blocks, "ffn")}
            layer |= {f"{b}_{x}": draw.matrix(n_q, c.n_embd) for b in blocks for x in "qkv"}
            layer |= {f"{b}_o": draw.matrix(c.n_embd, n_q) for b in blocks}
            layer |= {"ffn_up": draw.matrix(c.n_ff, c.n_embd), "ffn_down": draw.matrix(c.n_embd, c.n_ff)}
            layer["attn_rel_b"] = draw.normal(n_bucket, c.n_head)
            w |= {f"{side}.blk.{il}.{name}.weight": a for name, a in layer.items()}
    return meta, w


Writer = Callable[[TinyConfig, Draw], tuple[dict[str, Any], Weights]]
REFUSED: dict[str, tuple[Writer, dict[str, Any]]] = {
    "grok": (_grok, {"rope_neox": True, "n_embd": 64, "n_head": 4, "head_dim": 16}),
    "mamba": (_mamba, {"n_embd": 64}),
    "bloom": (_bloom, {"n_embd": 96}),
    "t5": (_t5, {"n_embd": 96}),
    "llama-embed": (decoder, {}),  # a decoder's tensors: only its graph has no cache
}
UNROTATABLE: dict[str, tuple[Writer, dict[str, Any]]] = {
    "hunyuan-dense": (decoder, {"rope_neox": True, "qk_norm": True}),  # a norm with weights behind the rotation
    "maincoder": (decoder, {"qk_norm": True}),  # likewise
}
