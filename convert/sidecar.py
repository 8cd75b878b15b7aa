"""Reads a sidecar back, checking it as strictly as docs/sidecar.md asks of every reader."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Optional, Union

import gguf
import numpy as np

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.gguffile import F16, F32, TYPE_NAMES, GGUFFile, TensorInfo
from indexmem_edge.files.untrusted import quote, show

from .model import Array, Checkpoint, Geometry, Provenance, check_only, layers_from
from .spec import F32S, INDEXERS, LEAST_KEY, MEMORIES, SHARE_KEY, Kind, find
from .writer import GEOMETRY_KEYS, LAYERS_KEY, SCHEMA_ALL, SCHEMA_SOME


@dataclass(frozen=True)
class Sidecar:
    """A sidecar in memory.

    `metadata` maps every key of the file, known or not, to its value. `tensors` maps `blk.<layer>.indexmem.<name>` to
    float32 arrays in PyTorch order (`[out, in]`), exact for F32 and what the runtime computes with for F16 and Q8_0.
    `types` are the stored types. `checkpoint` is the same in the form that every writer takes.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Array]
    types: dict[str, str]
    checkpoint: Checkpoint


def read_sidecar(path: Union[str, os.PathLike[str]]) -> Sidecar:
    """Reads and checks a sidecar.

    Raises:
        ConvertError: it cannot be read, is no sidecar, is damaged, or breaks a rule of the format.
    """
    name = os.fspath(path)
    try:
        with GGUFFile(name) as file:
            return _read(file)
    except ConvertError as error:
        raise ConvertError(f"{name} is not a readable sidecar: {error}") from None
    except MemoryError:
        raise ConvertError(f"there is not enough memory to read {name}") from None
    except Exception as error:  # a file of unknown origin must not end in a traceback, whatever it holds
        raise ConvertError(f"{name} is not a readable sidecar: {type(error).__name__}: {error}") from error


def _read(file: GGUFFile) -> Sidecar:
    def need(key: str, kind: str) -> Any:
        value = file.get(key, kind)
        if value is None:
            raise ConvertError(f"{key} is missing")
        return value

    for key, expected in (("general.type", "adapter"), ("adapter.type", "indexmem")):
        if need(key, "string") != expected:
            raise ConvertError(f"{key} is {quote(file.metadata[key].value)}, expected {expected!r}")
    schema = need("indexmem.schema_version", "u32")
    if schema not in (SCHEMA_ALL, SCHEMA_SOME):
        raise ConvertError(f"it has schema {schema}, this program reads up to {SCHEMA_SOME}: use a newer indexmem-edge")
    if need("indexmem.indexer.input", "string") != "attention_input":
        raise ConvertError(f"indexmem.indexer.input is {show(file.metadata['indexmem.indexer.input'].value)}")
    geometry = Geometry(**{
        name: file.get(key, "u32") if name in ("head_count", "key_length") else need(key, "u32")
        for name, key in GEOMETRY_KEYS.items()
    })  # fmt: skip
    only = check_only(_layers(file, schema), geometry.validated().block_count)
    indexer = find(INDEXERS, "indexer", need("indexmem.indexer.kind", "string"))
    memory = find(MEMORIES, "memory", need("indexmem.memory.kind", "string"))
    shares, least = file.get(SHARE_KEY, F32S), file.get(LEAST_KEY, "i32 array")
    file.check_packed()
    arrays = {info.name: _array(file, info) for info in file.tensors.values()}
    checkpoint = Checkpoint(
        geometry=geometry,
        kind=indexer.name,
        constants=_constants(file, indexer),
        layers=layers_from(arrays, geometry, only),
        only=only,
        budget_share=None if shares is None else tuple(shares),
        budget_least=None if least is None else tuple(least),
        memory=memory.name,
        memory_constants=_constants(file, memory),
        architecture=need("general.architecture", "string"),
        name=file.get("general.name", "string"),
        base_model=file.get("general.base_model.0.name", "string"),
        fingerprint=file.get("indexmem.base_model.norms_fnv1a64", "string"),
        defaults=_group(file, "indexmem.defaults.", "u32", ("sinks", "window", "budget")),
        scores=_group(file, "indexmem.scores.", "f32"),
        provenance=Provenance(
            source_format=need("indexmem.provenance.source_format", "string"),
            source_files=tuple(need("indexmem.provenance.source_files", "string array")),
            source_sha256=tuple(need("indexmem.provenance.source_sha256", "string array")),
            trained_on=file.get("indexmem.provenance.trained_on", "string"),
            step=file.get("indexmem.provenance.step", "u32"),
            tool=need("indexmem.provenance.tool", "string"),
        ),
    ).validated(texts=False)
    _check_types(file, checkpoint)
    types = {info.name: TYPE_NAMES[info.type] for info in file.tensors.values()}
    return Sidecar({k: v.value for k, v in file.metadata.items()}, checkpoint.tensors(), types, checkpoint)


def _layers(file: GGUFFile, schema: int) -> Any:
    """The layers that the file is for, None if these are all: schema 1 has no list of them, and schema 2 must have one."""
    found = file.get(LAYERS_KEY, "i32 array")
    if (found is not None) != (schema == SCHEMA_SOME):
        raise ConvertError(f"it has schema {schema} and {'' if found is not None else 'no '}{LAYERS_KEY}")
    return None if found is None else [int(i) for i in found]


def _constants(file: GGUFFile, kind: Kind) -> dict[str, Any]:
    found = {c.name: file.get(f"indexmem.{kind.name}.{c.name}", c.type) for c in kind.constants}
    return {name: value for name, value in found.items() if value is not None}


def _group(file: GGUFFile, prefix: str, kind: str, only: Optional[tuple[str, ...]] = None) -> dict[str, Any]:
    names = [key[len(prefix) :] for key in file.metadata if key.startswith(prefix)]
    return {name: file.get(prefix + name, kind) for name in names if only is None or name in only}


def _check_types(file: GGUFFile, checkpoint: Checkpoint) -> None:
    for name, (_, matrix) in checkpoint.shapes().items():
        for i in checkpoint.numbers:
            info = file.tensors[f"blk.{i}.indexmem.{name}"]
            if not matrix and info.type != F32:
                raise ConvertError(f"tensor {quote(info.name)} is {TYPE_NAMES[info.type]}, expected F32")


def _array(file: GGUFFile, info: TensorInfo) -> Array:
    data = file.read(info)
    shape = info.dims[::-1]
    if info.type == F32:
        return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)
    if info.type == F16:
        return np.frombuffer(data, "<f2").astype(np.float32).reshape(shape)
    rows = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
    array: Array = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q8_0)
    return array.reshape(shape)
