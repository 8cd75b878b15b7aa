"""Hyperparameters and weights of tiny models, and the tensors of plain decoders.

Weights are drawn so that attention is far from uniform: scores q.k * scale have a deviation of about `sharpness`**2.
As in trained models, keys share a direction and their norms differ a lot, so that policies have something to rank.
Arrays are [out, in], like in PyTorch; GGUF stores the same bytes with the dimensions named in the opposite order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class TinyConfig:
    """Hyperparameters and weights of one model; every field but `arch` and `weights` can be overridden."""

    arch: str
    n_layer: int = 2
    n_head: int = 6
    n_head_kv: int = 2
    head_dim: int = 64
    n_embd: int = 64
    n_ff: int = 96
    n_vocab: int = 320
    n_ctx_train: int = 4096
    eps: float = 1e-5
    rope_base: float = 10000.0
    rope_neox: bool = False  # rotates (i, i + D/2) instead of (2i, 2i + 1)
    nope_step: int = 0  # every n-th layer has no rotary embedding
    attention_scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0  # logits are divided by it
    qkv_bias: bool = False
    other_bias: bool = False  # of the attention output and the feed-forward matrices
    qk_norm: bool = False
    fused: bool = False  # one matrix for q, k, v and one for gate, up
    gelu: bool = False  # gate activation: GELU (tanh form) instead of SiLU
    tied: bool = False  # the embedding is the output matrix
    sliding_window: int = 0
    full_layers: tuple[int, ...] = ()  # of models with several kinds of layers: those that attend to all of the text
    shared_layers: int = 0  # the last ones, which read what others have cached
    draft_layers: int = 0  # behind the last one, not counted: they guess tokens in advance
    sharpness: float = 1.4
    seed: int = 0
    tensor_type: str = "F32"  # of the matrices: what the package gguf can quantise
    rope_dim: int = 0  # components of a head that are rotated; 0: all
    rope_factors: bool = False  # divisors of the rotary frequencies, as Llama 3 has them
    long_factors: bool = False  # two sets of them, as Phi 3 has them: for contexts up to n_ctx_orig, and for longer ones
    n_ctx_orig: int = 0  # length that was trained for before rotary positions were scaled; 0: n_ctx_train
    yarn: float = 1.0  # factor by which YaRN makes it longer
    rope_magnitude: float = 1.0  # of rotated queries and keys
    metadata: tuple[tuple[str, Any], ...] = ()  # further keys, without the architecture; `reference` knows nothing of them
    weights: Weights = field(default_factory=dict, repr=False, compare=False)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.n_head // self.n_head_kv

    @property
    def scale(self) -> float:
        """Factor of q.k before the softmax."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def n_rot(self) -> int:
        """Components of a head that are rotated."""
        return self.rope_dim or self.head_dim

    @property
    def value_dim(self) -> int:
        """Components of a value: those that MiniCPM 3 rotates belong to keys alone."""
        return self.head_dim - self.n_rot if self.arch == "minicpm3" else self.head_dim

    @property
    def rope_offset(self) -> int:
        """Components of a key in front of those that are rotated."""
        return self.value_dim if self.arch == "minicpm3" else 0

    def has_rope(self, il: int) -> bool:
        return self.nope_step == 0 or (il + 1) % self.nope_step != 0


class Draw:
    """Seeded float32 weights."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, std: float = 1.0) -> np.ndarray:
        return (std * self.rng.standard_normal(shape)).astype(np.float32)

    def matrix(self, n_out: int, n_in: int, gain: float = 1.0) -> np.ndarray:
        """[n_out, n_in]; maps a vector of unit rms to one of rms `gain`."""
        return self.normal(n_out, n_in, std=gain * n_in**-0.5)

    def norm(self, n: int, gain: float = 1.0) -> np.ndarray:
        """[n] multiplier of a norm. Gemma's 1 + w is folded in, as GGUF files have it."""
        return gain * (1 + self.normal(n, std=0.1))


def base_metadata(c: TinyConfig) -> dict[str, Any]:
    return {
        "context_length": c.n_ctx_train, "embedding_length": c.n_embd, "block_count": c.n_layer + c.draft_layers,
        "feed_forward_length": c.n_ff, "attention.head_count": c.n_head, "attention.head_count_kv": c.n_head_kv,
        "attention.layer_norm_rms_epsilon": c.eps, "vocab_size": c.n_vocab,
    }  # fmt: skip


def attention_metadata(c: TinyConfig) -> dict[str, Any]:
    """That of the model, its heads and what rotates them."""
    meta = base_metadata(c) | {
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "rope.dimension_count": c.n_rot, "rope.freq_base": c.rope_base,
    }  # fmt: skip
    if c.n_ctx_orig:
        meta["rope.scaling.original_context_length"] = c.n_ctx_orig
    if c.yarn != 1:
        meta |= {"rope.scaling.type": "yarn", "rope.scaling.factor": c.yarn}
    if c.rope_magnitude != 1:
        meta["rope.scaling.attn_factor"] = c.rope_magnitude
    if c.sliding_window:
        meta["attention.sliding_window"] = c.sliding_window
    return meta


