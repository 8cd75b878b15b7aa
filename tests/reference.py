"""The supported architectures in plain NumPy, with a visibility of its own for every layer and KV head.

Letters in shapes: T tokens of one call, N tokens so far (those T included), L layers, Hq query heads, H KV heads,
G = Hq / H, D head size, E embedding size, V vocabulary.

Conventions that are llama.cpp's rather than the papers':
- rotary angles: p * s^i in float32 by repeated multiplication with s = base^(-2/D); pairs (2i, 2i+1) or (i, i + D/2)
- Gemma's norms multiply by the stored weight (the file has 1 + w); its GELU is a table over float16 on the CPU
- fused matrices hold the rows of q, k, v and of gate, up in this order
- Granite divides the logits by its logit scale
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike
from tiny_models import TinyConfig

Visibility = Sequence[Sequence[np.ndarray]]  # [L][H] of bool [T, N]: may query row i read the key at position j


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """[..., n] -> [..., n]"""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x: np.ndarray, positions: np.ndarray, base: float, neox: bool) -> np.ndarray:
    """Rotates x [T, heads, D] by positions [T]."""
    half = x.shape[-1] // 2
    steps = np.full((len(positions), half), np.float32(base) ** np.float32(-1 / half), np.float32)
    steps[:, 0] = positions
    angle = np.multiply.accumulate(steps, axis=1).astype(x.dtype)[:, None, :]  # [T, 1, D/2]
    first, second = (np.s_[..., :half], np.s_[..., half:]) if neox else (np.s_[..., 0::2], np.s_[..., 1::2])
    cos, sin, out = np.cos(angle), np.sin(angle), np.empty_like(x)
    out[first] = x[first] * cos - x[second] * sin
    out[second] = x[first] * sin + x[second] * cos
    return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """tanh form, both ends rounded to float16 between -10 and 10."""
    y = x.astype(np.float16).astype(np.float32)
    y = 0.5 * y * (1 + np.tanh(np.float32(0.79788456) * y * (1 + np.float32(0.044715) * y * y)))
    return np.where(x <= -10, 0, np.where(x >= 10, x, y.astype(np.float16).astype(x.dtype)))


def softmax(scores: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Over the last axis, restricted to visible entries; rows that see nothing are zero."""
    scores = np.where(visible, scores, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """q [T, G, D], keys [N, D], values [N, Dv], visible [T, N] -> [T, G, Dv]"""
    weights = softmax(scale * np.einsum("tgd,nd->tgn", q, keys), visible[:, None, :])
    return np.einsum("tgn,nd->tgd", weights, values)


def causal(n_past: int, n_tokens: int) -> np.ndarray:
    """bool [n_tokens, n_past + n_tokens]"""
    return np.tri(n_tokens, n_past + n_tokens, n_past, dtype=bool)


class Decoder:
    """One sequence, appended to ubatch by ubatch.

    Keys and values are computed once, from hidden states that saw what was visible at that time, and never again.
    """

    keys: list[np.ndarray]  # [L] of [N, H, D], after the rotation and the rounding of the cache
    values: list[np.ndarray]  # [L] of [N, H, D]
    queries: list[np.ndarray]  # [L] of [N, Hq, D], after the rotation, before the scale
    hidden: list[np.ndarray]  # [L] of [N, E], what the attention of the layer reads

    def __init__(self, config: TinyConfig, dtype: DTypeLike = np.float64, cache_dtype: DTypeLike | None = None) -> None:
        c = self.config = config
        self.dtype, self.cache_dtype = np.dtype(dtype), np.dtype(cache_dtype or dtype)
        self.weights = {name: a.astype(dtype) for name, a in c.weights.items()}
        self.n_tokens = 0
        self.keys, self.values = ([np.zeros((0, c.n_head_kv, c.head_dim), dtype)] * c.n_layer for _ in range(2))
        self.queries = [np.zeros((0, c.n_head, c.head_dim), dtype)] * c.n_layer
        self.hidden = [np.zeros((0, c.n_embd), dtype)] * c.n_layer

    def append(self, tokens: Sequence[int], visible: Visibility | None = None) -> np.ndarray:
        """Evaluates one ubatch; returns logits [T, V]. By default everything earlier is visible."""
        c, w = self.config, self.weights
        positions = np.arange(self.n_tokens, self.n_tokens + len(tokens))
        if visible is None:
            visible = [[causal(self.n_tokens, len(tokens))] * c.n_head_kv] * c.n_layer

        x = w["token_embd.weight"][np.asarray(tokens)] * c.embedding_scale  # [T, E]
        for il in range(c.n_layer):
            p = f"blk.{il}."
            attended = self._attention(il, rms_norm(x, w[p + "attn_norm.weight"], c.eps), positions, visible[il])
            x = x + c.residual_scale * attended
            x = x + c.residual_scale * self._ffn(p, rms_norm(x, w[p + "ffn_norm.weight"], c.eps))
        self.n_tokens += len(tokens)
        output = w["token_embd.weight" if c.tied else "output.weight"]
        return rms_norm(x, w["output_norm.weight"], c.eps) @ output.T / c.logit_scale

    def truncate(self, n: int) -> None:
        """Takes back all but the first n tokens."""
        for tokens in (self.keys, self.values, self.queries, self.hidden):
            tokens[:] = [a[:n] for a in tokens]
        self.n_tokens = n

    def _attention(self, il: int, x: np.ndarray, positions: np.ndarray, visible: Sequence[np.ndarray]) -> np.ndarray:
        """x [T, E], visible [H] of [T, N] -> [T, E]"""
        c, w, p = self.config, self.weights, f"blk.{il}."
        n_q, n_kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
        if c.fused:
            q, k, v = np.split(x @ w[p + "attn_qkv.weight"].T, [n_q, n_q + n_kv], axis=-1)
        else:
            q, k, v = (x @ w[f"{p}attn_{name}.weight"].T + w.get(f"{p}attn_{name}.bias", 0) for name in "qkv")
        q, k, v = (a.reshape(len(x), -1, c.head_dim) for a in (q, k, v))
        if c.qk_norm:
            q, k = (rms_norm(a, w[f"{p}attn_{name}_norm.weight"], c.eps) for a, name in ((q, "q"), (k, "k")))
        if c.has_rope(il):
            q, k = (rope(a, positions, c.rope_base, c.rope_neox) for a in (q, k))
        k, v = (a.astype(self.cache_dtype).astype(self.dtype) for a in (k, v))
        for all_tokens, new in ((self.keys, k), (self.values, v), (self.queries, q), (self.hidden, x)):
            all_tokens[il] = np.concatenate((all_tokens[il], new))

        out = np.empty_like(q)
        for h in range(c.n_head_kv):
            heads = np.s_[:, h * c.group : (h + 1) * c.group]
            out[heads] = self.attend(il, h, q[heads], visible[h])
        return out.reshape(len(x), -1) @ w[p + "attn_output.weight"].T

    def attend(self, il: int, h: int, q: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """One KV head: q [T, G, D], visible [T, N] -> [T, G, D]"""
        return attend(q, self.keys[il][:, h], self.values[il][:, h], visible, self.config.scale)

    def _ffn(self, p: str, x: np.ndarray) -> np.ndarray:
        """[T, E] -> [T, E]"""
        c, w = self.config, self.weights
        up = x @ w[p + "ffn_up.weight"].T
        gate, up = np.split(up, 2, axis=-1) if c.fused else (x @ w[p + "ffn_gate.weight"].T, up)
        return ((gelu if c.gelu else silu)(gate) * up) @ w[p + "ffn_down.weight"].T


def forward(
    config: TinyConfig,
    tokens: Sequence[int],
    visible: Visibility | None = None,
    dtype: DTypeLike = np.float64,
    cache_dtype: DTypeLike | None = None,
) -> np.ndarray:
    """Logits [N, V] of all positions, evaluated at once; visible is [L][H] of [N, N]."""
    return Decoder(config, dtype, cache_dtype).append(tokens, visible)
