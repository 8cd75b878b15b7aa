"""`fast-kvzip`: the `.pt` of Fast-KVzip (arXiv 2601.17668), a list of state dicts under `module`, one a layer.

q_proj.weight [H*g*dim, d]   q_proj.bias [H*g*dim]   k_proj.weight [H*dim, d]
q_norm.weight [dim]          k_norm.weight [dim]     k_base [H, 1, n, dim]      b [H, 1, g]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from indexmem_edge.errors import ConvertError

from ..model import Array, Checkpoint, Geometry, Layer
from ..sources import TORCH, ReadOptions, Sources, expect_keys, mapping, to_array
from ..spec import LIMITS

NAME = "fast-kvzip"
_NORM_EPS = 1e-6
_TENSORS = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b")


def detect(sources: Sources) -> bool:
    """A PyTorch file with `module`, a list or a tuple."""
    return any(
        isinstance(f.content, Mapping) and isinstance(f.content.get("module"), (list, tuple)) for f in sources.of(TORCH)
    )


def read(sources: Sources, options: ReadOptions) -> Checkpoint:
    """Reads the file. Other keys than `module` describe the training and are left alone.

    Raises:
        ConvertError: a tensor is missing, unknown or of another shape.
    """
    file = sources.one("a Fast-KVzip checkpoint", TORCH)
    sources.expect_only(file)
    module = mapping(str(file.path), file.content).get("module")
    if not isinstance(module, (list, tuple)) or not 1 <= len(module) <= LIMITS["block_count"]:
        raise ConvertError("expected a list of layers under 'module'")
    layers = [_layer(i, state) for i, state in enumerate(module)]
    heads, base_count, dim = layers[0]["k_base"].shape
    constants = {"group_count": layers[0]["b"].shape[1], "dim": dim, "base_count": base_count, "norm_eps": _NORM_EPS}
    width = layers[0]["k_proj.weight"]
    if width.ndim != 2:
        raise ConvertError(f"layer 0: k_proj.weight is {list(width.shape)}, expected a matrix")
    return Checkpoint(
        Geometry(len(layers), width.shape[1], heads), "fast_kvzip", constants, layers, sources.provenance(NAME)
    )


def _layer(i: int, state: Any) -> Layer:
    where = f"module[{i}]"
    state = mapping(where, state)
    expect_keys(where, state, _TENSORS)
    layer = {name: to_array(f"{where}.{name}", state[name]) for name in _TENSORS}
    layer["k_base"] = _without_axis_1(where, "k_base", layer["k_base"], 4)
    layer["b"] = _without_axis_1(where, "b", layer["b"], 3)
    return layer


def _without_axis_1(where: str, name: str, array: Array, ndim: int) -> Array:
    """The batch axis of the authors' products, which is always 1."""
    if array.ndim != ndim or array.shape[1] != 1:
        raise ConvertError(f"{where}: {name} is {list(array.shape)}, expected {ndim} dimensions with 1 as the second")
    return array.reshape(array.shape[:1] + array.shape[2:])
