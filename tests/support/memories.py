"""Memories of tiny models."""

from __future__ import annotations

import pytest

from reference.memories import Memory, random_centroid, random_residual
from tiny.models import TinyConfig

KINDS = ["centroid", "residual"]
each_kind = pytest.mark.parametrize("kind", KINDS)
SLOTS = 8


def random_memory(kind: str, config: TinyConfig, n_slots: int = SLOTS, seed: int = 0) -> Memory:
    if kind == "centroid":
        return random_centroid(config.n_layer, n_slots, seed)
    return random_residual(config.n_layer, config.head_dim, seed=seed)


