"""What a sidecar has to say to fit a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def shape(config: Any) -> Any:
    from indexmem_edge.bench.synthetic import Shape

    return Shape(config.arch, config.n_layer, config.n_embd, config.n_head, config.n_head_kv, config.head_dim)


def fingerprint(model: Path) -> str:
    from indexmem_edge.files.modelfile import loaded_model
    from indexmem_edge.native import api

    with loaded_model(str(model)) as loaded:
        return api.fingerprint(loaded)
