"""Parts that layers of tiny models are made of. Names are without "blk.N." and without ".weight"; a "." at the end says
that there is no such ending in the file.

All experts of a layer are always used: which ones a router picks would change with the last bit of what it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tiny.config import Draw, TinyConfig, Weights, attention_metadata

N_EXPERT = 2
N_CONV = 4  # tokens that a convolution reads
RANK = 32  # of latents


def norms(c: TinyConfig, draw: Draw, *names: str, gain: float = 1.0) -> Weights:
    return {name: draw.norm(c.n_embd, gain) for name in names}


def attention(
    c: TinyConfig, draw: Draw, n_head_kv: int = 0, head_dim: int = 0, *,
    value_dim: int = 0, gated: bool = False, qk_norm: str = "",
) -> Weights:  # fmt: skip
    """`gated`: behind each query head lies the gate of its output. `qk_norm`: of each "head", or of "all" at once."""
    n_head_kv, dim = n_head_kv or c.n_head_kv, head_dim or c.head_dim
    n_q, n_kv, value_dim = c.n_head * dim, n_head_kv * dim, value_dim or dim
    gain = c.sharpness / (c.scale * dim**0.5) ** 0.5  # of q and k
    q, k = draw.matrix(n_q, c.n_embd, gain), draw.matrix(n_kv, c.n_embd, gain)
    k += draw.normal(n_kv, 1) * draw.matrix(1, c.n_embd, gain)  # a direction that keys share
    if gated:
        both = [x.reshape(c.n_head, dim, c.n_embd) for x in (q, draw.matrix(n_q, c.n_embd))]
        q = np.concatenate(both, axis=1).reshape(2 * n_q, c.n_embd)
    w = {
        "attn_q": q, "attn_k": k, "attn_v": draw.matrix(n_head_kv * value_dim, c.n_embd),
        "attn_output": draw.matrix(c.n_embd, c.n_head * value_dim),
    }  # fmt: skip
    if qk_norm:
        sizes = (n_q, n_kv) if qk_norm == "all" else (dim, dim)
        w |= {f"attn_{x}_norm": draw.norm(n, gain) for x, n in zip("qk", sizes)}
    return w


def latent_attention(c: TinyConfig, draw: Draw, *, rank_q: int = RANK, split: bool = True) -> Weights:
    """One compressed vector per token, for keys and values; `split`: so that it is what is cached."""
    n_rope, n_nope = c.n_rot, c.head_dim
    w = {
        "attn_kv_a_norm": draw.norm(RANK), "attn_kv_a_mqa": draw.matrix(RANK + n_rope, c.n_embd, c.sharpness),
        "attn_output": draw.matrix(c.n_embd, c.n_head * n_nope),
    }  # fmt: skip
    if rank_q:
        w |= {
            "attn_q_a_norm": draw.norm(rank_q), "attn_q_a": draw.matrix(rank_q, c.n_embd),
            "attn_q_b": draw.matrix(c.n_head * (n_nope + n_rope), rank_q, c.sharpness),
        }  # fmt: skip
    else:
        w["attn_q"] = draw.matrix(c.n_head * (n_nope + n_rope), c.n_embd, c.sharpness)
    k, v = draw.normal(c.n_head, n_nope, RANK, std=RANK**-0.5), draw.normal(c.n_head, n_nope, RANK, std=RANK**-0.5)
    if split:
        return w | {"attn_k_b": np.ascontiguousarray(k.transpose(0, 2, 1)), "attn_v_b": v}
    return w | {"attn_kv_b": np.concatenate([k, v], axis=1).reshape(-1, RANK)}


def latent_metadata(c: TinyConfig, *, rank_q: int = RANK, split: bool = True) -> dict[str, Any]:
    n_rope, n_nope = c.n_rot, c.head_dim
    meta = attention_metadata(c) | {"attention.kv_lora_rank": RANK}
    if rank_q:
        meta["attention.q_lora_rank"] = rank_q
    if not split:
        return meta | {"attention.head_count_kv": c.n_head, "attention.key_length": n_nope + n_rope}
    return meta | {
        "attention.head_count_kv": 1, "attention.key_length": RANK + n_rope, "attention.value_length": RANK,
        "attention.key_length_mla": n_nope + n_rope, "attention.value_length_mla": n_nope,
    }  # fmt: skip


def feed_forward(c: TinyConfig, draw: Draw, *, gated: bool = True) -> Weights:
    w = {"ffn_up": draw.matrix(c.n_ff, c.n_embd), "ffn_down": draw.matrix(c.n_embd, c.n_ff)}
    return w | ({"ffn_gate": draw.matrix(c.n_ff, c.n_embd)} if gated else {})


def experts(c: TinyConfig, draw: Draw, *, shared: bool = False) -> Weights:
    parts = [feed_forward(c, draw) for _ in range(N_EXPERT)]
    w = {"ffn_gate_inp": draw.matrix(N_EXPERT, c.n_embd)}
    w |= {f"{name}_exps": np.stack([part[name] for part in parts]) for name in parts[0]}
    if shared:
        w |= {f"{name}_shexp": a for name, a in feed_forward(c, draw).items()}
    return w


def expert_metadata(c: TinyConfig) -> dict[str, Any]:
    return {
        "expert_count": N_EXPERT, "expert_used_count": N_EXPERT, "expert_feed_forward_length": c.n_ff,
    }  # fmt: skip


def draft(c: TinyConfig, draw: Draw, layer: Weights) -> Weights:
    """A layer that reads the next token and what the model made of the ones before it."""
    return layer | norms(c, draw, "nextn.enorm", "nextn.hnorm") | {"nextn.eh_proj": draw.matrix(c.n_embd, 2 * c.n_embd)}


def assemble(c: TinyConfig, draw: Draw, layers: Sequence[Weights], output_norm: str = "output_norm") -> Weights:
    """All tensors of a model by their names."""
    embedding = draw.normal(c.n_vocab, c.n_embd) + draw.normal(1, c.n_embd, std=0.5)
    w = {"token_embd": embedding / np.float32(c.embedding_scale), output_norm: draw.norm(c.n_embd)}
    if not c.tied:
        w["output"] = draw.matrix(c.n_vocab, c.n_embd, 2 * c.logit_scale)
    w |= {f"blk.{il}.{name}": a for il, layer in enumerate(layers) for name, a in layer.items()}
    whole = (".", ".bias", ".scale", "ssm_a", "ssm_d")
    return {name.rstrip(".") if name.endswith(whole) else f"{name}.weight": a for name, a in w.items()}


def head_counts(c: TinyConfig) -> list[int]:
    """KV heads of each layer; recurrent ones have none."""
    return [c.n_head_kv if il in c.full_layers else 0 for il in range(c.n_layer)]
