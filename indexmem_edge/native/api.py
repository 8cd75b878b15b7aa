"""ctypes for native/include/indexmem.h, and the few wrappers that the rest of the package needs.

Importing this module loads the native library through llama_cpp. The bounded cache's own functions are looked up on
first use, so a library without them (a stock build named by a developer) still runs unbounded.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from typing import Any, Callable, Optional

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import UNBOUNDED, BudgetError, IndexMemError, LibraryError, ModelNotSupported, SidecarError, VersionError
from . import find

API_VERSION = 9
SPAN_TRAINED = 2**32 - 1  # INDEXMEM_SPAN_TRAINED
CLASSES_MAX = 4  # INDEXMEM_CLASSES_MAX

ERROR_NONE, ERROR_PARAMS, ERROR_MODEL, ERROR_SIDECAR, ERROR_CONTEXT = range(5)  # enum indexmem_error
LAYER_BOUNDED, LAYER_WINDOW, LAYER_RECURRENT, LAYER_READS = 1, 2, 4, 8  # enum indexmem_layer
_ERRORS = {ERROR_PARAMS: BudgetError, ERROR_MODEL: ModelNotSupported, ERROR_SIDECAR: SidecarError}


class Params(ctypes.Structure):
    """struct indexmem_params"""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("budget", ctypes.c_uint32),
        ("sinks", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("pin", ctypes.c_uint32),
        ("evict_step", ctypes.c_uint32),
        ("budget_ratio", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("policy", ctypes.c_char_p),
        ("sidecar", ctypes.c_char_p),
        ("memory", ctypes.c_char_p),
        ("memory_slots", ctypes.c_uint32),
        ("span", ctypes.c_uint32),
        ("layer_budgets", ctypes.c_char_p),
    ]


class Stats(ctypes.Structure):
    """struct indexmem_stats"""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("budget", ctypes.c_uint32),
        ("n_slots", ctypes.c_uint32),
        ("budget_now", ctypes.c_uint32),
        ("n_kept", ctypes.c_uint32),
        ("n_seen", ctypes.c_uint64),
        ("n_evicted", ctypes.c_uint64),
        ("sinks", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("pin", ctypes.c_uint32),
        ("evict_step", ctypes.c_uint32),
        ("kv_bytes", ctypes.c_uint64),
        ("meta_bytes", ctypes.c_uint64),
        ("indexer_bytes", ctypes.c_uint64),
        ("memory_bytes", ctypes.c_uint64),
        ("sidecar_bytes", ctypes.c_uint64),
        ("sidecar_hash", ctypes.c_uint64),
        ("evict_us", ctypes.c_int64),
        ("n_evictions", ctypes.c_uint64),
        ("memory_slots", ctypes.c_uint32),
        ("memory_layers", ctypes.c_uint32),
        ("memory", ctypes.c_char * 16),
        ("broken", ctypes.c_uint32),
        ("compute_bytes", ctypes.c_uint64),
        ("work_bytes", ctypes.c_uint64),
        ("n_rebases", ctypes.c_uint64),
        ("next_position", ctypes.c_uint64),
        ("rebase_us", ctypes.c_int64),
        ("span", ctypes.c_uint32),
        ("window_bytes", ctypes.c_uint64),
        ("recurrent_bytes", ctypes.c_uint64),
        ("room", ctypes.c_uint32),
        ("n_classes", ctypes.c_uint32),
        ("class_budget", ctypes.c_uint32 * CLASSES_MAX),
        ("class_heads", ctypes.c_uint32 * CLASSES_MAX),
        ("class_kept", ctypes.c_uint32 * CLASSES_MAX),
        ("n_first", ctypes.c_uint32),
    ]


_P, _INT, _I32, _U32, _U64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64
_I32_P = ctypes.POINTER(ctypes.c_int32)

_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "indexmem_api_version": (_INT, []),
    "indexmem_build_info": (ctypes.c_char_p, []),
    "indexmem_cpu_variant": (ctypes.c_char_p, []),
    "indexmem_default_params": (Params, []),
    "indexmem_next_context": (ctypes.c_bool, [ctypes.POINTER(Params)]),
    "indexmem_last_error": (ctypes.c_char_p, []),
    "indexmem_last_error_kind": (_INT, []),
    "indexmem_sidecar_check": (ctypes.c_bool, [ctypes.c_char_p, _P]),
    "indexmem_model_fingerprint": (None, [_P, ctypes.c_char_p]),
    "indexmem_indexer_count": (_INT, []),
    "indexmem_indexer_name": (ctypes.c_char_p, [_INT]),
    "indexmem_indexer_help": (ctypes.c_char_p, [_INT]),
    "indexmem_memory_count": (_INT, []),
    "indexmem_memory_name": (ctypes.c_char_p, [_INT]),
    "indexmem_memory_help": (ctypes.c_char_p, [_INT]),
    "indexmem_model_supported": (ctypes.c_bool, [_P, ctypes.c_char_p, ctypes.c_size_t]),
    "indexmem_model_layer": (_I32, [_P, _I32]),
    "indexmem_model_row": (_U32, [_P, _I32, ctypes.c_bool]),
    "indexmem_architecture": (ctypes.c_char_p, [_INT]),
    "indexmem_architecture_refused": (ctypes.c_char_p, [_INT]),
    "indexmem_device_supported": (ctypes.c_bool, [ctypes.c_size_t]),
    "indexmem_device_supported_policy": (ctypes.c_bool, [ctypes.c_size_t, _I32]),
    "indexmem_is_bounded": (ctypes.c_bool, [_P]),
    "indexmem_cache_bytes": (ctypes.c_uint64, [_P]),
    "indexmem_model_bytes": (ctypes.c_uint64, [_P]),
    "indexmem_compute_bytes": (ctypes.c_uint64, [_P]),
    "indexmem_get_stats": (ctypes.c_bool, [_P, _I32, ctypes.POINTER(Stats)]),
    "indexmem_get_positions": (_I32, [_P, _I32, _I32, _I32, _I32_P, _I32]),
    "indexmem_get_rotary": (_I32, [_P, _I32, _I32, _I32, _I32_P, _I32]),
    "indexmem_span_reason": (ctypes.c_char_p, [_P]),
    "indexmem_n_head_kv": (_I32, [_P, _I32]),
    "indexmem_set_pin": (ctypes.c_bool, [_P, _I32, _U32]),
    "indexmem_draft_room": (_U32, [_P, _I32, _U32]),
    "indexmem_set_load_pin": (ctypes.c_bool, [_P, _I32]),
    "indexmem_copy_new": (_P, []),
    "indexmem_copy_free": (None, [_P]),
    "indexmem_copy_size": (_U64, [_P, _I32]),
    "indexmem_copy_take": (ctypes.c_bool, [_P, _P, _I32]),
    "indexmem_copy_put": (ctypes.c_bool, [_P, _P, _I32]),
    "indexmem_copy_bytes": (_U64, [_P, ctypes.c_bool]),
    "indexmem_copy_state": (_U64, [_P, _P, _U64]),
    "indexmem_set_cancel": (None, [_P, _I32_P]),
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
            f"{find.LIB_PATH_VARIABLE} if it names that build"
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


def last_error_kind() -> int:
    """What the last failure on this thread was about: one of ERROR_*."""
    return int(library().indexmem_last_error_kind())


def build_info() -> str:
    """What the library was built from."""
    return _text(library().indexmem_build_info())


def cpu_variant() -> str:
    """The CPU backend in use: the variant that was chosen for this CPU, or "native" or "generic" in a build with one.

    Raises:
        LibraryError: there is none, or not the one that INDEXMEM_CPU_VARIANT names.
    """
    name = library().indexmem_cpu_variant()
    if name is None:
        raise LibraryError(last_error())
    return _text(name)


_loading = threading.Lock()  # of the CPU backend, by whichever thread comes first


def require_cpu() -> None:
    """Loads the CPU backend, if that is not part of the library; raises what `cpu_variant` raises."""
    if hasattr(llama_lib._lib, "indexmem_cpu_variant"):
        with _loading:
            cpu_variant()


def failure(otherwise: str, kind: Callable[[str], IndexMemError] = BudgetError) -> IndexMemError:
    """The exception for the last failure on this thread, by its native kind.

    Where the library does not say what it was, or llama.cpp's log knows more, it is `kind` with the text `otherwise`.
    """
    code = last_error_kind()
    if code not in _ERRORS:
        return kind(otherwise)
    advice = f". {UNBOUNDED}" if code == ERROR_MODEL else ""
    return _ERRORS[code](last_error() + advice)


def _table(name: str) -> dict[str, str]:
    lib = library()
    names, helps = getattr(lib, f"indexmem_{name}_name"), getattr(lib, f"indexmem_{name}_help")
    return {_text(names(i)): _text(helps(i)) for i in range(getattr(lib, f"indexmem_{name}_count")())}


def policies() -> dict[str, str]:
    """Name and one line of help of each eviction policy."""
    return _table("policy")


def policies_on(device: int) -> list[str]:
    """Names of the policies with which bounded caches can lie on that device of ggml."""
    return [name for i, name in enumerate(policies()) if library().indexmem_device_supported_policy(device, i)]


def indexers() -> dict[str, str]:
    """Name and one line of help of each kind of indexer that a sidecar can hold."""
    return _table("indexer")


def memories() -> dict[str, str]:
    """Name and one line of help of each kind of latent memory."""
    return _table("memory")


def check_sidecar(path: str, model: Optional[int] = None) -> None:
    """Reads a whole sidecar and, with a model, compares it with that; keeps nothing.

    Raises:
        SidecarError: it is damaged, or for another model.
    """
    if not library().indexmem_sidecar_check(os.fsencode(path), model):
        raise failure(f"{path} is not a sidecar: the library gave no reason", SidecarError)


def fingerprint(model: int) -> str:
    """Identity of a loaded model whatever its quantisation, as sidecars record it."""
    digits = ctypes.create_string_buffer(17)
    library().indexmem_model_fingerprint(model, digits)
    return _text(digits.value)


def request_context(**values: Any) -> None:
    """Asks that the next context created by this thread have a bounded cache.

    Args:
        values: fields of indexmem_params by name; None leaves what the library has there. Text may be a path.

    Raises:
        BudgetError, SidecarError: a value is out of range by itself, or contradicts another.
    """
    params = library().indexmem_default_params()
    for name, value in values.items():
        if not hasattr(params, name):
            raise LibraryError(f"indexmem_params has no field {name!r}: the package and the library differ, reinstall it")
        if value is not None:
            setattr(params, name, os.fsencode(value) if isinstance(value, (str, os.PathLike)) else value)
    if not library().indexmem_next_context(ctypes.byref(params)):
        raise failure("the library refused the requested KV cache")


def withdraw_request() -> None:
    """Forgets a request that no context has taken up."""
    library().indexmem_next_context(None)


def model_unsupported_reason(model: int) -> Optional[str]:
    """Why the model cannot have a bounded cache, or None if it can."""
    buffer = ctypes.create_string_buffer(1024)
    if library().indexmem_model_supported(model, buffer, len(buffer)):
        return None
    return _text(buffer.value) or "the library gave no reason"


def model_description(model: int) -> str:
    """What a model is, in a few words: architecture, size, types of its weights."""
    text = ctypes.create_string_buffer(256)
    llama_lib.llama_model_desc(model, text, len(text))
    return _text(text.value)


def model_layers(model: int) -> list[int]:
    """What each layer keeps of the past: flags of LAYER_*, 0 for one without attention or state."""
    get, n = library().indexmem_model_layer, llama_lib.llama_model_n_layer(model)
    return [int(get(model, il)) for il in range(n)]


def model_rows(model: int) -> list[tuple[int, int]]:
    """Numbers that a token leaves in keys and values of each layer; (0, 0) of one without a cache of its own."""
    get, n = library().indexmem_model_row, llama_lib.llama_model_n_layer(model)
    return [(int(get(model, il, False)), int(get(model, il, True))) for il in range(n)]


def architectures() -> dict[str, str]:
    """What the library can load, as files name it, and why none of its models can be bounded ("": that depends)."""
    lib = library()
    found: dict[str, str] = {}
    while (name := lib.indexmem_architecture(len(found))) is not None:
        found[_text(name)] = _text(lib.indexmem_architecture_refused(len(found)))
    return found


def cache_bytes(ctx: int) -> int:
    """Bytes of what a context keeps of the past, bounded or not."""
    return int(library().indexmem_cache_bytes(ctx))


def model_bytes(ctx: int) -> int:
    """Bytes of the weights of a context's model, in all forms that they are kept in."""
    return int(library().indexmem_model_bytes(ctx))


