"""Decoders from GGUF files: every tensor type that the package gguf can dequantise. Matrices stay in blocks where they can."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Optional, Union

import gguf
import numpy as np
import torch

from ...errors import ConvertError, ModelFileError
from ...files.gguffile import GGUFFile, TensorInfo
from ...files.modelfile import check_model_file
from ...files.untrusted import quote
from .architectures import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, check_factors, fused_parts
from .decoder import Config, Decoder, stored_dtype
from .gguf_config import factors_for, read_config
from .quantised import Matrix, Quantised, StoredWeights, can_stay

_CHUNK = 1 << 22  # elements that are dequantised at once
_FACTORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


def load_gguf(
    path: Union[str, os.PathLike[str]],
    dtype: torch.dtype = torch.bfloat16,
    device: Union[str, torch.device] = "cpu",
    n_ctx: Optional[int] = None,
) -> Decoder:
    """Reads a model, some rows of a tensor at a time, straight to `device`: quantised matrices of layers in the blocks of the file,
    all else in `dtype`, and norms in float32.

    Args:
        n_ctx: tokens of the context that it will run in, which decide how the positions of LongRoPE are rotated; None:
            as many as it was trained for, which is what a bounded cache uses.

    Raises:
        ModelFileError: the file is missing, not GGUF, damaged, or has a tensor type that cannot be read.
        ModelNotSupported: it is fine, but nothing that training knows.
    """
    where = check_model_file(path)
    try:
        with GGUFFile(where) as file:
            config = read_config(where, file)
            types = {info.type: _type(where, info) for info in file.tensors.values()}
            for info in file.tensors.values():  # whole, before minutes are spent on reading
                size = _rows(info) * _row_bytes(where, info, types[info.type])
                file.read_part(info, size, size)
            factors = factors_for(file, config.architecture, n_ctx)
            if factors is not None:
                config = _with_factors(where, file, config, file.tensors[factors], types)
            weights: dict[str, Matrix] = {}
            for name, info in file.tensors.items():
                if name not in _FACTORS:
                    weights |= _parts_of(
                        config, name, _load(where, file, info, types[info.type], stored_dtype(name, dtype), device)
                    )
    except ConvertError as error:
        message = str(error)
        raise ModelFileError(message if where in message else f"{where}: {message}") from None
    return Decoder(config, StoredWeights(weights))


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
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Rows of a tensor as they are stored [n, bytes of a row] and as float32 [n, row length], after the number of the first."""
    size, step = _row_bytes(where, info, kind), max(1, _CHUNK // info.dims[0])
    for i in range(0, _rows(info), step):
        n = min(step, _rows(info) - i)
        stored = np.frombuffer(bytearray(file.read_part(info, i * size, (i + n) * size)), np.uint8).reshape(n, size)
        with np.errstate(all="ignore"):  # a damaged scale; what comes of it is not finite
            yield i, stored, gguf.quants.dequantize(stored, kind)


def _load(
    where: str, file: GGUFFile, info: TensorInfo, kind: gguf.GGMLQuantizationType,
    dtype: torch.dtype, device: Union[str, torch.device],
) -> Matrix:  # fmt: skip
    shape, stays = info.dims[::-1], can_stay(info.name, kind)
    columns, stored_as = (_row_bytes(where, info, kind), torch.uint8) if stays else (info.dims[0], dtype)
    out = torch.empty(_rows(info), columns, dtype=stored_as, device=device)
    for i, stored, numbers in _parts(where, file, info, kind):
        read = torch.from_numpy(numbers).to(dtype)
        if not torch.isfinite(read).all():
            raise ModelFileError(f"{where}: tensor {quote(info.name)} has values that are not finite in {dtype}")
        out[i : i + len(read)].copy_(torch.from_numpy(stored) if stays else read)
    return Quantised(out, kind, tuple(shape), dtype) if stays else out.reshape(shape)


def _parts_of(config: Config, name: str, tensor: Matrix) -> dict[str, Matrix]:
    """A tensor by its name, or what is fused in it by theirs; the parts share its memory."""
    parts = fused_parts(config, name)
    return dict(zip(parts, tensor.split(list(parts.values())))) if parts else {name: tensor}


def _with_factors(
    where: str, file: GGUFFile, config: Config, info: TensorInfo, types: dict[int, gguf.GGMLQuantizationType]
) -> Config:
    values = [float(v) for _, _, part in _parts(where, file, info, types[info.type]) for v in part.ravel()]
    return replace(config, rope=replace(config.rope, factors=check_factors(where, info.name, values)))
