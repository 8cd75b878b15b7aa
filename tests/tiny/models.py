"""Tiny random-weight GGUF models, written in milliseconds and loadable by llama.cpp.

`SUPPORTED` are architectures with plain attention, which `reference.Decoder` evaluates as well. `MIXED` have layers of
several kinds, positions of several dimensions or latent attention. `REFUSED` are real, loadable models that cannot be
bounded: recurrent, with ALiBi, a soft cap or an encoder. `UNROTATABLE` have a plain cache of keys whose rotation is not
the last thing that happens to them, so that their positions cannot be renewed. `TRAINED` are more that training reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tiny.config import Draw, TinyConfig, decoder, minicpm3
from tiny.hybrid import HYBRID
from tiny.latent import LATENT
from tiny.mrope import MROPE
from tiny.refused import REFUSED, UNROTATABLE, Writer
from tiny.trained import TRAINED
from tiny.window import WINDOW

UNK, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3  # tokens 3..258 are the bytes 0..255
SPACE, IM_START, IM_END, FIRST_FILLER = 259, 260, 261, 262
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"rope_neox": True, "qkv_bias": True},
    "qwen3": {"rope_neox": True, "qk_norm": True},
    "phi3": {"rope_neox": True, "fused": True},
    "gemma": {"rope_neox": True, "gelu": True, "tied": True},
    "granite": {"embedding_scale": 6.0, "residual_scale": 0.4, "attention_scale": 0.2, "logit_scale": 3.0},
    "smollm3": {"nope_step": 4, "n_layer": 4},
    "chatglm": {"fused": True, "rope_dim": 32},
}
# Evaluated by the reference, too, but not like the others: values are shorter than keys, and indexers cannot read along.
UNLIKE: dict[str, dict[str, Any]] = {
    "minicpm3": {
        "rope_neox": True, "rope_dim": 16, "n_head": 4, "n_head_kv": 4, "embedding_scale": 12.0,
        "residual_scale": 1.4 / 2**0.5, "logit_scale": 0.25,
    },
}  # fmt: skip
# Layers of more than one kind, or positions or a cache of another kind: see `architectures`.
MIXED: dict[str, tuple[Writer, dict[str, Any]]] = MROPE | HYBRID | WINDOW | LATENT
# llama.cpp declares their attention output matrix [n_embd, n_embd]
SQUARE = {"qwen2", "phi3", "chatglm", "jamba", "lfm2", "lfm2moe", "olmo2", "exaone4", "cohere2", "qwen2vl"}


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


def _build(arch: str) -> tuple[Writer, dict[str, Any]]:
    if arch in SUPPORTED:
        return decoder, SUPPORTED[arch]
    if arch in UNLIKE:
        return minicpm3, UNLIKE[arch]
    return (REFUSED | UNROTATABLE | MIXED | TRAINED)[arch]


def make_config(arch: str, **overrides: Any) -> TinyConfig:
    """The configuration that `write_model` would use, without weights. `arch` is a name in one of the tables."""
    defaults = _build(arch)[1]
    c = replace(TinyConfig(arch), **(defaults | overrides))
    if c.arch in SQUARE:  # follows from the heads, whatever was asked for
        c = replace(c, n_embd=c.n_head * c.head_dim)
    if c.arch.startswith("gemma") or c.arch == "afmoe":
        c = replace(c, embedding_scale=float(np.sqrt(np.float32(c.n_embd))))
    if c.n_vocab < FIRST_FILLER or c.n_head % c.n_head_kv:
        raise ValueError(f"{arch}: n_vocab >= {FIRST_FILLER} and n_head divisible by n_head_kv are required")
    return c


def write_model(path: str | Path, arch: str, **overrides: Any) -> TinyConfig:
    """Writes a model and returns its configuration with the weights, by GGUF name, as float32 arrays."""
    c = make_config(arch, **overrides)
    meta, weights = _build(arch)[0](c, Draw(c.seed))

    tokens, types = _vocabulary(c.n_vocab)
    meta = {f"{c.arch}.{key}": value for key, value in (meta | dict(c.metadata)).items()}
    meta |= {  # the name says nothing: llama.cpp adjusts vocabularies by it
        "general.name": "tiny", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * c.n_vocab, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": UNK, "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.chat_template": CHAT_TEMPLATE,
    }  # fmt: skip

    writer = gguf.GGUFWriter(path, c.arch)
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
