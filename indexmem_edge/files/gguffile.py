"""Reads GGUF files of unknown origin.

`gguf.GGUFReader` believes every count in a file: one flipped byte in the length of an array makes it loop for hours.
Here every count is compared with the bytes that are left before anything is read, and every failure is a ConvertError.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Any, Optional, Type, Union

import numpy as np

from ..errors import ConvertError
from .untrusted import quote

Path = Union[str, "os.PathLike[str]"]

_FIXED = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_NAMES = {2: "u16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "string", 9: "array", 10: "u64", 11: "i64", 12: "f64"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_NAME = 1 << 16
_MAX_LIST = 1 << 20

F32, F16, Q8_0 = 0, 1, 8  # ggml types
TYPE_NAMES = {F32: "F32", F16: "F16", Q8_0: "Q8_0"}
_BLOCKS = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34)}  # elements and bytes of a block


@dataclass(frozen=True)
class Value:
    """A value of the metadata. `type` is `u32`, `f32`, `bool`, `string`, `<type> array`, ...; arrays are lists."""

    type: str
    value: Any


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it: dimensions in GGUF order, offset from the start of the file."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data; only for F32, F16 and Q8_0.

        Raises:
            ConvertError: another type, or rows that are no multiple of its blocks.
        """
        if self.type not in _BLOCKS:
            raise ConvertError(f"tensor {quote(self.name)} has type {self.type}: expected F32, F16 or Q8_0")
        elements, size = _BLOCKS[self.type]
        if self.dims[0] % elements:
            raise ConvertError(f"tensor {quote(self.name)} has rows of {self.dims[0]}, no multiple of {elements}")
        return prod(self.dims) // elements * size