def compute_bytes(ctx: int) -> int:
    """Bytes of a context's compute buffers, bounded or not."""
    return int(library().indexmem_compute_bytes(ctx))


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


def draft_room(ctx: int, n: int, seq_id: int = 0) -> int:
    """Of `n` drafts behind the next token, how many can be taken out again without a trace; without a budget all."""
    return int(library().indexmem_draft_room(ctx, seq_id, n))


def set_load_pin(ctx: int, n: Optional[int]) -> None:
    """States that are loaded from now on get a pinned prefix of `n` tokens; None: the one that they were saved with."""
    if not library().indexmem_set_load_pin(ctx, -1 if n is None else n):
        raise LibraryError(f"indexmem_set_load_pin failed: {last_error()}")


def clear_error() -> None:
    """Forgets the last failure on this thread, so that `last_error` speaks of what comes."""
    library().indexmem_next_context(None)


def set_cancel(ctx: int, flag: ctypes.c_int32) -> None:
    """Computations of the context stop once the flag is not 0; it must live as long as the context."""
    library().indexmem_set_cancel(ctx, ctypes.byref(flag))


def n_head_kv(ctx: int, layer: int) -> int:
    """KV heads of a layer (0 if it has no cache of its own)."""
    return int(library().indexmem_n_head_kv(ctx, layer))


