"""What a key or value is after it has been put into a cache: rounded to the type of the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Union

import numpy as np
from numpy.typing import DTypeLike

Rounding = Callable[[np.ndarray], np.ndarray]  # [..., D] -> the same shape and type
CacheType = Union[DTypeLike, Rounding, None]

HADAMARD = 64  # rows of a quantised cache are rotated in pieces of this size, which spreads outliers
BLOCK = 32  # values that share a scale


def bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    even = 0x7FFF + (bits >> 16 & 1)
    return (bits + even & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(x.dtype)


def q8_0(x: np.ndarray) -> np.ndarray:
    if x.shape[-1] != HADAMARD:
        raise ValueError(f"heads of {HADAMARD} only: others are rotated in pieces of other sizes, or not at all")
    blocks = (x @ _hadamard(HADAMARD)).astype(np.float32).reshape(*x.shape[:-1], HADAMARD // BLOCK, BLOCK)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        steps = np.rint(blocks * np.where(scale > 0, 1 / scale, 0).astype(np.float32))
    rounded = steps * scale.astype(np.float16).astype(np.float32)
    return (rounded.reshape(x.shape) @ _hadamard(HADAMARD)).astype(x.dtype)


def rounding(cache: CacheType) -> Rounding:
    """None: a cache that rounds nothing."""
    if cache is None or callable(cache) and not isinstance(cache, type):
        return cache or (lambda x: x)
    return lambda x: x.astype(cache).astype(x.dtype)


def _hadamard(n: int) -> np.ndarray:
    """[n, n], orthonormal, symmetric and its own inverse."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)
