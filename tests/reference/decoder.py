"""The supported architectures in plain NumPy, with a visibility of its own for every layer and KV head.

Letters in shapes: T tokens of one call, N tokens so far (those T included), L layers, Hq query heads, H KV heads,
G = Hq / H, D head size, E embedding size, V vocabulary.

Conventions that are llama.cpp's rather than the papers':
- rotary angles: see `rotary.py`
- Gemma's norms multiply by the stored weight (the file has 1 + w); its GELU is a table over float16 on the CPU
- fused matrices hold the rows of q, k, v and of gate, up in this order
- Granite divides the logits by its logit scale
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from reference.cache_types import CacheType, rounding
from reference.rotary import Rotary
from tiny.models import TinyConfig

Visibility = Sequence[Sequence[np.ndarray]]  # [L][H] of bool [T, N]: may query row i read the key at position j


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """[..., n] -> [..., n]"""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


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

    Keys and values are computed once, from hidden states that saw what was visible at that time, and never again. Rotary
    positions of keys can be renewed, as a cache does it: from the rounded key, by the difference.
    """

    keys: list[np.ndarray]  # [L] of [N, H, D], after the rotation and the rounding of the cache
    rotary: list[np.ndarray]  # [L] of int [N, H], what they are rotated by
    values: list[np.ndarray]  # [L] of [N, H, D]
    queries: list[np.ndarray]  # [L] of [N, Hq, D], after the rotation, before the scale
    hidden: list[np.ndarray]  # [L] of [N, E], what the attention of the layer reads

    def __init__(
        self, config: TinyConfig, dtype: DTypeLike = np.float64, cache_dtype: CacheType = None, n_ctx: int = 0
    ) -> None:
        c = self.config = config
        self.dtype, self.cache_dtype, self.round = np.dtype(dtype), cache_dtype, rounding(cache_dtype)
        self.weights = {name: a.astype(dtype) for name, a in c.weights.items()}
        self.rotaries = [Rotary.of(c, il, n_ctx) for il in range(c.n_layer)]
        self.n_tokens = 0
        self.shift = 0  # index of the next token minus its rotary position
        self.rotary = [np.zeros((0, c.n_head_kv), int)] * c.n_layer
        self.keys, self.values = (
            [np.zeros((0, c.n_head_kv, dim), dtype)] * c.n_layer for dim in (c.head_dim, c.value_dim)
        )  # fmt: skip
        self.queries = [np.zeros((0, c.n_head, c.head_dim), dtype)] * c.n_layer
        self.hidden = [np.zeros((0, c.n_embd), dtype)] * c.n_layer

    def append(self, tokens: Sequence[int], visible: Visibility | None = None) -> np.ndarray:
        """Evaluates one ubatch; returns logits [T, V]. By default everything earlier is visible."""
        c, w = self.config, self.weights
        positions = np.arange(self.n_tokens, self.n_tokens + len(tokens)) - self.shift
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
        for tokens in (self.keys, self.values, self.queries, self.hidden, self.rotary):
            tokens[:] = [a[:n] for a in tokens]
        self.n_tokens = n
        if n == 0:
            self.shift = 0

    def renew(self, il: int, h: int, index: np.ndarray, rotary: np.ndarray) -> None:
        """Gives keys of one KV head other rotary positions. Those that have them already are not touched."""
        by = rotary - self.rotary[il][index, h]
        moved = index[by != 0]
        if self.rotaries[il] and len(moved):
            keys = self.rotaries[il].rotate(self.keys[il][moved, h], by[by != 0])
            self.keys[il][moved, h] = self.round(keys)
        self.rotary[il][index, h] = rotary

    def move_end(self, end: int) -> None:
        """The next token gets the rotary position `end`; queries so far come to lie before it."""
        by = end - (self.n_tokens - self.shift)
        for il, rotary in enumerate(self.rotaries):
            if rotary:
                self.queries[il] = rotary.rotate(self.queries[il], np.full(self.n_tokens, by))
        self.shift -= by

    def project(self, il: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x [T, E] -> queries [T, Hq, D], keys [T, H, D] and values [T, H, Dv], without positions."""
        c, w, p = self.config, self.weights, f"blk.{il}."
        if c.arch == "minicpm3":
            return self._project_minicpm3(p, x)
        n_q, n_kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
        if c.fused:
            q, k, v = np.split(x @ w[p + "attn_qkv.weight"].T, [n_q, n_q + n_kv], axis=-1)
        else:
            q, k, v = (x @ w[f"{p}attn_{name}.weight"].T + w.get(f"{p}attn_{name}.bias", 0) for name in "qkv")
        q, k, v = (a.reshape(len(x), -1, c.head_dim) for a in (q, k, v))
        if c.qk_norm:
            q, k = (rms_norm(a, w[f"{p}attn_{name}_norm.weight"], c.eps) for a, name in ((q, "q"), (k, "k")))
        return q, k, v

    def _project_minicpm3(self, p: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        c, w = self.config, self.weights
        small = rms_norm(x @ w[p + "attn_q_a.weight"].T, w[p + "attn_q_a_norm.weight"], c.eps)
        q = (small @ w[p + "attn_q_b.weight"].T).reshape(len(x), c.n_head, c.head_dim)
        small, shared = np.split(x @ w[p + "attn_kv_a_mqa.weight"].T, [-c.n_rot], axis=-1)
        small = rms_norm(small, w[p + "attn_kv_a_norm.weight"], c.eps)
        k, v = np.split((small @ w[p + "attn_kv_b.weight"].T).reshape(len(x), c.n_head, -1), 2, axis=-1)
        return q, np.concatenate((k, np.repeat(shared[:, None], c.n_head, axis=1)), axis=-1), v

    def _attention(self, il: int, x: np.ndarray, positions: np.ndarray, visible: Sequence[np.ndarray]) -> np.ndarray:
        """x [T, E], visible [H] of [T, N] -> [T, E]"""
        c, w, p = self.config, self.weights, f"blk.{il}."
        q, k, v = self.project(il, x)
        rotary = self.rotaries[il]
        if rotary:
            q, k = (rotary.apply(a, positions) for a in (q, k))
        k, v = self.round(k), self.round(v)
        at = np.repeat(positions[:, None], c.n_head_kv, axis=1)
        for all_tokens, new in (
            (self.keys, k), (self.values, v), (self.queries, q), (self.hidden, x), (self.rotary, at)
        ):  # fmt: skip
            all_tokens[il] = np.concatenate((all_tokens[il], new))

        out = np.empty((*q.shape[:2], c.value_dim), self.dtype)
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
    cache_dtype: CacheType = None,
    n_ctx: int = 0,
) -> np.ndarray:
    """Logits [N, V] of all positions, evaluated at once; visible is [L][H] of [N, N]."""
    return Decoder(config, dtype, cache_dtype, n_ctx).append(tokens, visible)
