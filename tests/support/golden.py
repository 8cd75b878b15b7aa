"""Vectors computed by the PyTorch code of the method's authors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "golden"
SINKS, WINDOW, N_CONTEXT, N = 4, 16, 300, 380


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file; bfloat16 comes as float32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    arrays = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        kind = {"F32": "<f4", "I32": "<i4", "U8": "u1", "BF16": "<u2"}[entry["dtype"]]
        begin, end = (start + offset for offset in entry["data_offsets"])
        a = np.frombuffer(data[begin:end], kind).reshape(entry["shape"]).copy()
        arrays[name] = (a.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else a
    return arrays


GOLDEN = read_safetensors(FOLDER / "indexer.safetensors")
