"""Rotary position embedding, as llama.cpp computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Optional

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """YaRN: high frequencies stay, low ones are scaled, those between are mixed (`rope_yarn` in ggml)."""

    n_ctx_orig: int  # context length before the model was stretched
    beta_fast: float = 32.0  # a pair that turns more often within n_ctx_orig stays
    beta_slow: float = 1.0  # one that turns less often is scaled in full
    ext_factor: float = 1.0  # weight of the mixture; 0 is linear scaling

    def kept(self, base: float, n_dim: int) -> np.ndarray:
        """How much of each frequency stays as it is, float64 [n_dim/2] in [0, ext_factor]."""

        def dim(turns: float) -> float:
            return n_dim * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(0, math.floor(dim(self.beta_fast)))
        high = min(n_dim - 1, math.ceil(dim(self.beta_slow)))
        ramp = (np.arange(n_dim // 2) - low) / max(0.001, high - low)
        return self.ext_factor * (1 - ramp.clip(0, 1))


@dataclass(frozen=True)
class Rope:
    """`interleaved`: pairs are neighbours (llama in GGUF); else halves apart (most others, and llama elsewhere)."""

    base: float
    n_dim: int  # dimensions of a head that are rotated, the first ones
    interleaved: bool
    factors: Optional[tuple[float, ...]] = None  # divisors of the n_dim/2 frequencies (Llama 3, LongRoPE)
    scale: float = 1.0  # factor of positions: 1/4 where a model was stretched four times ("linear", "yarn")
    yarn: Optional[Yarn] = None
    magnitude: float = 1.0  # of what is rotated: cosines and sines are multiplied by it
    still: tuple[int, ...] = ()  # pairs that no position of a text turns (M-RoPE)

    def frequencies(self) -> np.ndarray:
        """Angle of each pair per position, float64 [n_dim/2]."""
        # llama.cpp rounds the ratio of neighbours to float32 and multiplies it up. With that ratio the angles at
        # position 32768 are within 0.002 of its own, with an exact one only within 0.004.
        ratio = float(np.float32(self.base) ** np.float32(-2.0 / self.n_dim))
        out = ratio ** np.arange(self.n_dim // 2, dtype=np.float64)
        if self.factors is not None:
            out = out / np.asarray(self.factors, np.float64)
        out[list(self.still)] = 0
        if self.yarn is None:
            return out * self.scale
        kept = self.yarn.kept(self.base, self.n_dim)
        return out * (self.scale * (1 - kept) + kept)

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines times `magnitude`, float32 [T, n_dim/2], of integer positions [T]."""
        angles = positions.double()[:, None] * _frequencies(self, positions.device)
        return (angles.cos() * self.magnitude).float(), (angles.sin() * self.magnitude).float()

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates [..., T, D], in float32 at least; the result has the dtype of x."""
        turned, rest = x[..., : self.n_dim].to(torch.promote_types(x.dtype, torch.float32)), x[..., self.n_dim :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            out = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
        out = out.to(x.dtype)
        return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


@lru_cache(maxsize=16)
def _frequencies(rope: Rope, device: torch.device) -> Tensor:
    """On the device once: every layer of every sequence asks, and a copy would make a GPU wait."""
    return torch.from_numpy(rope.frequencies()).to(device)


def make_rope(
    *, base: float, n_dim: int, interleaved: bool, factors: Optional[tuple[float, ...]] = None, kind: str = "linear",
    factor: float = 0.0, n_ctx_orig: int = 0, attn_factor: float = 1.0, still: tuple[int, ...] = (),
) -> Rope:  # fmt: skip
    """What llama.cpp makes of the metadata `rope.scaling.*` in these architectures (`llama_context`, `rope_yarn`).

    They read neither `yarn_beta_fast` nor any other key of that kind, so the defaults hold. `kind` is `none`, `linear`,
    `yarn` or `longrope`, which scales like `linear` and brings factors; a `factor` of 0 stands for none.
    """
    scale = 1.0 if kind == "none" or factor == 0 else 1 / factor
    yarn, magnitude = None, attn_factor
    if kind == "yarn":
        yarn = Yarn(n_ctx_orig)
        magnitude *= 1 + 0.1 * max(0.0, math.log(1 / scale))
    return Rope(base, n_dim, interleaved, factors, scale, yarn, magnitude, still)


def still_pairs(sections: Sequence[int], n_pair: int, interleaved: bool) -> tuple[int, ...]:
    """Pairs of a head that text does not turn in a model with M-RoPE (`ggml_mrope_cache_init`).

    Four sections of the pairs follow time, height, width and a fourth position. A token of text has the same number in the
    first three and 0 in the last, so what these three do not cover stays. `interleaved`: time, height and width take turns.
    """
    t, h, w, _ = sections
    total = sum(sections)

    def turns(pair: int) -> bool:
        i = pair % total
        return i < 3 * (t, h, w)[i % 3] if interleaved else i < t + h + w

    return tuple(pair for pair in range(n_pair) if not turns(pair))
