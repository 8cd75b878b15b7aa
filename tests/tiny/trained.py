"""Tiny models with experts of which a router takes some, beside those that the cache is tested with."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiny.config import Draw, TinyConfig, Weights, decoder
from tiny.refused import Writer

EXPERTS, EXPERTS_USED, EXPERT_FF = 6, 2, 48


def _qwen3moe(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    """Experts that differ, and a router that prefers some of them."""
    meta, w = decoder(c, draw)
    for il in range(c.n_layer):
        for name in ("gate", "up", "down"):
            del w[f"blk.{il}.ffn_{name}.weight"]
        n_out, n_in = (EXPERT_FF, c.n_embd), (c.n_embd, EXPERT_FF)
        for name, shape in (("gate", n_out), ("up", n_out), ("down", n_in)):
            w[f"blk.{il}.ffn_{name}_exps.weight"] = np.stack([draw.matrix(*shape) for _ in range(EXPERTS)])
        w[f"blk.{il}.ffn_gate_inp.weight"] = draw.matrix(EXPERTS, c.n_embd, 2.0)
    experts = {"expert_count": EXPERTS, "expert_used_count": EXPERTS_USED, "expert_feed_forward_length": EXPERT_FF}
    return experts | meta, w


def _qwen3vlmoe(c: TinyConfig, draw: Draw) -> tuple[dict[str, Any], Weights]:
    """Positions of four dimensions; text has nothing in the last. An image gives something to the first layer, too."""
    meta, w = _qwen3moe(c, draw)
    return {"rope.dimension_sections": [11, 9, 10, 2], "n_deepstack_layers": 1} | meta, w


TRAINED: dict[str, tuple[Writer, dict[str, Any]]] = {
    "qwen3moe": (_qwen3moe, {"rope_neox": True, "qk_norm": True}),
    "qwen3vlmoe": (_qwen3vlmoe, {"rope_neox": True, "qk_norm": True}),
}