def _of_entries(what: str, ctx: int, layer: int, head: int, seq_id: int) -> npt.NDArray[np.int32]:
    """A number of each entry that one KV head of one layer holds, in the order of slots."""
    get = getattr(library(), f"indexmem_get_{what}")
    n = get(ctx, seq_id, layer, head, None, 0)
    if n < 0:
        raise LibraryError(f"no {what} for layer {layer}, head {head}: {last_error()}")
    found = np.empty(n, dtype=np.int32)
    if n > 0 and get(ctx, seq_id, layer, head, found.ctypes.data_as(_I32_P), n) != n:
        raise LibraryError(f"{what} of layer {layer}, head {head} changed while they were read")
    return found


def positions(ctx: int, layer: int, head: int, seq_id: int = 0) -> npt.NDArray[np.int32]:
    """Positions in the text that one KV head of one layer holds, ascending."""
    found = _of_entries("positions", ctx, layer, head, seq_id)
    found.sort()
    return found


def rotary(ctx: int, layer: int, head: int, seq_id: int = 0) -> npt.NDArray[np.int32]:
    """Positions by which the keys of the same entries are rotated, in the same order."""
    order = np.argsort(_of_entries("positions", ctx, layer, head, seq_id))
    return _of_entries("rotary", ctx, layer, head, seq_id)[order]


def span_reason(ctx: int) -> str:
    """Why rotary positions grow with the text although they were to stay below the trained length, or ""."""
    return _text(library().indexmem_span_reason(ctx))
