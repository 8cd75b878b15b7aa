"""Reads safetensors files of unknown origin, without PyTorch, bfloat16 included."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from typing import Any, Union

import numpy as np

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.untrusted import quote, show

from .model import Array

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_MAX_HEADER = 100_000_000  # of the safetensors library


@dataclass(frozen=True)
class SafeTensor:
    """A tensor on disk."""

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> Array:
        """The tensor as float32; float16 and bfloat16 are widened exactly.

        Raises:
            ConvertError: it is not floating-point, or cannot be read.
        """
        if self.dtype not in _DTYPES:
            raise ConvertError(f"{quote(self.name)} is {self.dtype}, expected floating-point numbers")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = np.fromfile(file, _DTYPES[self.dtype], prod(self.shape))
        except OSError as error:
            raise ConvertError(f"cannot read {self.path}: {error.strerror or error}") from None
        if data.size != prod(self.shape):
            raise ConvertError(f"{self.path} is truncated: {quote(self.name)} ends beyond the file")
        if self.dtype == "BF16":  # the upper half of a float32
            data = (data.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is infinite, and refused as such
            return data.astype(np.float32).reshape(self.shape)


@dataclass(frozen=True)
class SafeFile:
    """The header of a safetensors file: free metadata, and tensors by name."""

    metadata: dict[str, str]
    tensors: dict[str, SafeTensor]


def is_safetensors(path: Union[str, os.PathLike[str]]) -> bool:
    """Whether a file begins with the length of a header that fits into it, and the header's brace."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= os.path.getsize(path) - 8


def load(path: Union[str, os.PathLike[str]]) -> SafeFile:
    """Reads the header. The safetensors library judges it; offsets are then read from it for types NumPy lacks.

    Raises:
        ConvertError: the file is not safetensors, is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]

    name = os.fspath(path)
    try:
        opened: Any = safe_open(name, framework="np")  # type: ignore[no-untyped-call]
        with opened as file:
            metadata, names = file.metadata() or {}, set(file.keys())
        with open(name, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header: Any = json.loads(raw.read(min(length, _MAX_HEADER)))
        tensors = {n: _tensor(name, n, header[n], 8 + length) for n in header if n != "__metadata__"}
    except ConvertError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConvertError(f"{name} is not a readable safetensors file: {quote(str(error), 200)}") from None
    if set(tensors) != names:
        raise ConvertError(f"{name} is damaged: its header can be read in two ways")
    return SafeFile(dict(metadata), tensors)


def _tensor(path: str, name: str, entry: Any, start: int) -> SafeTensor:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    item = np.dtype(_DTYPES[dtype]).itemsize if dtype in _DTYPES else None
    if item is not None and end - begin != item * prod(shape):
        raise ConvertError(f"{path} is damaged: {show(name)} has {end - begin} bytes for {shape} of {dtype}")
    return SafeTensor(path, name, dtype, tuple(shape), start + begin)
