"""Decoders from GGUF files: every tensor type that the package gguf can dequantise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch

from .decoder import Config, Decoder
from .rope import Rope


def load_gguf(path: Path, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    reader = gguf.GGUFReader(path)
    meta = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("tokenizer.")}
    arch = meta["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        return meta.get(f"{arch}.{key}", default)

    n_head, n_embd = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", n_embd // n_head)
    tensors = {t.name: t for t in reader.tensors}
    config = Config(
        arch, get("block_count"), n_embd, n_head, get("attention.head_count_kv", n_head), head_dim,
        get("feed_forward_length"), int(tensors["token_embd.weight"].shape[1]), get("attention.layer_norm_rms_epsilon"),
        get("context_length"), Rope(get("rope.freq_base", 10000.0), get("rope.dimension_count", head_dim), arch == "llama"),
    )
    weights = {}
    for name, t in tensors.items():
        array = gguf.quants.dequantize(t.data, t.tensor_type)
        weights[name] = torch.from_numpy(array.copy()).to(dtype)
    return Decoder(config, weights)
