"""A tiny decoder with random weights, and samples for it. Importing this needs PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from indexmem_edge.train.data.sample import Sample
from indexmem_edge.train.model.decoder import Config, Decoder
from indexmem_edge.train.model.rope import Rope


def random_decoder(n_layer: int = 2, seed: int = 0, sharpness: float = 2.0, **more: Any) -> Decoder:
    """Four query heads of two KV heads. `sharpness` multiplies queries and keys: attention must not be uniform. `more` is
    what sets its configuration apart.
    """
    d, n_head, n_head_kv, dim, n_ff, n_vocab = 32, 4, 2, 8, 48, 60
    draw = torch.Generator().manual_seed(seed)

    def matrix(n_out: int, n_in: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(n_out, n_in, generator=draw) * size * n_in**-0.5

    weights = {"token_embd.weight": matrix(n_vocab, d, d**0.5), "output_norm.weight": torch.ones(d)}
    for il in range(n_layer):
        weights |= {
            f"blk.{il}.{name}.weight": w
            for name, w in {
                "attn_norm": 1 + 0.1 * matrix(d, 1)[:, 0], "ffn_norm": torch.ones(d),
                "attn_q": matrix(n_head * dim, d, sharpness), "attn_k": matrix(n_head_kv * dim, d, sharpness),
                "attn_v": matrix(n_head_kv * dim, d), "attn_output": matrix(d, n_head * dim),
                "ffn_gate": matrix(n_ff, d), "ffn_up": matrix(n_ff, d), "ffn_down": matrix(d, n_ff),
            }.items()
        }  # fmt: skip
    rope = Rope(10000.0, dim, interleaved=True)
    return Decoder(Config("llama", n_layer, d, n_head, n_head_kv, dim, n_ff, n_vocab, 1e-5, 512, rope, **more), weights)


def random_sample(n_tokens: int, seed: int = 0) -> Sample:
    tokens = np.random.default_rng(seed).integers(0, 60, n_tokens).astype(np.int32)
    return Sample(tokens, np.ones(n_tokens, np.float32), n_tokens, "random")


def modules_of(kind: Any, decoder: Decoder, **more: object) -> torch.nn.ModuleList:
    """Untrained indexers of a decoder's bounded layers, with a hidden layer of 8; the same ones every time."""
    torch.manual_seed(1)
    c = decoder.config
    return torch.nn.ModuleList([kind(c.n_embd, c.n_head_kv, kind.defaults(8, **more)) for _ in c.bounded])
