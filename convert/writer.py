"""Writes a checkpoint as a sidecar, the GGUF file of docs/sidecar.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

import gguf
import numpy as np
import numpy.typing as npt

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.atomic import replacing

from .model import Array, Checkpoint
from .spec import BOOL, BOOLS, F32, F32S, LEAST_KEY, SHARE_KEY, STRING, U32, Kind

SCHEMA_ALL, SCHEMA_SOME = 1, 2  # for all layers of a model, and for those that it lists
LAYERS_KEY = "indexmem.layers"
OUTTYPES = ("f32", "f16", "q8_0")
_TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in OUTTYPES}
_F32, _F16, _Q8_0 = (_TYPES[name] for name in OUTTYPES)
_BLOCK = 32  # elements of a Q8_0 block

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """A class of tensors, one line of the summary. `shape` is in GGUF order, `bytes` of all layers together."""

    name: str
    count: int
    shape: tuple[int, ...]
    type: str
    bytes: int


@dataclass(frozen=True)
class Written:
    """What `write_sidecar` has done. `fallbacks` are matrices that could not be stored in the wanted type."""

    path: str
    size: int
    rows: tuple[Row, ...]
    fallbacks: tuple[str, ...]


def write_sidecar(
    path: Union[str, os.PathLike[str]],
    checkpoint: Checkpoint,
    outtype: str = "f16",
    force: bool = False,
    progress: Optional[Progress] = None,
) -> Written:
    """Writes a sidecar; it appears complete or not at all.

    Args:
        outtype: type of the matrices, `f32`, `f16` or `q8_0`. Rows that are no multiple of 32 are F16 instead of Q8_0.
        progress: called with the tensors done and their number.

    Raises:
        ConvertError: the checkpoint is invalid, a weight does not fit the type, or the file cannot be written.
    """
    if outtype not in _TYPES:
        raise ConvertError(f"unknown type {outtype!r}: expected {', '.join(OUTTYPES)}")
    checkpoint = checkpoint.validated()
    if not checkpoint.provenance.source_files:
        raise ConvertError("the provenance names no source file, and a sidecar must")
    with replacing(path, force) as temporary:
        writer = gguf.GGUFWriter(temporary, checkpoint.architecture)
        try:
            _put_metadata(writer, checkpoint)
            rows, fallbacks = _put_tensors(writer, checkpoint, outtype, progress)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        size = os.path.getsize(temporary)
    return Written(os.fspath(path), size, rows, fallbacks)


def _put_metadata(writer: gguf.GGUFWriter, c: Checkpoint) -> None:
    writer.add_type("adapter")
    if c.name:
        writer.add_string("general.name", c.name)
    if c.base_model:
        writer.add_uint32("general.base_model.count", 1)
        writer.add_string("general.base_model.0.name", c.base_model)
    writer.add_string("adapter.type", "indexmem")
    writer.add_uint32("indexmem.schema_version", SCHEMA_ALL if c.only is None else SCHEMA_SOME)
    for name, value in c.geometry.to_dict().items():
        writer.add_uint32(GEOMETRY_KEYS[name], value)
    if c.only is not None:
        writer.add_array(LAYERS_KEY, list(c.only))
    if c.budget_share is not None:
        writer.add_array(SHARE_KEY, list(c.budget_share))
    if c.budget_least is not None:
        writer.add_array(LEAST_KEY, list(c.budget_least))
    if c.fingerprint:
        writer.add_string("indexmem.base_model.norms_fnv1a64", c.fingerprint)
    indexer, memory = c.kinds
    writer.add_string("indexmem.indexer.kind", indexer.name)
    writer.add_string("indexmem.indexer.input", "attention_input")
    writer.add_string("indexmem.memory.kind", memory.name)
    _put_constants(writer, indexer, c.constants)
    _put_constants(writer, memory, c.memory_constants)
    for name, value in c.defaults.items():
        writer.add_uint32(f"indexmem.defaults.{name}", value)
    for name, score in c.scores.items():
        writer.add_float32(f"indexmem.scores.{name}", score)
    p = c.provenance
    writer.add_string("indexmem.provenance.tool", p.tool)
    writer.add_string("indexmem.provenance.source_format", p.source_format)
    writer.add_array("indexmem.provenance.source_files", list(p.source_files))
    writer.add_array("indexmem.provenance.source_sha256", list(p.source_sha256))
    if p.trained_on:
        writer.add_string("indexmem.provenance.trained_on", p.trained_on)
    if p.step is not None:
        writer.add_uint32("indexmem.provenance.step", p.step)


GEOMETRY_KEYS = {
    "block_count": "indexmem.block_count",
    "embedding_length": "indexmem.embedding_length",
    "head_count_kv": "indexmem.attention.head_count_kv",
    "head_count": "indexmem.attention.head_count",
    "key_length": "indexmem.attention.key_length",
}


def _put_constants(writer: gguf.GGUFWriter, kind: Kind, constants: Mapping[str, Any]) -> None:
    add: dict[str, Callable[[str, Any], None]] = {
        U32: writer.add_uint32, F32: writer.add_float32, BOOL: writer.add_bool, STRING: writer.add_string,
        F32S: writer.add_array, BOOLS: writer.add_array,
    }  # fmt: skip
    for c in kind.constants:
        if c.name in constants:
            add[c.type](f"indexmem.{kind.name}.{c.name}", constants[c.name])


def _put_tensors(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, outtype: str, progress: Optional[Progress]
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    shapes = checkpoint.shapes()
    done, total = 0, len(shapes) * len(checkpoint.numbers)
    types = {name: _type(outtype, shape, matrix) for name, (shape, matrix) in shapes.items()}
    sizes = dict.fromkeys(shapes, 0)
    for i in checkpoint.numbers:
        for name in shapes:
            data = _pack(f"layer {i}: {name}", checkpoint.layers[i][name], types[name])
            writer.add_tensor(f"blk.{i}.indexmem.{name}", data, raw_dtype=types[name])
            sizes[name] += data.nbytes
            done += 1
            if progress is not None:
                progress(done, total)
    rows = tuple(
        Row(name, len(checkpoint.numbers), shape[::-1], types[name].name, sizes[name])
        for name, (shape, _) in shapes.items()
    )
    wanted = _TYPES[outtype]
    return rows, tuple(name for name, (_, matrix) in shapes.items() if matrix and types[name] != wanted)


def _type(outtype: str, shape: tuple[int, ...], matrix: bool) -> gguf.GGMLQuantizationType:
    if not matrix:
        return _F32
    return _F16 if outtype == "q8_0" and shape[-1] % _BLOCK else _TYPES[outtype]


def _pack(what: str, array: Array, kind: gguf.GGMLQuantizationType) -> npt.NDArray[Any]:
    with np.errstate(all="ignore"):  # an overflow shows in the result
        packed = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        if kind != _F32 and not np.isfinite(gguf.quants.dequantize(packed, kind)).all():
            largest = float(np.abs(array).max())
            raise ConvertError(f"{what} has a weight of {largest:.6g}, too large for {kind.name}: use --outtype f32")
    return packed
