"""Rotary position embeddings in plain NumPy: what a layer does to queries and keys, and what renews a position.

A rotation is linear in the position, so a key that was rotated by r and then by d is one that was rotated by r + d. That
holds for every kind here: partial rotation, divided frequencies, YaRN. The magnitude that YaRN and LongRoPE give queries
and keys is theirs once, when they are made; renewing a position does not apply it again.

Angles are llama.cpp's: p * s^i in float32 by repeated multiplication with s = base^(-2/n), pairs (2i, 2i+1) or (i, i + n/2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from tiny.models import TinyConfig

BETA_FAST, BETA_SLOW = 32, 1  # turns within the original length: faster ones stay, slower ones are interpolated by YaRN

# architecture and overrides of a tiny model of every kind; contexts are longer than 32 where that decides
ROTARY_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "norm": ("llama", {}),
    "neox": ("qwen3", {}),
    "partial-norm": ("chatglm", {}),
    "partial-neox": ("phi3", {"rope_dim": 48}),
    "factors": ("llama", {"rope_factors": True}),
    "yarn": ("llama", {"yarn": 4.0, "n_ctx_orig": 64, "rope_base": 1000.0}),
    "yarn-neox": ("qwen2", {"yarn": 2.5, "n_ctx_orig": 64, "rope_magnitude": 0.9, "rope_base": 1000.0}),
    "long-factors": ("phi3", {"long_factors": True, "n_ctx_orig": 32, "rope_magnitude": 1.2}),
    "short-factors": ("phi3", {"long_factors": True, "rope_dim": 48, "rope_magnitude": 1.2}),
    "behind": ("minicpm3", {}),
    "none-in-some-layers": ("smollm3", {}),
}


_MEANS: dict[tuple[int, int, int], tuple[Rotary, np.ndarray]] = {}  # of Rotary.mean_ahead; holds on to whose id it is


@dataclass(frozen=True)
class Rotary:
    n_dims: int  # components of a head that are rotated; the others stay as they are
    base: float
    neox: bool  # pairs (i, i + n/2) instead of (2i, 2i + 1)
    factors: Optional[np.ndarray] = None  # [n/2] divisors of the frequencies
    yarn: float = 1.0  # positions reach so many times further than n_ctx_orig
    n_ctx_orig: int = 0
    magnitude: float = 1.0
    offset: int = 0  # components in front of them

    @staticmethod
    def of(config: TinyConfig, il: int, n_ctx: int = 0) -> Optional[Rotary]:
        """That of a layer in a context of this length, or None if it has none."""
        c = config
        if not c.has_rope(il):
            return None
        n_ctx_orig = c.n_ctx_orig or c.n_ctx_train
        name = "rope_freqs" if c.rope_factors else "rope_factors_long" if n_ctx > n_ctx_orig else "rope_factors_short"
        magnitude = c.rope_magnitude * float(1 + 0.1 * np.log(c.yarn))
        factors = c.weights.get(f"{name}.weight")
        return Rotary(c.n_rot, c.rope_base, c.rope_neox, factors, c.yarn, n_ctx_orig, magnitude, c.rope_offset)

    def angles(self, positions: np.ndarray) -> np.ndarray:
        """[T] -> float32 [T, n/2]"""
        half = self.n_dims // 2
        steps = np.full((len(positions), half), np.float32(self.base) ** np.float32(-1 / half), np.float32)
        steps[:, 0] = positions
        angle = np.multiply.accumulate(steps, axis=1)
        if self.factors is not None:
            angle /= self.factors.astype(np.float32)
        return angle if self.yarn == 1 else angle * self._yarn_rates()

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Renews positions: x [T, ..., D] by positions [T], of any sign."""
        half, start, end = self.n_dims // 2, self.offset, self.offset + self.n_dims
        angle = self.angles(positions).astype(x.dtype)
        angle = angle.reshape(len(x), *[1] * (x.ndim - 2), half)
        if self.neox:
            first, second = np.s_[..., start : start + half], np.s_[..., start + half : end]
        else:
            first, second = np.s_[..., start:end:2], np.s_[..., start + 1 : end : 2]
        cos, sin, out = np.cos(angle), np.sin(angle), x.copy()
        out[first] = x[first] * cos - x[second] * sin
        out[second] = x[first] * sin + x[second] * cos
        return out

    def apply(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Gives new queries or keys their positions, and the magnitude."""
        out = self.rotate(x, positions)
        out[..., self.offset : self.offset + self.n_dims] *= self.magnitude
        return out

    def mean_ahead(self, n: int, n_embd: int) -> np.ndarray:
        """x @ this: the mean of x [..., D] rotated by 1, 2, ..., n positions."""
        key = id(self), n, n_embd
        if key not in _MEANS:
            turned = (self.rotate(np.eye(n_embd), np.full(n_embd, by)) for by in range(1, n + 1))
            _MEANS[key] = self, sum(turned, np.zeros((n_embd, n_embd))) / n
        return _MEANS[key][1]

    def _yarn_rates(self) -> np.ndarray:
        """[n/2] of the angle without scaling: from 1 for fast frequencies to 1/yarn for slow ones."""
        low, high = (self._turning(beta) for beta in (BETA_FAST, BETA_SLOW))
        low, high = max(0.0, np.floor(low)), min(self.n_dims - 1.0, np.ceil(high))
        ramp = np.clip((np.arange(self.n_dims // 2) - low) / max(0.001, high - low), 0, 1)
        return (ramp / self.yarn + 1 - ramp).astype(np.float32)

    def _turning(self, n: int) -> float:
        """Pair that turns n times within the original length."""
        return self.n_dims * np.log(self.n_ctx_orig / (n * 2 * np.pi)) / (2 * np.log(self.base))
