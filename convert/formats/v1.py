"""`v1`: a plain state dict of IndexMem v1 (arXiv 2605.25475), as PyTorch or safetensors, in one file or two.

    model.layers.<n>.self_attn.indexer.{w_q,w_k,weights_proj}.{weight,bias}, .{q_norm,k_norm}.{weight,bias}
    model.layers.<n>.self_attn.kvpress_memory.phi_proj.weight, .gate_logit, .eta_raw, .decay_logit

The released code differs from the paper: queries come from the hidden state, norms are LayerNorm, and scores are the
mean over the last 128 queries and not their maximum.
"""

from __future__ import annotations

import re
from typing import Any, Optional

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.untrusted import quote

from ..model import Array, Checkpoint, Geometry, Layer, contiguous
from ..safefile import SafeFile
from ..sources import SAFETENSORS, TORCH, ReadOptions, SourceFile, Sources, mapping, to_array

NAME = "v1"
_PARAM = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.self_attn\.(indexer|kvpress_memory)\.(.+)", re.S)
_SCALARS = ("gate_logit", "eta_raw", "decay_logit")
_NORM_EPS, _MEMORY_EPS = 1e-5, 1e-6
REDUCE, QUERY_COUNT = "mean", 128


def detect(sources: Sources) -> bool:
    """A state dict with such a name."""
    return any(_PARAM.fullmatch(key) for f in sources.of(TORCH, SAFETENSORS) for key in f.keys)


def read(sources: Sources, options: ReadOptions) -> Checkpoint:
    """Reads one file, or an indexer and a memory from two.

    Raises:
        ConvertError: a name is unknown or there twice, layers differ, or the number of KV heads is not known.
    """
    files = sources.of(TORCH, SAFETENSORS)
    sources.expect_only(*files)
    if not 1 <= len(files) <= 2:
        raise ConvertError(f"a v1 checkpoint is one file, or an indexer and a memory; found {len(files)} files")
    parts: dict[str, dict[int, Layer]] = {"indexer": {}, "kvpress_memory": {}}
    for file in files:
        _collect(file, parts)
    indexer = contiguous(parts["indexer"]) if parts["indexer"] else []
    memory = contiguous(parts["kvpress_memory"]) if parts["kvpress_memory"] else []
    if not indexer and not memory:
        raise ConvertError("there is neither an indexer nor a memory in it")
    if indexer and memory and len(indexer) != len(memory):
        raise ConvertError(
            f"the indexer has {len(indexer)} layers, the memory {len(memory)}: they are of different models"
        )
    memory_constants = _memory_constants(memory) if memory else {}
    layers = [{**a, **b} for a, b in zip(indexer, memory)] if indexer and memory else indexer or memory
    return Checkpoint(
        geometry=Geometry(
            len(layers), _embedding_length(indexer, options), _kv_heads(options), None, memory_constants.get("head_dim")
        ),
        kind="pairwise" if indexer else "none",
        constants=_indexer_constants(indexer[0], options) if indexer else _no_constants(options),
        layers=layers,
        provenance=sources.provenance(NAME),
        memory="residual" if memory else "none",
        memory_constants=memory_constants,
    )


def _collect(file: SourceFile, parts: dict[str, dict[int, Layer]]) -> None:
    tensors = file.content.tensors if isinstance(file.content, SafeFile) else mapping(str(file.path), file.content)
    for key, value in tensors.items():
        match = _PARAM.fullmatch(key)
        if match is None:
            raise ConvertError(
                f"{file.path}: unexpected name {quote(key)}; a v1 checkpoint holds indexers and memories alone, since "
                "weights of a trained base model must not be left out silently"
            )
        layer = parts[match.group(2)].setdefault(int(match.group(1)), {})
        if match.group(3) in layer:
            raise ConvertError(f"{file.path}: {quote(key)} is in both files")
        layer[match.group(3)] = to_array(key, value)


def _indexer_constants(layer: Layer, options: ReadOptions) -> dict[str, Any]:
    return {
        "head_count": _matrix(layer, "weights_proj.weight").shape[0],
        "head_dim": _matrix(layer, "w_k.weight").shape[0],
        "norm_eps": _NORM_EPS,
        "reduce": REDUCE if options.reduce is None else options.reduce,
        "query_count": QUERY_COUNT if options.query_count is None else options.query_count,
    }


def _no_constants(options: ReadOptions) -> dict[str, Any]:
    if options.reduce is not None or options.query_count is not None:
        raise ConvertError("--reduce and --query-count are for indexers, and there is only a memory")
    return {}


def _memory_constants(layers: list[Layer]) -> dict[str, Any]:
    feature_dim, head_dim = _matrix(layers[0], "phi_proj.weight").shape
    constants: dict[str, Any] = {"feature_dim": feature_dim, "head_dim": head_dim, "eps": _MEMORY_EPS}
    for name in _SCALARS:
        constants[name] = [_scalar(i, layer, name) for i, layer in enumerate(layers)]
    constants["enabled"] = [True] * len(layers)
    return constants


def _scalar(i: int, layer: Layer, name: str) -> float:
    array: Optional[Array] = layer.pop(name, None)
    if array is None or array.size != 1:
        found = "nothing" if array is None else list(array.shape)
        raise ConvertError(f"layer {i}: {name} of the memory must be one number, found {found}")
    return float(array.reshape(()))


def _matrix(layer: Layer, name: str) -> Array:
    if name not in layer or layer[name].ndim != 2:
        found = f"{list(layer[name].shape)}" if name in layer else "nothing"
        raise ConvertError(f"layer 0: {name} must be a matrix, found {found}")
    return layer[name]


def _embedding_length(indexer: list[Layer], options: ReadOptions) -> int:
    if indexer:
        return int(_matrix(indexer[0], "w_k.weight").shape[1])
    if options.base is None:
        raise ConvertError(
            "a memory alone does not say for which embedding length it is: name its base model with --model"
        )
    return options.base.geometry.embedding_length


def _kv_heads(options: ReadOptions) -> int:
    if options.kv_heads is not None:
        return options.kv_heads
    if options.base is None:
        raise ConvertError(
            "a v1 checkpoint does not say for how many KV heads it is: name its base model with --model, or the number "
            "with --kv-heads"
        )
    return options.base.geometry.head_count_kv
