"""Tiny random-weight GGUF models, written in milliseconds and loadable by llama.cpp.

`SUPPORTED` are architectures with plain attention, which `reference.Decoder` evaluates as well. `REFUSED` are real,
loadable models that need something else than a plain KV cache: a sliding window, a recurrent state, both kinds of
layers, latent attention, ALiBi, a soft cap or an encoder.

Weights are drawn so that attention is far from uniform: scores q.k * scale have a deviation of about `sharpness`**2.
As in trained models, keys share a direction and their norms differ a lot, so that policies have something to rank.
Arrays are [out, in], like in PyTorch; GGUF stores the same bytes with the dimensions named in the opposite order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Weights = dict[str, np.ndarray]

UNK, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3  # tokens 3..258 are the bytes 0..255
SPACE, IM_START, IM_END, FIRST_FILLER = 259, 260, 261, 262
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


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
    sharpness: float = 1.4
    seed: int = 0
    tensor_type: str = "F32"  # of the matrices: what the package gguf can quantise
    rope_factors: bool = False  # divisors of the rotary frequencies, as Llama 3 has them
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

    def has_rope(self, il: int) -> bool:
        return self.nope_step == 0 or (il + 1) % self.nope_step != 0


SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"rope_neox": True, "qkv_bias": True},
    "qwen3": {"rope_neox": True, "qk_norm": True},
    "phi3": {"rope_neox": True, "fused": True},
    "gemma": {"rope_neox": True, "gelu": True, "tied": True},
    "granite": {"embedding_scale": 6.0, "residual_scale": 0.4, "attention_scale": 0.2, "logit_scale": 3.0},
    "smollm3": {"nope_step": 4, "n_layer": 4},
}
SQUARE = {"qwen2", "phi3"}  # llama.cpp declares their attention output matrix [n_embd, n_embd]


class _Draw:
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


def _base_metadata(c: TinyConfig) -> dict[str, Any]:
    return {
        "context_length": c.n_ctx_train, "embedding_length": c.n_embd, "block_count": c.n_layer,
        "feed_forward_length": c.n_ff, "attention.head_count": c.n_head, "attention.head_count_kv": c.n_head_kv,
        "attention.layer_norm_rms_epsilon": c.eps, "vocab_size": c.n_vocab,
    }  # fmt: skip


def _decoder(c: TinyConfig, draw: _Draw) -> tuple[dict[str, Any], Weights]:
    """Metadata and tensors of the supported architectures."""
    meta = _base_metadata(c) | {
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim, "rope.freq_base": c.rope_base,
    }  # fmt: skip
    if c.arch == "granite":
        meta |= {k: getattr(c, k) for k in ("embedding_scale", "residual_scale", "logit_scale")}
        meta["attention.scale"] = c.scale
    if c.sliding_window:
        meta["attention.sliding_window"] = c.sliding_window

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
        w["rope_freqs.weight"] = np.exp(np.linspace(0, 2, c.head_dim // 2, dtype=np.float32))
    return meta | dict(c.metadata), w


def _gemma2(c: TinyConfig, draw: _Draw) -> tuple[dict[str, Any], Weights]:
    """Sliding window in every second layer."""
    meta, w = _decoder(c, draw)
    for il in range(c.n_layer):
        w |= {f"blk.{il}.post_{x}_norm.weight": draw.norm(c.n_embd) for x in ("attention", "ffw")}
    return meta, w


def _grok(c: TinyConfig, draw: _Draw) -> tuple[dict[str, Any], Weights]:
    """Attention with a soft cap, and two experts."""
    meta, w = _decoder(c, draw)
    for il in range(c.n_layer):
        w |= {f"blk.{il}.{x}_norm.weight": draw.norm(c.n_embd) for x in ("attn_output", "layer_output")}
        w[f"blk.{il}.ffn_gate_inp.weight"] = draw.matrix(2, c.n_embd)
        for x in ("gate", "up", "down"):
            one = w.pop(f"blk.{il}.ffn_{x}.weight")
            w[f"blk.{il}.ffn_{x}_exps.weight"] = np.stack([one, -one])
    return meta | {"expert_count": 2, "expert_used_count": 1}, w


def _ssm_layer(c: TinyConfig, draw: _Draw) -> tuple[dict[str, Any], Weights]:
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
    if c.arch == "jamba":
        layer |= {f"ssm_{x}_norm.weight": draw.norm(n) for x, n in (("dt", rank), ("b", n_state), ("c", n_state))}
    return meta, layer


def _mamba(c: TinyConfig, draw: _Draw) -> tuple[dict[str, Any], Weights]:
    """Recurrent: no attention at all."""
    meta = _base_metadata(c) | {"attention.head_count": 0, "attention.head_count_kv": 0, "feed_forward_length": 0}
    w = {"token_embd.weight": draw.normal(c.n_vocab, c.n_embd), "output_norm.weight": draw.norm(c.n_embd)}
    for il in range(c.n_layer):
        ssm_meta, layer = _ssm_layer(c, draw)
        meta |= ssm_meta
        layer["attn_norm.weight"] = draw.norm(c.n_embd)
        w |= {f"blk.{il}.{name}": a for name, a in layer.items()}
    return meta, w


def _jamba(c: TinyConfig, draw: _Draw) -> tuple[dict[str, Any], Weights]:
    """Hybrid: recurrent layers alternate with attention layers."""
    meta, w = _mamba(c, draw)
    meta |= {
        "attention.head_count": c.n_head, "feed_forward_length": c.n_ff,
        "attention.head_count_kv": [c.n_head_kv if il % 2 else 0 for il in range(c.n_layer)],
    }  # fmt: skip
    n_kv = c.n_head_kv * (c.n_embd // c.n_head)
    for il in range(c.n_layer):
        p = f"blk.{il}."
        w |= {
            p + "ffn_norm.weight": draw.norm(c.n_embd), p + "ffn_gate.weight": draw.matrix(c.n_ff, c.n_embd),
            p + "ffn_up.weight": draw.matrix(c.n_ff, c.n_embd), p + "ffn_down.weight": draw.matrix(c.n_embd, c.n_ff),
        }  # fmt: skip
        if il % 2:
            for name in [name for name in w if name.startswith(p + "ssm_")]:
                del w[name]
            for x, n in (("q", c.n_embd), ("k", n_kv), ("v", n_kv), ("output", c.n_embd)):
                w[f"{p}attn_{x}.weight"] = draw.matrix(n, c.n_embd)
    return meta, w


def _deepseek2(c: TinyConfig, draw: _Draw) -> tuple[dict[str, Any], Weights]:
    """Multi-head latent attention: keys and values are kept as one compressed vector per token."""
    n_lora, n_rope, n_nope, n_v = 32, 16, 32, 32
    meta = _base_metadata(c) | {
        "attention.head_count_kv": 1, "leading_dense_block_count": c.n_layer,
        "attention.q_lora_rank": n_lora, "attention.kv_lora_rank": n_lora,
        "attention.key_length": n_lora + n_rope, "attention.value_length": n_lora,
        "attention.key_length_mla": n_nope + n_rope, "attention.value_length_mla": n_v,
        "rope.dimension_count": n_rope, "expert_feed_forward_length": c.n_ff, "expert_shared_count": 0,
    }  # fmt: skip
    w = {"token_embd.weight": draw.normal(c.n_vocab, c.n_embd), "output_norm.weight": draw.norm(c.n_embd)}
    for il in range(c.n_layer):
        layer = {
            "attn_norm": draw.norm(c.n_embd), "attn_q_a_norm": draw.norm(n_lora), "attn_kv_a_norm": draw.norm(n_lora),
            "attn_q_a": draw.matrix(n_lora, c.n_embd), "attn_q_b": draw.matrix(c.n_head * (n_nope + n_rope), n_lora),
            "attn_kv_a_mqa": draw.matrix(n_lora + n_rope, c.n_embd),
            "attn_k_b": draw.normal(c.n_head, n_lora, n_nope, std=n_nope**-0.5),
            "attn_v_b": draw.normal(c.n_head, n_v, n_lora, std=n_lora**-0.5),
            "attn_output": draw.matrix(c.n_embd, c.n_head * n_v), "ffn_norm": draw.norm(c.n_embd),
            "ffn_gate": draw.matrix(c.n_ff, c.n_embd), "ffn_up": draw.matrix(c.n_ff, c.n_embd),
            "ffn_down": draw.matrix(c.n_embd, c.n_ff),
        }  # fmt: skip
        w |= {f"blk.{il}.{name}.weight": a for name, a in layer.items()}
    return meta, w


def _bloom(c: TinyConfig, draw: _Draw) -> tuple[dict[str, Any], Weights]:
    """ALiBi: a bias by distance is added to the attention scores."""
    meta = _base_metadata(c) | {"attention.head_count_kv": c.n_head, "attention.layer_norm_epsilon": c.eps}
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


def _t5(c: TinyConfig, draw: _Draw) -> tuple[dict[str, Any], Weights]:
    """Encoder-decoder."""
    n_bucket, n_q = 8, c.n_head * (c.n_embd // c.n_head)
    meta = _base_metadata(c) | {
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


Writer = Callable[[TinyConfig, _Draw], tuple[dict[str, Any], Weights]]
REFUSED: dict[str, tuple[Writer, dict[str, Any]]] = {
    "gemma2": (_gemma2, {"rope_neox": True, "gelu": True, "tied": True, "sliding_window": 16}),
    "grok": (_grok, {"rope_neox": True, "n_embd": 64, "n_head": 4, "head_dim": 16}),
    "mamba": (_mamba, {"n_embd": 64}),
    "jamba": (_jamba, {"n_embd": 96}),
    "deepseek2": (_deepseek2, {"n_embd": 64}),
    "bloom": (_bloom, {"n_embd": 96}),
    "t5": (_t5, {"n_embd": 96}),
}


def _vocabulary(n_vocab: int) -> tuple[list[str], list[int]]:
    """Tokens and types. Text becomes one token per byte, except for the space; nothing is ever merged."""
    kind = gguf.TokenType
    tokens = [("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)]
    tokens += [(f"<0x{b:02X}>", kind.BYTE) for b in range(256)]
    tokens += [("\u2581", kind.NORMAL), ("<|im_start|>", kind.CONTROL), ("<|im_end|>", kind.CONTROL)]
    tokens += [(f"[{i}]", kind.NORMAL) for i in range(n_vocab - FIRST_FILLER)]
    return [text for text, _ in tokens], [int(t) for _, t in tokens]


def _put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    add[type(value)](key, value)


def make_config(arch: str, **overrides: Any) -> TinyConfig:
    """The configuration that `write_model` would use, without weights."""
    defaults = SUPPORTED[arch] if arch in SUPPORTED else REFUSED[arch][1]
    c = replace(TinyConfig(arch), **(defaults | overrides))
    if arch in SQUARE:  # follows from the heads, whatever was asked for
        c = replace(c, n_embd=c.n_head * c.head_dim)
    if arch in ("gemma", "gemma2"):
        c = replace(c, embedding_scale=float(np.sqrt(np.float32(c.n_embd))))
    if c.n_vocab < FIRST_FILLER or c.n_head % c.n_head_kv:
        raise ValueError(f"{arch}: n_vocab >= {FIRST_FILLER} and n_head divisible by n_head_kv are required")
    return c


def write_model(path: str | Path, arch: str, **overrides: Any) -> TinyConfig:
    """Writes a model and returns its configuration with the weights, by GGUF name, as float32 arrays."""
    c = make_config(arch, **overrides)
    build = _decoder if arch in SUPPORTED else REFUSED[arch][0]
    meta, weights = build(c, _Draw(c.seed))

    tokens, types = _vocabulary(c.n_vocab)
    meta = {f"{arch}.{key}": value for key, value in meta.items()}
    meta |= {  # the name says nothing: llama.cpp adjusts vocabularies by it
        "general.name": "tiny", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * c.n_vocab, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": UNK, "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip

    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        _put(writer, key, value)
    kind = gguf.GGMLQuantizationType[c.tensor_type]
    for name, a in weights.items():
        if a.ndim == 2 and name.endswith("weight") and kind != gguf.GGMLQuantizationType.F32:
            packed = gguf.quants.quantize(a, kind)
            weights[name] = gguf.quants.dequantize(packed, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return replace(c, weights=weights)
