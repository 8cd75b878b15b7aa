"""Frozen weights as a GGUF file stores them, dequantised when they are used.

A matrix lies in memory as the blocks of its file, a quarter to a half of what it takes in bfloat16, and becomes numbers when something is
multiplied with it, for the result and once more for the gradient: autograd would keep the numbers of all layers until then. So a
training needs the memory of the file and of one matrix. The numbers are those of the package gguf, bit for bit; here they are computed
by PyTorch, so that a GPU does it where the blocks lie.

A block is a run of elements of a row with scales of its own; its bytes are those of ggml's `block_*` structs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor

Type = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Quantised:
    """A matrix, or several of one size, in blocks.

    Attributes:
        blocks: uint8 [rows, bytes of a row].
        shape: of the numbers; the last dimension is a row.
        dtype: of the numbers.
    """

    blocks: Tensor
    kind: Type
    shape: tuple[int, ...]
    dtype: torch.dtype

    def numbers(self) -> Tensor:
        elements, size = gguf.GGML_QUANT_SIZES[self.kind]
        return _DEQUANTISE[self.kind](self.blocks.view(-1, size)).view(-1, elements).to(self.dtype).view(self.shape)

    def __getitem__(self, i: int) -> Quantised:
        """The matrix with that number, of several."""
        rows = self.shape[1]
        return replace(self, blocks=self.blocks[i * rows : (i + 1) * rows], shape=self.shape[1:])

    def split(self, sizes: list[int]) -> list[Quantised]:
        """Along the first dimension of a matrix; the parts share its memory."""
        return [replace(self, blocks=part, shape=(len(part), *self.shape[1:])) for part in self.blocks.split(sizes)]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Quantised:
        return replace(self, blocks=self.blocks.to(device), dtype=dtype)


Matrix = Union[Tensor, Quantised]


def linear(x: Tensor, weight: Matrix, bias: Optional[Tensor] = None) -> Tensor:
    """`F.linear` with a frozen matrix, which gets no gradient."""
    if not isinstance(weight, Quantised):
        return F.linear(x, weight, bias)
    product: Tensor = _Product.apply(x, weight)
    return product if bias is None else product + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantised) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.numbers())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.weight.numbers(), None


def can_stay(name: str, kind: Type) -> bool:
    """Whether a tensor stays in blocks. Embedding and output matrix do not: every token reads a row of one and all of the other. Routers
    do not, either: they are small."""
    return kind in _DEQUANTISE and name.startswith("blk.") and not name.endswith("ffn_gate_inp.weight")


class StoredWeights(Mapping[str, Tensor]):
    """Weights by name, dequantised anew each time that one is asked for."""

    def __init__(self, stored: Mapping[str, Matrix]) -> None:
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        found = self.stored[name]
        return found.numbers() if isinstance(found, Quantised) else found

    def __contains__(self, name: object) -> bool:
        return name in self.stored  # without dequantising it

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def to(self, device: torch.device | str, dtype_of: Callable[[str], torch.dtype]) -> StoredWeights:
        return StoredWeights({name: w.to(device, dtype_of(name)) for name, w in self.stored.items()})


def _half(blocks: Tensor, i: int) -> Tensor:
    """The float16 numbers at byte i of each block, as float32 [n, 1]."""
    return blocks[:, i : i + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[..., n] bytes -> [..., 2n]: all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _bits(packed: Tensor) -> Tensor:
    """[n, bytes] -> [n, 8 bytes]: the bits of a little-endian number, lowest first."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (packed[..., None] >> shifts & 1).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).to(torch.int8) - 8).float()


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4
    return _half(b, 0) * (q.to(torch.int8) - 16).float()


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4
    return _half(b, 0) * q.float() + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and minima [n, 8, 1] of the eight parts of a block of Q4_K or Q5_K, out of 12 bytes [n, 12]."""
    a, b, c = packed.split(4, -1)
    scales = torch.cat((a & 63, c & 15 | a >> 6 << 4), -1)
    minima = torch.cat((b & 63, c >> 4 | b >> 6 << 4), -1)
    return scales[..., None].float(), minima[..., None].float()


def _k(b: Tensor, q: Tensor) -> Tensor:
    """Blocks of Q4_K and Q5_K, whose numbers are q [n, 8, 32]."""
    scales, minima = _scales_and_minima(b[:, 4:16])
    return (_half(b, 0)[..., None] * scales) * q.float() - _half(b, 2)[..., None] * minima


def _q4_k(b: Tensor) -> Tensor:
    return _k(b, _nibbles(b[:, 16:].unflatten(1, (4, 32))).reshape(-1, 8, 32))


def _q5_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, 48:].unflatten(1, (4, 32))).reshape(-1, 8, 32)
    parts = torch.arange(8, device=b.device, dtype=torch.uint8)[:, None]
    return _k(b, low | (b[:, None, 16:48] >> parts & 1) << 4)


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, :128].unflatten(1, (2, 64))).reshape(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], device=b.device, dtype=torch.uint8)[:, None]
    high = (b[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3).reshape(-1, 8, 32)
    q = ((low | high << 4).to(torch.int8) - 32).float().reshape(-1, 16, 16)
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    return (_half(b, 208) * scales)[..., None] * q


_DEQUANTISE: dict[Type, Callable[[Tensor], Tensor]] = {
    Type.Q4_0: _q4_0, Type.Q4_1: _q4_1, Type.Q5_0: _q5_0, Type.Q5_1: _q5_1, Type.Q8_0: _q8_0,
    Type.Q4_K: _q4_k, Type.Q5_K: _q5_k, Type.Q6_K: _q6_k,
}  # fmt: skip
