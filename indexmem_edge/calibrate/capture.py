"""Copies tensors out of a graph while llama.cpp computes it, through the evaluation callback of a context."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..native.ggml import ggml_function

Array = npt.NDArray[Any]


class Tensor(ctypes.Structure):
    """struct ggml_tensor, as far as it is read here."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]
_SAME_VALUES = (b"VIEW", b"PERMUTE", b"RESHAPE", b"CONT", b"TRANSPOSE")
_TYPES: dict[int, npt.DTypeLike] = {llama_lib.GGML_TYPE_F32: np.float32, llama_lib.GGML_TYPE_F16: np.float16}


class Callback:
    """What a context takes as `cb_eval`; it is called until the context is freed, so this must live as long.

    An exception would vanish in the library: it is kept in `error`, and ends the computation.
    """

    def __init__(self) -> None:
        self.error: Optional[BaseException] = None
        self._get = ggml_function("ggml_backend_tensor_get", None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2)
        self._bytes = ggml_function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
        self._op = ggml_function("ggml_op_desc", ctypes.c_char_p, ctypes.c_void_p)
        self.callback = llama_lib.ggml_backend_sched_eval_callback(self._on_tensor)

    def _on_tensor(self, address: int, ask: bool, _: object) -> bool:
        """Asked first whether a tensor is wanted; if so, called again when it is there. Returns whether to go on."""
        try:
            tensor = Tensor.from_address(address)
            if ask:
                return self.wants(tensor)
            self.take(tensor)
        except BaseException as error:
            self.error = error
            return False
        return True

    def wants(self, tensor: Tensor) -> bool:
        """Whether to take a tensor once it is computed."""
        raise NotImplementedError

    def take(self, tensor: Tensor) -> None:
        """Called with each of them."""
        raise NotImplementedError

    def read(self, tensor: Tensor) -> Array:
        """The values, dimensions in NumPy order: first the outermost."""
        kind = _TYPES.get(tensor.type)
        if kind is None:
            raise TypeError(f"tensor {tensor.name!r} has type {tensor.type}, expected F32 or F16")
        raw = np.empty(self._bytes(ctypes.byref(tensor)), np.uint8)  # with the gaps of a view
        self._get(ctypes.byref(tensor), raw.ctypes.data, 0, raw.nbytes)
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        return np.ndarray(shape, kind, raw, strides=strides)


class Capture(Callback):
    """Every tensor whose name begins with one of the prefixes."""

    def __init__(self, *prefixes: str) -> None:
        super().__init__()
        self.found: dict[str, list[Array]] = {}  # by name, one array for each ubatch
        self._prefixes = tuple(p.encode() for p in prefixes)

    def wants(self, tensor: Tensor) -> bool:
        return bool(tensor.name.startswith(self._prefixes))

    def take(self, tensor: Tensor) -> None:
        self.found.setdefault(tensor.name.decode(), []).append(self.read(tensor))

    def __getitem__(self, name: str) -> Array:
        """What the last ubatch computed, without dimensions of 1 in front."""
        values = self.found[name][-1]
        while values.ndim > 2 and len(values) == 1:
            values = values[0]
        return values


@dataclass
class LayerCapture:
    """What attention computed with that reads the cache of one layer. Keys and values are as the cache holds them, after
    RoPE. Where later layers read it, too, their query heads stand behind those of the layer, in each group.
    """

    scale: float
    softcap: float  # 0: none
    query_scale: float = 1.0  # that the graph has multiplied the queries by already
    sinks: Optional[Array] = None  # of each head, a logit whose value is 0
    queries: list[Array] = field(default_factory=list)  # for each ubatch, [head][wanted row][n]
    keys: Optional[Array] = None  # [KV head][cell][n]
    values: Optional[Array] = None


class AttentionCapture(Callback):
    """The operands of the attention op of some layers of an ordinary cache with flash attention, whatever the model
    calls them.
    """

    def __init__(self, wanted: Iterable[int]) -> None:
        super().__init__()
        self.layers: dict[int, LayerCapture] = {}
        self._wanted = frozenset(wanted)
        self._again: set[int] = set()  # layers whose attention has been in this ubatch
        self._rows: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._cache = False

    def expect(self, rows: npt.NDArray[np.intp], cache: bool) -> None:
        """Before each ubatch: whose queries are wanted, and whether keys and values are."""
        self._rows, self._cache = rows, cache
        self._again.clear()

    def wants(self, tensor: Tensor) -> bool:
        return (len(self._rows) > 0 or self._cache) and self._op(ctypes.byref(tensor)) == b"FLASH_ATTN_EXT"

    def take(self, tensor: Tensor) -> None:
        q, k, v = (tensor.src[i].contents for i in range(3))
        cell = re.fullmatch(rb"cache_k_l(\d+)", k.view_src.contents.name if k.view_src else b"")
        if cell is None:
            raise TypeError("the attention does not read the KV cache itself: expected a view of it, of type F16")
        number = int(cell[1])
        if number not in self._wanted:
            return
        scale, _, softcap = np.frombuffer(tensor.op_params, np.float32)[:3].tolist()
        layer = self.layers.setdefault(number, LayerCapture(scale, softcap, self._scale_of(q)))
        if tensor.src[4]:
            layer.sinks = self.read(tensor.src[4].contents).reshape(-1)
        if len(self._rows):
            queries = self.read(q)[0][:, self._rows]  # a copy
            if number in self._again:
                queries = _joined(layer.queries.pop(), queries, int(k.ne[2]))
            layer.queries.append(queries)
        self._again.add(number)
        if self._cache:
            layer.keys, layer.values = self.read(k)[0], self.read(v)[0]

    def _scale_of(self, queries: Tensor) -> float:
        """The factor of the scaling that queries come from, 1 if they come from anything else."""
        tensor = queries
        while (op := self._op(ctypes.byref(tensor))) in _SAME_VALUES:
            tensor = tensor.src[0].contents
        return float(np.frombuffer(tensor.op_params, np.float32)[0]) if op == b"SCALE" else 1.0


def _joined(queries: Array, more: Array, n_head_kv: int) -> Array:
    """Query heads of two layers, [head][row][n], those of each KV head together."""
    parts = [a.reshape(n_head_kv, -1, *a.shape[1:]) for a in (queries, more)]
    return np.concatenate(parts, axis=1).reshape(-1, *queries.shape[1:])
