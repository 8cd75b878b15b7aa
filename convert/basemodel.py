"""What a converter must know of the base model: its geometry and fingerprint, out of its GGUF file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import numpy as np

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.fingerprint import norms_fingerprint
from indexmem_edge.files.gguffile import F32, GGUFFile
from indexmem_edge.files.modelfile import check_model_file
from indexmem_edge.files.untrusted import MAX_TEXT, check_text, quote

from .model import UNKNOWN, Checkpoint, Geometry

_INTEGERS = ("u32", "i32", "u64")


@dataclass(frozen=True)
class BaseModel:
    """The base model of a checkpoint. `name` is None if the file has none that could be shown."""

    architecture: str
    geometry: Geometry
    name: Optional[str]
    fingerprint: Optional[str]


def read_base_model(path: Union[str, os.PathLike[str]], fingerprint: bool = True) -> BaseModel:
    """Reads the header of a model, and its norms if a fingerprint is wanted.

    Raises:
        ConvertError: the file is damaged, or lacks what a checkpoint is compared with.
        ModelFileError: it is missing or not GGUF.
    """
    file_name = check_model_file(path)
    with GGUFFile(file_name) as file:
        if file.get("general.type", "string") not in (None, "model"):
            raise ConvertError(
                f"{file_name} is no model: its general.type is {quote(file.get('general.type', 'string'))}"
            )
        arch = check_text(f"general.architecture of {file_name}", file.get("general.architecture", "string"))
        geometry = _geometry(file_name, file, arch)
        name = file.get("general.name", "string")
        usable = bool(name) and len(name) <= MAX_TEXT and name.isprintable()
        found = _fingerprint(file_name, file) if fingerprint else None
        return BaseModel(arch, geometry, name if usable else None, found)


def _geometry(file_name: str, file: GGUFFile, arch: str) -> Geometry:
    def number(key: str) -> Optional[int]:
        value: Any = file.get(f"{arch}.{key}", *_INTEGERS, *(f"{t} array" for t in _INTEGERS))
        if isinstance(value, (list, np.ndarray)):
            values = _of_bounded_layers(value, file.get(f"{arch}.attention.sliding_window_pattern", "bool array", *_INTEGERS))
            if len(values) > 1:
                raise ConvertError(f"{file_name}: {key} differs between layers, sidecars are for models with one value")
            value = values.pop() if values else 0
        found: Optional[int] = value
        return found

    def needed(key: str) -> int:
        value = number(key)
        if value is None:
            raise ConvertError(f"{file_name} has no {arch}.{key}: is it a language model with attention?")
        return value

    n_embd, n_head = needed("embedding_length"), needed("attention.head_count")
    n_head_kv = number("attention.head_count_kv")
    guessing = number("nextn_predict_layers") or 0  # layers behind the last one, which the file counts and the library does not
    return Geometry(
        block_count=needed("block_count") - guessing,
        embedding_length=n_embd,
        head_count_kv=n_head if n_head_kv is None else n_head_kv,
        head_count=n_head,
        key_length=number("attention.key_length") or n_embd // max(n_head, 1),
    ).validated()


def _of_bounded_layers(values: Any, windows: Any) -> set[int]:
    """Of a number for each layer, those of layers with attention, and of these only such as have no window if some have one.

    Args:
        windows: which do, as a list; anything else says nothing about single layers.
    """
    numbers = [int(n) for n in values]
    if isinstance(windows, (list, np.ndarray)) and len(windows) == len(numbers) and not all(windows):
        numbers = [n for n, has_window in zip(numbers, windows) if not has_window]
    return set(numbers) - {0}


def _fingerprint(file_name: str, file: GGUFFile) -> str:
    if (file.get("split.count", "u16", *_INTEGERS) or 1) > 1:
        raise ConvertError(
            f"{file_name} is one part of a split model, and the norms are in all parts: merge them with "
            "llama-gguf-split --merge, or leave the fingerprint out with --no-fingerprint"
        )
    norms = [info for info in file.tensors.values() if info.name.endswith("norm.weight") and info.type == F32]
    if not norms:
        raise ConvertError(f"{file_name} has no norms in F32 to identify it by: use --no-fingerprint")
    return norms_fingerprint((info.name, file.read(info)) for info in norms)


def bind(checkpoint: Checkpoint, base: BaseModel) -> Checkpoint:
    """Checks a checkpoint against its base model, and returns it with what the model's file adds.

    Raises:
        ConvertError: they do not belong together; the message names the first difference.
    """
    if checkpoint.architecture not in (UNKNOWN, base.architecture):
        raise ConvertError(
            f"the checkpoint is for architecture {quote(checkpoint.architecture)}, the model is "
            f"{quote(base.architecture)}"
        )
    wanted = base.geometry.to_dict()
    for key, value in checkpoint.geometry.to_dict().items():
        if value != wanted[key]:
            raise ConvertError(f"the checkpoint is for a model with {key} {value}, this one has {wanted[key]}")
    if None not in (checkpoint.fingerprint, base.fingerprint) and checkpoint.fingerprint != base.fingerprint:
        raise ConvertError(
            f"the checkpoint was made for the model with fingerprint {checkpoint.fingerprint}, this one has "
            f"{base.fingerprint}; if it is a fine-tune of that model, use --no-fingerprint"
        )
    return replace(
        checkpoint,
        architecture=base.architecture,
        geometry=base.geometry,
        base_model=base.name or checkpoint.base_model,
        fingerprint=base.fingerprint,
    )
