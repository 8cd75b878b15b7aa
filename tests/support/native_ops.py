"""Single native ops on arrays: each call is a graph of its own, computed by the CPU backend.

Dimensions are in NumPy order, the reverse of native/ops/indexmem-ops.h: S sequences, H KV heads, n slots, T tokens,
G query heads of a KV head, D head size. Ops that work in place return what they wrote, and leave the arrays they were
given alone. A KV head of a sequence may be a sequence of its own everywhere; for `attend` it is one of N streams.
"""

from __future__ import annotations

import ctypes
from typing import Any, Optional

import numpy as np

from indexmem_edge.calibrate.capture import Tensor
from indexmem_edge.native.ggml import ggml_function
from support.native_context import F16, F32

I32 = 26  # GGML_TYPE_I32
TYPES = {F32: np.float32, F16: np.float16, I32: np.int32}
CTL = ("n_used", "n_evict", "n_fixed", "pos_tail", "keep_lo", "keep_hi", "pos_last", "unused")  # enum indexmem_ctl
MEMORY = 1 << 26  # bytes for the tensors of a call and for what the op needs beside them

N_THREADS = 2

Pointer = ctypes.c_void_p


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool)]


def _put(ctx: int, a: Optional[np.ndarray]) -> Optional[int]:
    """A tensor with the values of an array; null for None."""
    if a is None:
        return None
    a = np.ascontiguousarray(a)
    kind = next(kind for kind, dtype in TYPES.items() if dtype == a.dtype)
    new = ggml_function("ggml_new_tensor_4d", Pointer, Pointer, ctypes.c_int, *[ctypes.c_int64] * 4)
    tensor = new(ctx, kind, *[*a.shape[::-1], 1, 1, 1][:4])
    ctypes.memmove(ggml_function("ggml_get_data", Pointer, Pointer)(tensor), a.ctypes.data, a.nbytes)
    return tensor


def _get(tensor: int) -> np.ndarray:
    head = Tensor.from_address(tensor)
    a = np.empty(tuple(head.ne)[::-1], TYPES[head.type])
    ctypes.memmove(a.ctypes.data, ggml_function("ggml_get_data", Pointer, Pointer)(tensor), a.nbytes)
    return a


def _run(op: str, *arguments: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Computes ggml_indexmem_<op> of arrays (or None), then numbers as ctypes. Returns the result, of four dimensions,
    and the arrays as the op left them."""
    ctx = ggml_function("ggml_init", Pointer, _InitParams)(_InitParams(MEMORY, None, False))
    try:
        arrays = [a for a in arguments if a is None or isinstance(a, np.ndarray)]
        numbers = arguments[len(arrays) :]
        tensors = [_put(ctx, a) for a in arrays]
        build = ggml_function(f"ggml_indexmem_{op}", Pointer, Pointer, *[Pointer] * len(tensors), *map(type, numbers))
        result = build(ctx, *tensors, *numbers)
        graph = ggml_function("ggml_new_graph", Pointer, Pointer)(ctx)
        ggml_function("ggml_build_forward_expand", None, Pointer, Pointer)(graph, result)
        compute = ggml_function("ggml_graph_compute_with_ctx", ctypes.c_int, Pointer, Pointer, ctypes.c_int)
        assert compute(ctx, graph, N_THREADS) == 0
        return _get(result), [_get(t).reshape(a.shape) for a, t in zip(arrays, tensors) if a is not None]
    finally:
        ggml_function("ggml_free", None, Pointer)(ctx)


def ctl(n_seq: int, **values: Any) -> np.ndarray:
    """[S, 8]; a value is one for all sequences, or one for each."""
    made = np.zeros((n_seq, len(CTL)), np.int32)
    for name, value in values.items():
        made[:, CTL.index(name)] = value
    return made


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, count: Optional[np.ndarray], scale: float,
    softcap: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """q [N, G, T, D], k and v [N, n, D], mask f16 [1 or N, T, n], count [N, R] -> [N, T, G, D]"""
    arrays = (q, k[:, None], v[:, None], mask[:, None].astype(np.float16), count, None)  # no sinks
    return _run("attend", *arrays, ctypes.c_float(scale), ctypes.c_float(softcap))[0]


def bias(mask: np.ndarray, count: np.ndarray) -> np.ndarray:
    """mask [S, T, n], count [S, H, R] -> f16 [S*H, T, n]"""
    return _run("bias", mask[:, None].astype(np.float16), count)[0][:, 0]


def rank_terms(terms: np.ndarray, pos: np.ndarray, ctl: np.ndarray, slope: float, age_scale: float) -> np.ndarray:
    """terms [S, H, n, 1 or 2], pos [S, H, n] -> [S, H, n]"""
    return _run("rank_terms", terms, pos, ctl, ctypes.c_float(slope), ctypes.c_float(age_scale))[0][0]


def select(rank: np.ndarray, pos: np.ndarray, ctl: np.ndarray, n_evict_max: int) -> np.ndarray:
    """rank and pos [S, H, n] -> plan [S, H, 3, n_evict_max]"""
    return _run("select", rank, pos, ctl, ctypes.c_int64(n_evict_max))[0]


def centroid(
    means: np.ndarray, count: np.ndarray, k: np.ndarray, v: np.ndarray, plan: np.ndarray, ctl: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """means [S, H, R, Dk + Dv], count [S, H, R], k and v [S, H, n, D] -> means and count"""
    means, count = _run("centroid", means, count, k, v, plan, ctl)[1][:2]
    return means, count


def residual(
    state: np.ndarray, phi: np.ndarray, k: np.ndarray, v: np.ndarray, plan: np.ndarray, ctl: np.ndarray, rate: float,
    decay: float,
) -> np.ndarray:  # fmt: skip
    """state [S, H, Dv + 1, f], phi [f, Dk], k and v [S, H, n, D] -> state"""
    return _run("residual", state, phi, k, v, plan, ctl, ctypes.c_float(rate), ctypes.c_float(decay))[0]


def compact(cache: np.ndarray, plan: np.ndarray, ctl: np.ndarray) -> np.ndarray:
    """cache [S, H, n, D]"""
    return _run("compact", cache, plan, ctl)[0]


def compact_pos(pos: np.ndarray, plan: np.ndarray, ctl: np.ndarray) -> np.ndarray:
    """pos [S, H, n]"""
    return _run("compact_pos", pos, plan, ctl)[0][0]


def plan_of(evicted: np.ndarray) -> np.ndarray:
    """evicted slots [S, H, n], ascending -> a plan for an op that reads nothing else of it"""
    plan = np.full((*evicted.shape[:2], 3, evicted.shape[2]), -1, np.int32)
    plan[:, :, 0] = evicted
    return plan
