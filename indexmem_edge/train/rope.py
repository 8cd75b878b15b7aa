"""Rotary position embedding, as llama.cpp computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """`interleaved`: pairs are neighbours (llama in GGUF); else halves apart (qwen2, qwen3, and llama elsewhere)."""

    base: float
    n_dim: int  # dimensions of a head that are rotated, the first ones
    interleaved: bool
    factors: Optional[tuple[float, ...]] = None  # divisors of the n_dim/2 frequencies (llama 3)
    scale: float = 1.0  # factor of positions: 1/4 where a model was stretched four times ("linear")

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [T, n_dim/2], of integer positions [T]."""
        exponents = torch.arange(0, self.n_dim, 2, dtype=torch.float64, device=positions.device) / self.n_dim
        frequencies = self.base**-exponents * self.scale
        if self.factors is not None:
            frequencies = frequencies / torch.tensor(self.factors, dtype=torch.float64, device=positions.device)
        angles = positions.double()[:, None] * frequencies
        return angles.cos().float(), angles.sin().float()

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates [..., T, D] in float32; the result has the dtype of x."""
        turned, rest = x[..., : self.n_dim].float(), x[..., self.n_dim :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            out = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return torch.cat((out.to(x.dtype), rest), dim=-1)
