"""Attention of one layer in the frozen model: to all tokens before, or to a window of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # queries of a window layer that are computed at once; more where the window is longer


@dataclass(frozen=True)
class Heads:
    """Operands of one layer's attention."""

    layer: int
    hidden: Tensor  # [B, T, d], what the attention reads, and so does an indexer
    q: Tensor  # [B, Hq, T, D]
    k: Tensor  # [B, H, T, D]
    v: Tensor  # [B, H, T, D]
    scale: float  # of q.k before the softmax
    window: int = 0  # tokens that a query reads at most, its own among them; 0: all before it
    softcap: float = 0.0  # c tanh(logits / c) of the logits; 0: none
    sinks: Optional[Tensor] = None  # [Hq], of each head a logit whose value is 0


Attend = Callable[[Heads], Tensor]  # -> [B, Hq, T, D]
Look = Callable[[Heads], None]


def causal(heads: Heads) -> Tensor:
    """Ordinary attention."""
    return attention(heads.q, heads.k, heads.v, heads.scale, heads.window)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0) -> Tensor:
    """Queries [B, Hq, T, D] of the last T tokens of k and v [B, H, S + T, D] -> [B, Hq, T, D].

    With a window no query meets more than two windows of keys, however many there are.
    """
    total, past = q.shape[2], k.shape[2] - q.shape[2]
    if past == 0 and not 0 < window < total:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    step = max(window, BLOCK) if window else total
    out = []
    for i in range(0, total, step):
        n = min(step, total - i)
        end = past + i + n
        first = max(0, past + i - window + 1) if window else 0
        rows, keys = torch.arange(end - n, end, device=q.device)[:, None], torch.arange(first, end, device=q.device)
        seen = keys <= rows
        if window:
            seen &= keys > rows - window
        out.append(
            F.scaled_dot_product_attention(
                q[:, :, i : i + n], k[:, :, first:end], v[:, :, first:end], attn_mask=seen, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(out, dim=2)
