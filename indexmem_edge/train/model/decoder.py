"""Decoders in PyTorch, as llama.cpp computes them: frozen weights, and a hook where attention is computed.

What sets architectures apart is in the configuration and in which weights there are (`architectures`), not here.
Shapes: B sequences of T tokens, d = hidden size, Hq query heads, H KV heads, D = head size. Queries and keys are as the
native library caches them: after their norms and after RoPE, in the order of dimensions of the GGUF file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import feedforward
from .attention import Attend, Heads, Look, causal
from .frozen import Frozen
from .quantised import StoredWeights, linear
from .rope import Rope

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Config:
    """What decides the computation, whichever file it was read from. Defaults are those of a plain decoder."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int  # of an expert where there are several
    n_vocab: int
    norm_eps: float
    context_length: int
    rope: Rope
    window: int = 0  # tokens that the attention of a window layer reads at most
    windowed: tuple[int, ...] = ()  # the layers that have one
    window_rope: Optional[Rope] = None  # theirs; None: as in all layers
    unrotated: tuple[int, ...] = ()  # layers whose queries and keys know no position
    n_expert: int = 0
    n_expert_used: int = 0  # by each token
    gelu: bool = False  # instead of SiLU
    attention_scale: float = 0.0  # of q.k before the softmax; 0: 1 / sqrt(D)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add
    logit_scale: float = 1.0  # logits are divided by it
    logit_softcap: float = 0.0  # c tanh(logits / c); 0: none

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.n_head // self.n_head_kv

    @property
    def scale(self) -> float:
        return self.attention_scale or self.head_dim**-0.5

    @property
    def bounded(self) -> tuple[int, ...]:
        """Layers with full attention. A budget bounds their caches alone, so they alone have indexers and memories."""
        return tuple(il for il in range(self.n_layer) if il not in self.windowed)

    def rope_of(self, il: int) -> Optional[Rope]:
        """The rotation of a layer, None if it has none."""
        if il in self.unrotated:
            return None
        return self.window_rope if self.window_rope is not None and il in self.windowed else self.rope


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a weight is kept in where computation is in `dtype`. Norms and routers are small and lose by rounding: at least
    float32.
    """
    exact = name.endswith(("norm.weight", "ffn_gate_inp.weight"))
    return torch.promote_types(dtype, torch.float32) if exact else dtype


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """Between -cap and cap; a cap of 0 is none."""
    return cap * (logits / cap).tanh() if cap else logits


class Decoder(Frozen):
    """Weights by their GGUF names, `blk.0.attn_q.weight` and so on; nothing here is trained.

    All have the dtype of the computation, norms and routers at least float32. What a file may lack (biases, an output
    matrix, the norms of queries and keys, those behind attention and feed-forward) is used if it is there.
    """

    def __init__(self, config: Config, weights: Weights) -> None:
        self.config = config
        self.weights = weights if isinstance(weights, StoredWeights) else StoredWeights(weights)

    @property
    def geometry(self) -> Config:
        return self.config

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["token_embd.weight"].dtype

    @property
    def device(self) -> torch.device:
        return self.weights["token_embd.weight"].device

    def to(self, device: torch.device | str, dtype: Optional[torch.dtype] = None) -> Decoder:
        """The same decoder elsewhere, or computing in another dtype. Norms that were loaded as float32 stay exact."""
        kept = dtype or self.dtype
        return Decoder(self.config, self.weights.to(device, lambda name: stored_dtype(name, kept)))

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T] integers -> [B, T, d]"""
        return F.embedding(tokens, self.weights["token_embd.weight"]) * self.config.embedding_scale

    def heads(self, il: int, x: Tensor, positions: Tensor) -> Heads:
        """The operands of layer `il` at the residual stream x [B, T, d] and absolute positions [T]."""
        c = self.config
        hidden = self._norm(f"blk.{il}.attn_norm", x)
        q = self._linear(f"blk.{il}.attn_q", hidden).unflatten(-1, (c.n_head, c.head_dim))
        k = self._linear(f"blk.{il}.attn_k", hidden).unflatten(-1, (c.n_head_kv, c.head_dim))
        v = self._linear(f"blk.{il}.attn_v", hidden).unflatten(-1, (c.n_head_kv, c.head_dim))
        if f"blk.{il}.attn_q_norm.weight" in self.weights:
            q, k = self._norm(f"blk.{il}.attn_q_norm", q), self._norm(f"blk.{il}.attn_k_norm", k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if (rope := c.rope_of(il)) is not None:
            cos, sin = rope.table(positions)
            q, k = (rope.rotate(t, cos, sin) for t in (q, k))
        return Heads(il, hidden, q, k, v, c.scale, c.window if il in c.windowed else 0)

    def finish(self, il: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of layer `il`: output projection of [B, Hq, T, D], residual, feed-forward."""
        scale = self.config.residual_scale
        said = self._linear(f"blk.{il}.attn_output", attended.transpose(1, 2).flatten(2).to(x.dtype))
        x = x + scale * self._norm_if_there(f"blk.{il}.post_attention_norm", said)
        said = self._feed_forward(il, self._norm(f"blk.{il}.ffn_norm", x))
        return x + scale * self._norm_if_there(f"blk.{il}.post_ffw_norm", said)

    def layer(self, il: int, x: Tensor, positions: Tensor, attend: Attend = causal) -> Tensor:
        return self.finish(il, x, attend(self.heads(il, x, positions)))

    def final(self, x: Tensor) -> Tensor:
        """[B, T, d] after the last layer -> what the output matrix is applied to."""
        return self._norm("output_norm", x) / self.config.logit_scale

    @property
    def output(self) -> tuple[Tensor, Optional[Tensor]]:
        """Output matrix [n_vocab, d], the embedding unless the file has one of its own, and its bias if there is one."""
        w = self.weights
        return w["output.weight"] if "output.weight" in w else w["token_embd.weight"], w.get("output.bias")

    def logits(self, h: Tensor) -> Tensor:
        """[..., d] after `final` -> [..., n_vocab]"""
        return soft_capped(F.linear(h, *self.output), self.config.logit_softcap)

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

    @torch.no_grad()
    def observe(self, tokens: Tensor, look: Look) -> None:
        def attend(heads: Heads) -> Tensor:
            if heads.layer in self.config.bounded:
                look(heads)
            return causal(heads)

        self(tokens.long()[None], attend)

    def _feed_forward(self, il: int, h: Tensor) -> Tensor:
        c, w, activation = self.config, self.weights, feedforward.gelu if self.config.gelu else feedforward.silu
        if c.n_expert:
            router = w[f"blk.{il}.ffn_gate_inp.weight"]
            gate, up, down = (w.stored[f"blk.{il}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
            return feedforward.experts(h, router, c.n_expert_used, gate, up, down, activation)
        gate, up = self._linear(f"blk.{il}.ffn_gate", h), self._linear(f"blk.{il}.ffn_up", h)
        return self._linear(f"blk.{il}.ffn_down", activation(gate) * up)

    def _norm_if_there(self, name: str, x: Tensor) -> Tensor:
        return self._norm(name, x) if f"{name}.weight" in self.weights else x

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.config.norm_eps).to(x.dtype)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weights.stored[f"{name}.weight"], self.weights.get(f"{name}.bias"))
