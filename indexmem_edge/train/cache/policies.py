"""The policies that need no training, in PyTorch: what a trained indexer is compared with.

Equal in definition to native/policies, which rank again and again while a text is read. Here all entries of a context
are ranked once, at its end, with nothing evicted before: what is compared is what the ranks know, not when they are
asked. So `keydiff` has the mean of all keys of the context, and `snapkv` and `tova` the attention over all of them.
`expected` is not among them: it needs to know how a layer rotates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.future import attention_blocks

SNAPKV_QUERIES, SNAPKV_POOL = 32, 7  # the last queries; neighbours by position, itself in the middle


@dataclass(frozen=True)
class Context:
    """The entries of one layer when a context of n tokens has been read, in the order of their positions 0 to n - 1."""

    layer: int
    hidden: Tensor  # [n, d], what an indexer reads
    q: Tensor  # [Hq, n, D]
    k: Tensor  # [H, n, D]
    scale: float
    softcap: float = 0.0  # as of `Heads`
    sinks: Optional[Tensor] = None

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.k.shape[1], device=self.k.device)


Policy = Callable[[Context], Tensor]  # ranks [H, n] float32, the lowest leave; [1, n] where all heads rank alike


def streaming(c: Context) -> Tensor:
    """The most recent stay."""
    return c.positions.float()[None]


def random(c: Context) -> Tensor:
    """24 bits of a SplitMix64 hash of layer, head and position, in [0, 1); the seed is 0."""
    heads, n = c.k.shape[:2]
    head = np.arange(heads, dtype=np.uint64)[:, None] + np.uint64(c.layer << 12)
    x = np.uint64(0x9E3779B97F4A7C15) * (np.arange(1, n + 1, dtype=np.uint64) + (head << np.uint64(32)))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(31))) >> np.uint64(40)
    return torch.from_numpy(x.astype(np.float32) / 2**24).to(c.k.device)


def knorm(c: Context) -> Tensor:
    """Keys of small norm draw attention."""
    return -c.k.float().norm(dim=-1)


def keydiff(c: Context) -> Tensor:
    """Minus the cosine of a key and the mean of the normalised keys; of a zero key the cosine is 0."""
    unit = F.normalize(c.k.float(), dim=-1)
    mean = F.normalize(unit.mean(1, keepdim=True), dim=-1)
    return -(unit * mean).sum(-1)


def tova(c: Context) -> Tensor:
    """Attention from the newest query, mean over the group."""
    return _attention_of_last(c, 1)


def snapkv(c: Context) -> Tensor:
    """Attention from the last queries, mean over them and the group, then over neighbours: fewer at both ends."""
    attention = _attention_of_last(c, SNAPKV_QUERIES)
    reach = SNAPKV_POOL // 2
    return F.avg_pool1d(attention[:, None], SNAPKV_POOL, 1, reach, count_include_pad=False)[:, 0]


def _attention_of_last(c: Context, count: int) -> Tensor:
    n = c.q.shape[1]
    count = min(count, n)
    blocks = attention_blocks(c.q, c.k, c.scale, first=n - count, block=count, softcap=c.softcap, sinks=c.sinks)
    return next(blocks)[1].mean((1, 2))


POLICIES: Mapping[str, Policy] = {
    "knorm": knorm, "keydiff": keydiff, "streaming": streaming, "random": random, "tova": tova, "snapkv": snapkv,
}  # fmt: skip
