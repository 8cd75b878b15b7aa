"""Tiny models with multi-head latent attention: one compressed vector per token is cached for all heads of a layer."""

from __future__ import annotations

from typing import Any

from tiny.config import Draw, TinyConfig, Weights
from tiny.layers import assemble, draft, feed_forward, latent_attention, latent_metadata, norms


def _latent(c: TinyConfig, draw: Draw, split: bool = True) -> tuple[dict[str, Any], Weights]:
    meta = latent_metadata(c, split=split) | {
        "leading_dense_block_count": c.n_layer, "expert_feed_forward_length": c.n_ff, "expert_shared_count": 0,
    }  # fmt: skip
    layers = [
        norms(c, draw, "attn_norm", "ffn_norm") | latent_attention(c, draw, split=split) | feed_forward(c, draw)
        for _ in range(c.n_layer + c.draft_layers)
    ]
    if c.draft_layers:  # GLM 4.7 Flash has one
        meta |= {"nextn_predict_layers": c.draft_layers, "leading_dense_block_count": len(layers)}
        layers[c.n_layer :] = [draft(c, draw, layer) for layer in layers[c.n_layer :]]
    return meta, assemble(c, draw, layers)


def _decompressed(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    """As old files have it: keys and values of heads are cached."""
    return _latent(c, draw, split=False)


_COMMON: dict[str, Any] = {
    "n_layer": 2, "full_layers": (0, 1), "head_dim": 32, "rope_dim": 32, "n_head": 4, "n_ff": 64, "n_vocab": 272,
}  # fmt: skip
LATENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "deepseek2": (_latent, _COMMON),
    "deepseek2-draft": (_latent, _COMMON | {"arch": "deepseek2", "draft_layers": 1}),
    "deepseek2-old": (_decompressed, _COMMON | {"arch": "deepseek2"}),
    # scores grow with positions
    "mistral4": (
        _latent,
        _COMMON | {"metadata": (("attention.temperature_scale", 0.5), ("attention.temperature_length", 64))},
    ),
}