class GGUFFile:
    """The header of a GGUF file, and its tensors on request. A context manager: data are read while it is open.

    Raises:
        ConvertError: the file cannot be opened, is truncated, or is not GGUF of version 2 or 3.
    """

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: Path) -> None:
        self._name = os.fspath(path)
        self._at = 0
        try:
            with open(self._name, "rb") as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode):
                    raise ConvertError(f"{self._name} is not a regular file")
                if info.st_size == 0:
                    raise ConvertError(f"{self._name} is empty")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            if isinstance(error, ConvertError):
                raise
            raise ConvertError(f"cannot read {self._name}: {getattr(error, 'strerror', None) or error}") from None
        try:
            self._parse()
        except BaseException:
            self._map.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._map.close()

    def read(self, info: TensorInfo) -> bytes:
        """The stored bytes of a tensor."""
        return self.read_part(info, 0, info.nbytes)

    def read_part(self, info: TensorInfo, begin: int, end: int) -> bytes:
        """Stored bytes [begin, end) of a tensor of any type; the caller knows how many it has.

        Raises:
            ConvertError: the file ends before them.
        """
        if info.offset + end > len(self._map):
            raise ConvertError(f"{self._name} is truncated: tensor {quote(info.name)} ends beyond the file")
        return self._map[info.offset + begin : info.offset + end]

    def get(self, key: str, *types: str) -> Any:
        """The value of a key, or None if it is not there.

        Raises:
            ConvertError: it has another type than one of `types`.
        """
        found = self.metadata.get(key)
        if found is None:
            return None
        if found.type not in types:
            raise ConvertError(f"{quote(key)} is {found.type}, expected {' or '.join(types)}")
        return found.value

    def check_whole(self) -> None:
        """Checks that the file has the data of all tensors, of any type that is known.

        Raises:
            ConvertError: it ends before them.
        """
        from gguf import GGML_QUANT_SIZES  # here, because nothing else needs it

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        for info in self.tensors.values():
            elements, size = sizes.get(info.type, (1, 0))
            if info.offset + -(-prod(info.dims) // elements) * size > len(self._map):
                raise ConvertError(f"{self._name} is truncated: tensor {quote(info.name)} ends beyond the file")

    def check_packed(self) -> None:
        """Checks that tensors follow each other without gaps and end with the file, as ggml demands.

        Raises:
            ConvertError: they do not; an offset was altered, or the file truncated.
        """
        at = self._data
        for info in self.tensors.values():
            if info.offset != at:
                raise ConvertError(f"tensor {quote(info.name)} is at {info.offset}, expected {at}")
            at += -(-info.nbytes // self._alignment) * self._alignment
        if self.tensors and not info.offset + info.nbytes <= len(self._map) <= at:
            raise ConvertError(f"expected a file of {at} bytes, found {len(self._map)}")

    # the header

    def _take(self, n: int) -> bytes:
        if n > len(self._map) - self._at:
            raise ConvertError(f"{self._name} is truncated or damaged: its header ends beyond the file")
        self._at += n
        return self._map[self._at - n : self._at]

    def _int(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _text(self, limit: int) -> str:
        n = self._int("<Q")
        if n > limit:
            raise ConvertError(f"{self._name} is damaged: a text of {n} bytes")
        return self._take(n).decode("utf-8", "surrogateescape")  # vocabularies may hold parts of characters

    def _parse(self) -> None:
        size = len(self._map)
        if self._take(min(4, size)) != b"GGUF":
            raise ConvertError(f"{self._name} is not a GGUF file")
        version = self._int("<I")
        if version not in (2, 3):
            raise ConvertError(f"{self._name} has GGUF version {version}: expected 2 or 3, little-endian")
        n_tensors, n_keys = self._int("<Q"), self._int("<Q")
        self.metadata = {}
        for _ in range(min(n_keys, size)):  # every turn takes bytes, so a wrong count ends at the end of the file
            key = self._text(_MAX_NAME)
            if key in self.metadata:
                raise ConvertError(f"{self._name} is damaged: key {quote(key)} is there twice")
            self.metadata[key] = self._value(key)
        alignment = self.get("general.alignment", "u32")
        self._alignment = 32 if alignment is None else alignment
        if self._alignment <= 0 or self._alignment & (self._alignment - 1):
            raise ConvertError(f"{self._name} is damaged: alignment {self._alignment}")
        infos = [self._tensor() for _ in range(min(n_tensors, size))]
        self._data = -(-self._at // self._alignment) * self._alignment
        self.tensors = {}
        for name, dims, kind, offset in infos:
            if name in self.tensors:
                raise ConvertError(f"{self._name} is damaged: tensor {quote(name)} is there twice")
            if self._data + offset >= size:
                raise ConvertError(f"{self._name} is truncated: tensor {quote(name)} begins beyond the file")
            self.tensors[name] = TensorInfo(name, dims, kind, self._data + offset)

    def _value(self, key: str) -> Value:
        kind = self._int("<I")
        if kind == _STRING:
            return Value("string", self._text(len(self._map)))
        if kind in _FIXED:
            return Value(_NAMES.get(kind, f"type {kind}"), self._numbers(key, kind, 1)[0])
        if kind != _ARRAY:
            raise ConvertError(f"{self._name} is damaged: {quote(key)} has type {kind}")
        item, n = self._int("<I"), self._int("<Q")
        name = f"{_NAMES.get(item, f'type {item}')} array"
        if item == _STRING:
            if n > (len(self._map) - self._at) // 8:
                raise ConvertError(f"{self._name} is truncated or damaged: {quote(key)} has {n} texts")
            return Value(name, [self._text(len(self._map)) for _ in range(n)])
        if item not in _FIXED:
            raise ConvertError(f"{self._name} is damaged: {quote(key)} is an array of type {item}")
        return Value(name, self._numbers(key, item, n))

    def _numbers(self, key: str, kind: int, n: int) -> Any:
        """A list; an array where a list would take far more memory than the file."""
        dtype = np.dtype(_FIXED[kind])
        values = np.frombuffer(self._take(n * dtype.itemsize), dtype)
        if kind == _BOOL:
            if (values > 1).any():
                raise ConvertError(f"{self._name} is damaged: {quote(key)} is neither true nor false")
            values = values.astype(bool)
        return values.tolist() if n <= _MAX_LIST else values

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(_MAX_NAME)
        n_dims = self._int("<I")
        if not 1 <= n_dims <= 4:
            raise ConvertError(f"{self._name} is damaged: tensor {quote(name)} has {n_dims} dimensions")
        dims = tuple(self._int("<Q") for _ in range(n_dims))
        if 0 in dims or prod(dims) > 1 << 62:
            raise ConvertError(f"{self._name} is damaged: tensor {quote(name)} is {list(dims)}")
        return name, dims, self._int("<I"), self._int("<Q")
