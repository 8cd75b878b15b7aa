"""Tiny models whose positions have several dimensions (M-RoPE). Those of text are all equal."""

from __future__ import annotations

from typing import Any

from tiny.config import Draw, TinyConfig, Weights, decoder


def _mrope(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    meta, w = decoder(c, draw)
    n = c.n_rot // 2
    return meta | {"rope.dimension_sections": [n - 2 * (n // 3), n // 3, n // 3, 0]}, w


_COMMON: dict[str, Any] = {
    "rope_neox": True,
    "head_dim": 32,
    "n_head": 4,
    "n_ff": 64,
    "n_vocab": 272,
    "full_layers": (0, 1),
}
MROPE: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2vl": (_mrope, _COMMON | {"qkv_bias": True}),
    "qwen3vl": (_mrope, _COMMON | {"qk_norm": True}),
}
