"""Decoders from GGUF files: every tensor type that the package gguf can dequantise."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Optional, Union

import gguf
import numpy as np
import torch
from torch import Tensor

from .._modelfile import check_model_file
from ..convert.errors import ConvertError
from ..convert.gguffile import GGUFFile, TensorInfo
from ..convert.text import quote
from ..errors import ModelFileError
from .architectures import ROPE_FACTORS, architecture, check_config, check_factors, check_tensors, unsupported
from .decoder import Config, Decoder, stored_dtype
from .rope import make_rope

_INTEGERS = ("u16", "u32", "i32", "u64")
_FLOATS = ("f32", "f64")
_CHUNK = 1 << 22  # elements that are dequantised at once
_FEATURES = {  # keys, the values that change nothing, and what any other value means
    "expert_count": ((0,), "expert layers"),
    "attention.sliding_window": ((0,), "a sliding window"),
    "attn_logit_softcapping": ((0,), "a soft cap of attention logits"),
    "final_logit_softcapping": ((0,), "a soft cap of logits"),
    "attention.clamp_kqv": ((0,), "clamped queries, keys and values"),
    "attention.max_alibi_bias": ((0,), "ALiBi"),
    "attention.causal": ((True,), "attention that is not causal"),
    "logit_scale": ((0, 1), "a scale of logits"),
    "embedding_scale": ((0, 1), "a scale of embeddings"),
    "residual_scale": ((0, 1), "a scale of residuals"),
    "nextn_predict_layers": ((0,), "layers that predict further tokens"),
}


def load_gguf(
    path: Union[str, os.PathLike[str]], dtype: torch.dtype = torch.bfloat16, device: Union[str, torch.device] = "cpu"
) -> Decoder:
    """Reads a model, some rows of a tensor at a time, straight into `dtype` on `device`; norms stay float32.

    Raises:
        ModelFileError: the file is missing, not GGUF, damaged, or has a tensor type that cannot be read.
        ModelNotSupported: it is fine, but nothing that training knows.
    """
    where = check_model_file(path)
    try:
        with GGUFFile(where) as file:
            config = _config(where, file)
            types = {info.type: _type(where, info) for info in file.tensors.values()}
            for info in file.tensors.values():  # whole, before minutes are spent on reading
                size = _rows(info) * _row_bytes(where, info, types[info.type])
                file.read_part(info, size, size)
            config = _with_rope_factors(where, file, config, types)
            weights = {
                name: _load(where, file, info, types[info.type], stored_dtype(name, dtype), device)
                for name, info in file.tensors.items()
                if name != ROPE_FACTORS
            }
    except ConvertError as error:
        message = str(error)
        raise ModelFileError(message if where in message else f"{where}: {message}") from None
    return Decoder(config, weights)


# metadata


def _config(where: str, file: GGUFFile) -> Config:
    if file.get("general.type", "string") not in (None, "model"):
        raise ModelFileError(f"{where} is no model: its general.type is {quote(file.get('general.type', 'string'))}")
    if (file.get("split.count", *_INTEGERS) or 1) > 1:
        raise ModelFileError(f"{where} is one part of a split model: merge the parts with llama-gguf-split --merge")
    arch = file.get("general.architecture", "string")
    if arch is None:
        raise ModelFileError(f"{where} has no general.architecture: is it a language model?")
    known = architecture(where, arch)
    for key, (neutral, meaning) in _FEATURES.items():
        value = file.metadata.get(f"{arch}.{key}")
        if value is not None and (value.type.endswith("array") or value.value not in neutral):
            raise unsupported(where, f"{meaning} ({arch}.{key})")

    read = _Metadata(where, file, arch)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.dims) != 2:
        raise ModelFileError(f"{where} lacks the matrix token_embd.weight: is it a language model?")
    n_head, n_embd = read.count("attention.head_count"), read.count("embedding_length")
    head_dim = read.count("attention.key_length", n_embd // n_head)
    if read.count("attention.value_length", n_embd // n_head) != head_dim:
        raise unsupported(where, "values of another length than keys")
    scale = read.number("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        raise unsupported(where, f"a scale of attention of its own ({arch}.attention.scale)")
    n_ctx = read.count("context_length")
    kind = file.get(f"{arch}.rope.scaling.type", "string") or "linear"
    if kind not in ("none", "linear", "yarn"):
        raise unsupported(where, f"rope scaling {quote(kind)}")
    rope = make_rope(
        base=read.number("rope.freq_base", 10000.0),
        n_dim=read.count("rope.dimension_count", head_dim),
        interleaved=known.interleaved,
        kind=kind,
        factor=read.number("rope.scaling.factor", read.number("rope.scale_linear", 0.0)),  # the second is its old name
        n_ctx_orig=read.count("rope.scaling.original_context_length", n_ctx),
        attn_factor=read.number("rope.scaling.attn_factor", 1.0),
    )
    config = Config(
        arch, read.count("block_count"), n_embd, n_head, read.count("attention.head_count_kv", n_head), head_dim,
        read.count("feed_forward_length"), embedding.dims[1], read.number("attention.layer_norm_rms_epsilon"), n_ctx, rope,
    )  # fmt: skip
    check_config(where, config)
    check_tensors(where, config, {name: info.dims[::-1] for name, info in file.tensors.items()})
    return config


class _Metadata:
    """Numbers of one architecture. Without a default they must be there."""

    def __init__(self, where: str, file: GGUFFile, arch: str) -> None:
        self.where, self.file, self.arch = where, file, arch

    def count(self, key: str, default: Optional[int] = None) -> int:
        """A positive integer; lists, one value for each layer, must agree."""
        value: Any = self.file.get(f"{self.arch}.{key}", *_INTEGERS, *(f"{t} array" for t in _INTEGERS))
        if isinstance(value, (list, np.ndarray)):
            if len(set(value)) != 1:
                raise unsupported(self.where, f"{self.arch}.{key} that differs between layers")
            value = value[0]
        value = self._found(key, value, default)
        if not 0 < value < 1 << 31:
            raise ModelFileError(f"{self.where} is damaged: {self.arch}.{key} is {value}")
        return int(value)

    def number(self, key: str, default: Optional[float] = None) -> float:
        """A finite number that is not negative."""
        value = self._found(key, self.file.get(f"{self.arch}.{key}", *_FLOATS), default)
        if not 0 <= value < math.inf:
            raise ModelFileError(f"{self.where} is damaged: {self.arch}.{key} is {value}")
        return float(value)

    def _found(self, key: str, value: Any, default: Any) -> Any:
        if value is None and default is None:
            raise ModelFileError(f"{self.where} has no {self.arch}.{key}: is it a language model with attention?")
        return default if value is None else value


# tensors


def _type(where: str, info: TensorInfo) -> gguf.GGMLQuantizationType:
    try:
        kind = gguf.GGMLQuantizationType(info.type)
    except ValueError:
        raise ModelFileError(
            f"{where}: tensor {quote(info.name)} has type {info.type}, which the installed package gguf does not know: "
            "update it, or name a file of another quantisation"
        ) from None
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise ModelFileError(
            f"{where}: tensor {quote(info.name)} has type {kind.name}, which the installed package gguf cannot "
            "dequantise: update it, or name a file of another quantisation"
        ) from None
    return kind


def _rows(info: TensorInfo) -> int:
    return math.prod(info.dims[1:])


def _row_bytes(where: str, info: TensorInfo, kind: gguf.GGMLQuantizationType) -> int:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    if info.dims[0] % elements:
        raise ModelFileError(
            f"{where} is damaged: tensor {quote(info.name)} has rows of {info.dims[0]}, no multiple of the {elements} "
            f"elements in a block of {kind.name}"
        )
    return int(info.dims[0] // elements * size)


def _parts(
    where: str, file: GGUFFile, info: TensorInfo, kind: gguf.GGMLQuantizationType
) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of a tensor as float32 [n, row length], and the number of the first."""
    size, step = _row_bytes(where, info, kind), max(1, _CHUNK // info.dims[0])
    for i in range(0, _rows(info), step):
        n = min(step, _rows(info) - i)
        stored = np.frombuffer(bytearray(file.read_part(info, i * size, (i + n) * size)), np.uint8)
        with np.errstate(all="ignore"):  # a damaged scale; what comes of it is not finite
            yield i, gguf.quants.dequantize(stored.reshape(n, size), kind)


def _load(
    where: str, file: GGUFFile, info: TensorInfo, kind: gguf.GGMLQuantizationType,
    dtype: torch.dtype, device: Union[str, torch.device],
) -> Tensor:  # fmt: skip
    out = torch.empty(_rows(info), info.dims[0], dtype=dtype, device=device)
    for i, part in _parts(where, file, info, kind):
        rows = out[i : i + len(part)]
        rows.copy_(torch.from_numpy(part))
        if not torch.isfinite(rows).all():
            raise ModelFileError(f"{where}: tensor {quote(info.name)} has values that are not finite in {dtype}")
    return out.reshape(info.dims[::-1])


def _with_rope_factors(
    where: str, file: GGUFFile, config: Config, types: dict[int, gguf.GGMLQuantizationType]
) -> Config:
    info = file.tensors.get(ROPE_FACTORS)
    if info is None:
        return config
    values = [float(v) for _, part in _parts(where, file, info, types[info.type]) for v in part.ravel()]
    return replace(config, rope=replace(config.rope, factors=check_factors(where, values)))
