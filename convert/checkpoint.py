"""This project's own checkpoint: what the trainer writes, and what a sidecar is exported to.

A safetensors file. Tensors are `blk.<layer>.indexmem.<name>`, with the names of docs/sidecar.md and PyTorch's order of
dimensions (`[out, in]`), F32 when written here; F16, BF16 and F64 are read as well. Its metadata hold one JSON text
under `indexmem`:

    {"schema": 1, "kind": "retention", "constants": {"trunk": "mlp", ...}, "memory": {"kind": "none", "constants": {}},
     "geometry": {"block_count": 36, "embedding_length": 4096, "head_count_kv": 8, ...},
     "base_model": {"architecture": "qwen3", "name": "...", "norms_fnv1a64": "..."},
     "name": "...", "defaults": {"budget": 2048, ...}, "scores": {...},
     "provenance": {"tool": "...", "source_format": "indexmem-edge", "source_files": [], "source_sha256": [], ...}}

`schema`, `kind`, `constants`, `memory`, `geometry` and `provenance` must be there; other keys are ignored. A checkpoint for
some layers of its model has schema 2 and their numbers, `"layers": [5, 11]`; what of a budget each layer gets is `"budget_share"`,
and how many entries first `"budget_least"`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Union

import numpy as np

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.atomic import replacing
from indexmem_edge.files.untrusted import check_text, show

from . import safefile
from .model import UNKNOWN, Checkpoint, Geometry, Provenance, check_only, layers_from
from .safefile import SafeFile
from .writer import SCHEMA_ALL, SCHEMA_SOME

METADATA_KEY = "indexmem"
_MAX_JSON = 16 << 20


def write_checkpoint(path: Union[str, os.PathLike[str]], checkpoint: Checkpoint, force: bool = False) -> int:
    """Writes a checkpoint, complete or not at all, and returns the size of the file.

    Raises:
        ConvertError: the checkpoint is invalid, or the file cannot be written.
    """
    from safetensors.numpy import save_file

    checkpoint = checkpoint.validated()
    tensors = {name: np.ascontiguousarray(array) for name, array in checkpoint.tensors().items()}
    with replacing(path, force) as temporary:
        save_file(tensors, temporary, {METADATA_KEY: json.dumps(describe(checkpoint), allow_nan=False)})
        return os.path.getsize(temporary)


def read_checkpoint(path: Union[str, os.PathLike[str]]) -> Checkpoint:
    """Reads a checkpoint that `write_checkpoint` wrote, with the provenance it was given.

    Raises:
        ConvertError: the file is damaged, or is none.
    """
    return from_safefile(safefile.load(path)).validated()


def describe(c: Checkpoint) -> dict[str, Any]:
    """Everything of a checkpoint but its tensors, as plain JSON values."""
    base = {"architecture": c.architecture, "name": c.base_model, "norms_fnv1a64": c.fingerprint}
    return {
        "schema": SCHEMA_ALL if c.only is None else SCHEMA_SOME,
        "kind": c.kind,
        "constants": dict(c.constants),
        "memory": {"kind": c.memory, "constants": dict(c.memory_constants)},
        "geometry": c.geometry.to_dict(),
        **({} if c.only is None else {"layers": list(c.only)}),
        **({} if c.budget_share is None else {"budget_share": list(c.budget_share)}),
        **({} if c.budget_least is None else {"budget_least": list(c.budget_least)}),
        "base_model": {key: value for key, value in base.items() if value is not None},
        **({"name": c.name} if c.name else {}),
        "defaults": dict(c.defaults),
        "scores": dict(c.scores),
        "provenance": {key: value for key, value in asdict(c.provenance).items() if value is not None},
    }


def from_safefile(file: SafeFile) -> Checkpoint:
    """The checkpoint in an open safetensors file, not yet validated.

    Raises:
        ConvertError: the metadata are not as this page says, or a tensor cannot be read.
    """
    d = _metadata(file)
    memory = _dict(d, "memory")
    base = _dict(d, "base_model", {})
    numbers = _dict(d, "geometry")
    unknown = [key for key in numbers if key not in Geometry.__dataclass_fields__]
    if unknown:
        raise ConvertError(f"geometry: unexpected key {show(unknown[0])}")
    for key in ("block_count", "embedding_length", "head_count_kv"):
        if key not in numbers:
            raise ConvertError(f"geometry: {key!r} is missing")
    geometry = Geometry(**numbers)
    only = check_only(d.get("layers"), geometry.validated().block_count)
    return Checkpoint(
        geometry=geometry,
        kind=_need(d, "kind"),
        constants=_dict(d, "constants"),
        layers=layers_from({name: tensor.read() for name, tensor in file.tensors.items()}, geometry, only),
        only=only,
        budget_share=d.get("budget_share"),
        budget_least=d.get("budget_least"),
        provenance=_provenance(_dict(d, "provenance")),
        memory=_need(memory, "kind"),
        memory_constants=_dict(memory, "constants"),
        architecture=base.get("architecture", UNKNOWN),
        name=d.get("name"),
        base_model=base.get("name"),
        fingerprint=base.get("norms_fnv1a64"),
        defaults=_dict(d, "defaults", {}),
        scores=_dict(d, "scores", {}),
    )


def _metadata(file: SafeFile) -> dict[str, Any]:
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        raise ConvertError(f"it has no metadata {METADATA_KEY!r}: it is not a checkpoint of indexmem-edge")
    if len(text) > _MAX_JSON:
        raise ConvertError(f"its metadata have {len(text)} characters")
    try:
        d = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"its metadata are not JSON: {error}") from None
    if not isinstance(d, dict):
        raise ConvertError("its metadata are not a JSON object")
    schema = _need(d, "schema")
    if type(schema) is not int or schema not in (SCHEMA_ALL, SCHEMA_SOME):
        raise ConvertError(
            f"it has schema {show(schema)}, this program reads up to {SCHEMA_SOME}: use a newer indexmem-edge"
        )
    if ("layers" in d) != (schema == SCHEMA_SOME):
        raise ConvertError(f"it has schema {schema} and {'' if 'layers' in d else 'no '}layers")
    return d


def _provenance(p: Mapping[str, Any]) -> Provenance:
    more: dict[str, Any] = {"tool": p["tool"]} if "tool" in p else {}
    for key in ("source_files", "source_sha256"):
        value = p.get(key, [])
        if not isinstance(value, list):
            raise ConvertError(f"provenance: {key} must be a list, found {show(value)}")
        more[key] = tuple(value)
    return Provenance(
        source_format=check_text("provenance: source_format", _need(p, "source_format")),
        trained_on=p.get("trained_on"),
        step=p.get("step"),
        **more,
    )


def _need(d: Mapping[str, Any], key: str) -> Any:
    if key not in d:
        raise ConvertError(f"its metadata lack {key!r}")
    return d[key]


def _dict(d: Mapping[str, Any], key: str, default: Any = None) -> dict[str, Any]:
    value = d.get(key, default) if default is not None else _need(d, key)
    if not isinstance(value, dict):
        raise ConvertError(f"its metadata: {key} must be an object, found {show(value)}")
    return value
