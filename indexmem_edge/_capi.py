"""ctypes for native/include/indexmem.h, and the few wrappers that the rest of the package needs.

Importing this module loads the native library through llama_cpp. The bounded cache's own functions are looked up on
first use, so a library without them (a stock build named by a developer) still runs unbounded.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import BudgetError, LibraryError, VersionError

_native.require()

import llama_cpp.llama_cpp as llama_lib  # noqa: E402  (the library must be chosen first)

API_VERSION = 1


class Params(ctypes.Structure):
    """struct indexmem_params"""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("budget", ctypes.c_uint32),
        ("sinks", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("pin", ctypes.c_uint32),
        ("evict_step", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("policy", ctypes.c_char_p),
    ]


class Stats(ctypes.Structure):
    """struct indexmem_stats"""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("budget", ctypes.c_uint32),
        ("n_slots", ctypes.c_uint32),
        ("n_kept", ctypes.c_uint32),
        ("n_seen", ctypes.c_uint64),
        ("n_evicted", ctypes.c_uint64),
        ("sinks", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("pin", ctypes.c_uint32),
        ("evict_step", ctypes.c_uint32),
        ("kv_bytes", ctypes.c_uint64),
        ("meta_bytes", ctypes.c_uint64),
        ("evict_us", ctypes.c_int64),
        ("n_evictions", ctypes.c_uint64),
    ]


_P, _INT, _I32, _U32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int32, ctypes.c_uint32
_I32_P = ctypes.POINTER(ctypes.c_int32)

_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "indexmem_api_version": (_INT, []),
    "indexmem_build_info": (ctypes.c_char_p, []),
    "indexmem_default_params": (Params, []),
    "indexmem_next_context": (ctypes.c_bool, [ctypes.POINTER(Params)]),
    "indexmem_last_error": (ctypes.c_char_p, []),
    "indexmem_model_supported": (ctypes.c_bool, [_P, ctypes.c_char_p, ctypes.c_size_t]),
    "indexmem_is_bounded": (ctypes.c_bool, [_P]),
    "indexmem_get_stats": (ctypes.c_bool, [_P, _I32, ctypes.POINTER(Stats)]),
    "indexmem_get_positions": (_I32, [_P, _I32, _I32, _I32, _I32_P, _I32]),
    "indexmem_n_head_kv": (_I32, [_P, _I32]),
    "indexmem_set_pin": (ctypes.c_bool, [_P, _I32, _U32]),
    "indexmem_policy_count": (_INT, []),
    "indexmem_policy_name": (ctypes.c_char_p, [_INT]),
    "indexmem_policy_help": (ctypes.c_char_p, [_INT]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library with typed indexmem functions.

    Raises:
        LibraryError: the library has no bounded cache.
        VersionError: its interface is not the one this package was written for.
    """
    lib: ctypes.CDLL = llama_lib._lib
    where = lib._name
    if not hasattr(lib, "indexmem_api_version"):
        raise LibraryError(
            f"{where} is a llama.cpp without the bounded cache: reinstall indexmem-edge, or unset "
            f"{_native.LIB_PATH_VARIABLE} if it names that build"
        )
    lib.indexmem_api_version.restype = _INT
    version = lib.indexmem_api_version()
    if version != API_VERSION:
        raise VersionError(
            f"{where} speaks version {version} of the indexmem interface, this package version {API_VERSION}: "
            "rebuild the library from the same source tree as the package"
        )
    for name, (restype, argtypes) in _PROTOTYPES.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise VersionError(f"{where} has no {name}: rebuild the library from the same source tree") from None
        function.restype, function.argtypes = restype, argtypes
    size = lib.indexmem_default_params().struct_size
    if size != ctypes.sizeof(Params):
        raise VersionError(
            f"{where}: indexmem_params is {size} bytes, expected {ctypes.sizeof(Params)}: rebuild the library"
        )
    return lib


def _text(value: Optional[bytes]) -> str:
    return (value or b"").decode("utf-8", "replace")


def last_error() -> str:
    """The library's own words for the last failure on this thread, "" if none."""
    return _text(library().indexmem_last_error())


def build_info() -> str:
    """What the library was built from."""
    return _text(library().indexmem_build_info())


def policies() -> dict[str, str]:
    """Name and one line of help of each eviction policy."""
    lib = library()
    return {
        _text(lib.indexmem_policy_name(i)): _text(lib.indexmem_policy_help(i))
        for i in range(lib.indexmem_policy_count())
    }


@dataclass(frozen=True)
class Request:
    """The bounded cache to be made for the next context of this thread, in the fields of indexmem_params."""

    budget: int
    policy: str
    sinks: int
    window: int
    pin: int
    evict_step: int
    seed: int

    def submit(self) -> None:
        """Asks that the next context created by this thread be bounded."""
        params = library().indexmem_default_params()
        params.budget, params.sinks, params.window, params.pin = self.budget, self.sinks, self.window, self.pin
        params.evict_step, params.seed, params.policy = self.evict_step, self.seed, self.policy.encode()
        if not library().indexmem_next_context(ctypes.byref(params)):
            raise BudgetError(last_error() or "the library refused the requested KV cache")

    @staticmethod
    def withdraw() -> None:
        """Forgets a request that no context has taken up."""
        library().indexmem_next_context(None)


def model_unsupported_reason(model: int) -> Optional[str]:
    """Why the model cannot have a bounded cache, or None if it can."""
    buffer = ctypes.create_string_buffer(1024)
    if library().indexmem_model_supported(model, buffer, len(buffer)):
        return None
    return _text(buffer.value) or "the library gave no reason"


def is_bounded(ctx: int) -> bool:
    """Whether the context has a bounded cache."""
    return bool(library().indexmem_is_bounded(ctx))


def get_stats(ctx: int, seq_id: int = 0) -> Stats:
    """The counts of one sequence."""
    stats = Stats(struct_size=ctypes.sizeof(Stats))
    if not library().indexmem_get_stats(ctx, seq_id, ctypes.byref(stats)):
        raise LibraryError(f"indexmem_get_stats failed: {last_error()}")
    return stats


def set_pin(ctx: int, n: int, seq_id: int = 0) -> None:
    """Pins the first `n` tokens of a sequence."""
    if not library().indexmem_set_pin(ctx, seq_id, n):
        raise BudgetError(f"cannot pin the first {n} tokens: {last_error()}")


def n_head_kv(ctx: int, layer: int) -> int:
    """KV heads of a layer (0 if it has no cache of its own)."""
    return int(library().indexmem_n_head_kv(ctx, layer))


def positions(ctx: int, layer: int, head: int, seq_id: int = 0) -> npt.NDArray[np.int32]:
    """Positions that one KV head of one layer holds, ascending."""
    get = library().indexmem_get_positions
    n = get(ctx, seq_id, layer, head, None, 0)
    if n < 0:
        raise LibraryError(f"no positions for layer {layer}, head {head}: {last_error()}")
    found = np.empty(n, dtype=np.int32)
    if n > 0 and get(ctx, seq_id, layer, head, found.ctypes.data_as(_I32_P), n) != n:
        raise LibraryError(f"positions of layer {layer}, head {head} changed while they were read")
    found.sort()
    return found
