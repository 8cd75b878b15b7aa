"""Gated attention: dense causal attention in which every entry outside of sinks and window has a learned weight.

Method section 7.1. With `raw_ij = e_j + rate_j * i / age_scale` and the history of row i, `sinks <= j <= i - window`:

    gate_ij = 0                                         pinned: sinks, and the last `window` tokens with the query itself
            = g raw_ij - lse_i + log(mass)              history; lse_i = logsumexp over it of g raw_ij
    o_i     = softmax over j <= i of (scale q_i.k_j + gate_ij), times v

so the factors of a row's history sum to `mass`. Nothing of size T x T is kept: blocks of rows of one KV head are computed,
and computed again for the gradient. All arithmetic is float32. `gated_dense` is the plain version.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

BLOCK = 128


@dataclass(frozen=True)
class Pins:
    """Who needs no gate, and how much all others weigh together."""

    sinks: int
    window: int
    mass: float = 256.0


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, e: Tensor, rate: Optional[Tensor], g: Tensor, scale: float, age_scale: float, pins: Pins
) -> Tensor:
    """q [Hq, T, D], k and v [H, T, D], e and rate [H, T] (rate None: no decay), g [1] -> [Hq, T, D] in the dtype of q."""
    out = _Gated.apply(q.float(), k.float(), v.float(), e.float(), None if rate is None else rate.float(), g, scale, age_scale, pins)
    return out.to(q.dtype)


def gated_dense(
    q: Tensor, k: Tensor, v: Tensor, e: Tensor, rate: Optional[Tensor], g: Tensor, scale: float, age_scale: float, pins: Pins
) -> Tensor:
    """The same as the equations say it, all at once."""
    total, group = k.shape[1], len(q) // len(k)
    i, j = torch.arange(total, device=q.device)[:, None], torch.arange(total, device=q.device)
    history = (j >= pins.sinks) & (j <= i - pins.window)
    x = g * (e[:, None] + (0 if rate is None else rate[:, None] * (i / age_scale)))  # [H, T, T]
    x = x.expand(-1, total, -1)
    lse = x.masked_fill(~history, -torch.inf).logsumexp(-1, keepdim=True)
    gate = torch.where(history, x - lse + math.log(pins.mass), 0.0)
    s = scale * q.unflatten(0, (len(k), group)) @ k[:, None].mT + gate[:, None]
    return (s.masked_fill(j > i, -torch.inf).softmax(-1) @ v[:, None]).flatten(0, 1)


class _Block:
    """Rows i to i + n of one KV head: what forward and backward share."""

    def __init__(self, i: int, n: int, e: Tensor, rate: Optional[Tensor], g: Tensor, age_scale: float, pins: Pins) -> None:
        m = i + n
        rows, keys = torch.arange(i, m, device=e.device)[:, None], torch.arange(m, device=e.device)
        self.age = rows / age_scale
        self.history = (keys >= pins.sinks) & (keys <= rows - pins.window)
        self.future = keys > rows
        self.raw = e[:m].expand(n, m) if rate is None else e[:m] + rate[:m] * self.age
        x = (g * self.raw).masked_fill_(~self.history, -torch.inf)
        self.lse = x.logsumexp(-1, keepdim=True)
        self.lse = torch.where(self.lse.isinf(), 0.0, self.lse)  # rows without history
        self.x = x
        gate = torch.where(self.history, x - (self.lse - math.log(pins.mass)), 0.0)
        self.gate = gate.masked_fill_(self.future, -torch.inf)

    def probabilities(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[G, n, i + n] of queries [G, n, D] and keys [i + n, D]"""
        gate, group = self.gate[None], len(q)
        return torch.baddbmm(gate.expand(group, -1, -1), q, k.mT.expand(group, -1, -1), alpha=scale).softmax(-1)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, e: Tensor, rate: Optional[Tensor], g: Tensor, scale: float, age_scale: float, pins: Pins) -> Tensor:  # fmt: skip
        group, out = len(q) // len(k), torch.empty_like(q)
        for h in range(len(k)):
            heads = slice(h * group, (h + 1) * group)
            for i in range(0, q.shape[1], BLOCK):
                n = min(BLOCK, q.shape[1] - i)
                block = _Block(i, n, e[h], None if rate is None else rate[h], g, age_scale, pins)
                p = block.probabilities(q[heads, i : i + n], k[h, : i + n], scale)
                out[heads, i : i + n] = p @ v[h, : i + n]
        ctx.save_for_backward(q, k, v, e, rate, g, out)
        ctx.rest = scale, age_scale, pins
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:  # type: ignore[override]
        q, k, v, e, rate, g, out = ctx.saved_tensors
        scale, age_scale, pins = ctx.rest
        group = len(q) // len(k)
        dq, dk, dv, de, dg = map(torch.zeros_like, (q, k, v, e, g))
        dr = None if rate is None else torch.zeros_like(rate)
        delta = (grad * out).sum(-1, keepdim=True)
        for h in range(len(k)):
            heads = slice(h * group, (h + 1) * group)
            for i in range(0, q.shape[1], BLOCK):
                n = min(BLOCK, q.shape[1] - i)
                m = i + n
                block = _Block(i, n, e[h], None if rate is None else rate[h], g, age_scale, pins)
                qb, gb = q[heads, i:m], grad[heads, i:m]
                p = block.probabilities(qb, k[h, :m], scale)
                dv[h, :m] += p.flatten(0, 1).mT @ gb.flatten(0, 1)
                ds = p.mul_(gb @ v[h, :m].mT - delta[heads, i:m])
                dq[heads, i:m] = scale * (ds @ k[h, :m])
                dk[h, :m] += scale * (ds.flatten(0, 1).mT @ qb.flatten(0, 1))
                dgate = ds.sum(0).masked_fill_(~block.history, 0)
                dx = dgate - dgate.sum(-1, keepdim=True) * (block.x - block.lse).exp()  # exp(-inf) = 0 where pinned
                dg += (block.raw * dx).sum()
                de[h, :m] += g * dx.sum(0)
                if dr is not None:
                    dr[h, :m] += g * (dx * block.age).sum(0)
        return dq, dk, dv, de, dr, dg, None, None, None