def decoder(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    """Metadata and tensors of the supported architectures."""
    meta = attention_metadata(c)
    if c.arch == "granite":
        meta |= {k: getattr(c, k) for k in ("embedding_scale", "residual_scale", "logit_scale")}
        meta["attention.scale"] = c.scale

    n_q, n_kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    gain = c.sharpness / (c.scale * c.head_dim**0.5) ** 0.5  # of q and k
    embedding = draw.normal(c.n_vocab, c.n_embd) + draw.normal(1, c.n_embd, std=0.5)
    w = {"token_embd.weight": embedding / np.float32(c.embedding_scale)}
    for il in range(c.n_layer):
        outlier = draw.normal(n_kv, 1) * draw.matrix(1, c.n_embd, gain)
        qkv = {
            "attn_q": draw.matrix(n_q, c.n_embd, gain),
            "attn_k": draw.matrix(n_kv, c.n_embd, gain) + outlier,
            "attn_v": draw.matrix(n_kv, c.n_embd),
        }
        ffn = {"ffn_gate": draw.matrix(c.n_ff, c.n_embd), "ffn_up": draw.matrix(c.n_ff, c.n_embd)}
        if c.fused:
            qkv = {"attn_qkv": np.concatenate(list(qkv.values()))}
            ffn = {"ffn_up": np.concatenate(list(ffn.values()))}
        layer = {f"{name}.weight": a for name, a in (qkv | ffn).items()}
        if c.qkv_bias:
            layer |= {f"{name}.bias": draw.normal(len(a), std=0.5) for name, a in qkv.items()}
        if c.other_bias:
            sizes = {"attn_output": c.n_embd, "ffn_gate": c.n_ff, "ffn_up": c.n_ff, "ffn_down": c.n_embd}
            layer |= {f"{name}.bias": draw.normal(n, std=0.5) for name, n in sizes.items()}
        if c.qk_norm:
            layer |= {f"attn_{x}_norm.weight": draw.norm(c.head_dim, gain) for x in "qk"}
        layer |= {
            "attn_norm.weight": draw.norm(c.n_embd), "attn_output.weight": draw.matrix(c.n_embd, n_q),
            "ffn_norm.weight": draw.norm(c.n_embd), "ffn_down.weight": draw.matrix(c.n_embd, c.n_ff),
        }  # fmt: skip
        w |= {f"blk.{il}.{name}": a for name, a in layer.items()}
    w["output_norm.weight"] = draw.norm(c.n_embd)
    if not c.tied:
        w["output.weight"] = draw.matrix(c.n_vocab, c.n_embd, 2 * c.logit_scale)
    if c.rope_factors:
        w["rope_freqs.weight"] = np.exp(np.linspace(0, 2, c.n_rot // 2, dtype=np.float32))
    if c.long_factors:
        for name, last in (("long", 3), ("short", 0.5)):
            w[f"rope_factors_{name}.weight"] = np.exp(np.linspace(0.1, last, c.n_rot // 2, dtype=np.float32))
    return meta, w


def minicpm3(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    """Keys of a part without position and one that all heads share, which is rotated and then put behind it."""
    n_lora, n_rope, n_nope = 32, c.n_rot, c.value_dim
    meta = base_metadata(c) | {
        "attention.head_count_kv": c.n_head, "attention.q_lora_rank": n_lora, "attention.kv_lora_rank": n_lora,
        "attention.key_length": c.head_dim, "attention.value_length": n_nope, "rope.dimension_count": n_rope,
        "rope.freq_base": c.rope_base,
    }  # fmt: skip
    w = {"token_embd.weight": draw.normal(c.n_vocab, c.n_embd) / np.float32(c.embedding_scale)}
    w["output_norm.weight"] = draw.norm(c.n_embd)
    w["output.weight"] = draw.matrix(c.n_vocab, c.n_embd, 2 * c.logit_scale)
    for il in range(c.n_layer):
        layer = {
            "attn_norm": draw.norm(c.n_embd), "attn_q_a_norm": draw.norm(n_lora), "attn_kv_a_norm": draw.norm(n_lora),
            "attn_q_a": draw.matrix(n_lora, c.n_embd), "attn_q_b": draw.matrix(c.n_head * c.head_dim, n_lora, c.sharpness),
            "attn_kv_a_mqa": draw.matrix(n_lora + n_rope, c.n_embd, c.sharpness),
            "attn_kv_b": draw.matrix(c.n_head * 2 * n_nope, n_lora, c.sharpness),
            "attn_output": draw.matrix(c.n_embd, c.n_head * n_nope), "ffn_norm": draw.norm(c.n_embd),
            "ffn_gate": draw.matrix(c.n_ff, c.n_embd), "ffn_up": draw.matrix(c.n_ff, c.n_embd),
            "ffn_down": draw.matrix(c.n_embd, c.n_ff),
        }  # fmt: skip
        w |= {f"blk.{il}.{name}.weight": a for name, a in layer.items()}
    return meta, w
