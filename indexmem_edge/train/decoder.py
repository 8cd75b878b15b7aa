"""The llama family of decoders in PyTorch: llama, qwen2, qwen3; frozen weights, and a hook where attention is computed.

Shapes: B sequences of T tokens, d = hidden size, Hq query heads, H KV heads, D = head size. Queries and keys are as the
native library caches them: after the norms of qwen3 and after RoPE, in the order of dimensions of the GGUF file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .rope import Rope

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Config:
    """What decides the computation, whichever file it was read from."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    norm_eps: float
    context_length: int
    rope: Rope

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.n_head // self.n_head_kv

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Heads:
    """Operands of one layer's attention."""

    layer: int
    hidden: Tensor  # [B, T, d], what the attention reads, and so does an indexer
    q: Tensor  # [B, Hq, T, D]
    k: Tensor  # [B, H, T, D]
    v: Tensor  # [B, H, T, D]


Attend = Callable[[Heads], Tensor]  # -> [B, Hq, T, D]


def causal(heads: Heads) -> Tensor:
    """Ordinary attention."""
    return F.scaled_dot_product_attention(heads.q, heads.k, heads.v, is_causal=True, enable_gqa=True)


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a weight is kept in where computation is in `dtype`. Norms are small and lose by rounding: at least float32."""
    return torch.promote_types(dtype, torch.float32) if name.endswith("norm.weight") else dtype


class Decoder:
    """Weights by their GGUF names, `blk.0.attn_q.weight` and so on; nothing here is trained.

    All have the dtype of the computation, norms at least float32. What a file may lack (biases, an output matrix, the
    norms of queries and keys) is used if it is there.
    """

    def __init__(self, config: Config, weights: Weights) -> None:
        self.config, self.weights = config, weights

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["token_embd.weight"].dtype

    @property
    def device(self) -> torch.device:
        return self.weights["token_embd.weight"].device

    def to(self, device: torch.device | str, dtype: Optional[torch.dtype] = None) -> Decoder:
        """The same decoder elsewhere, or computing in another dtype. Norms that were loaded as float32 stay exact."""
        kept = dtype or self.dtype
        return Decoder(self.config, {name: w.to(device, stored_dtype(name, kept)) for name, w in self.weights.items()})

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T] integers -> [B, T, d]"""
        return F.embedding(tokens, self.weights["token_embd.weight"])

    def heads(self, il: int, x: Tensor, positions: Tensor) -> Heads:
        """The operands of layer `il` at the residual stream x [B, T, d] and absolute positions [T]."""
        c = self.config
        hidden = self._norm(f"blk.{il}.attn_norm", x)
        q = self._linear(f"blk.{il}.attn_q", hidden).unflatten(-1, (c.n_head, c.head_dim))
        k = self._linear(f"blk.{il}.attn_k", hidden).unflatten(-1, (c.n_head_kv, c.head_dim))
        v = self._linear(f"blk.{il}.attn_v", hidden).unflatten(-1, (c.n_head_kv, c.head_dim))
        if f"blk.{il}.attn_q_norm.weight" in self.weights:
            q, k = self._norm(f"blk.{il}.attn_q_norm", q), self._norm(f"blk.{il}.attn_k_norm", k)
        cos, sin = c.rope.table(positions)
        q, k = (c.rope.rotate(t.transpose(1, 2), cos, sin) for t in (q, k))
        return Heads(il, hidden, q, k, v.transpose(1, 2))

    def finish(self, il: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of layer `il`: output projection of [B, Hq, T, D], residual, feed-forward."""
        x = x + self._linear(f"blk.{il}.attn_output", attended.transpose(1, 2).flatten(2).to(x.dtype))
        h = self._norm(f"blk.{il}.ffn_norm", x)
        gate, up = self._linear(f"blk.{il}.ffn_gate", h), self._linear(f"blk.{il}.ffn_up", h)
        return x + self._linear(f"blk.{il}.ffn_down", F.silu(gate) * up)

    def layer(self, il: int, x: Tensor, positions: Tensor, attend: Attend = causal) -> Tensor:
        return self.finish(il, x, attend(self.heads(il, x, positions)))

    def final(self, x: Tensor) -> Tensor:
        """[B, T, d] after the last layer -> what the output matrix is applied to."""
        return self._norm("output_norm", x)

    @property
    def output(self) -> tuple[Tensor, Optional[Tensor]]:
        """Output matrix [n_vocab, d], the embedding unless the file has one of its own, and its bias if there is one."""
        w = self.weights
        return w["output.weight"] if "output.weight" in w else w["token_embd.weight"], w.get("output.bias")

    def logits(self, h: Tensor) -> Tensor:
        """[..., d] after `final` -> [..., n_vocab]"""
        return F.linear(h, *self.output)

    def __call__(self, tokens: Tensor, attend: Attend = causal, first: int = 0, recompute: bool = False) -> Tensor:
        """Hidden states [B, T, d] after the last norm of tokens [B, T] at positions first, first + 1, ...

        `recompute`: for gradients keep a layer's input alone, and compute the layer again.
        """
        positions = torch.arange(first, first + tokens.shape[-1], device=self.device)
        x = self.embed(tokens)
        for il in range(self.config.n_layer):
            if recompute:
                x = checkpoint(self.layer, il, x, positions, attend, use_reentrant=False)
            else:
                x = self.layer(il, x, positions, attend)
        return self.final(x)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.config.norm_eps).to(x.dtype)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
