"""Attention to a context of which only the best entries are left, with a gradient for the choice.

A row of queries reads the kept entries of the context and, causally, the rows before it. Who is kept is decided by ranks,
exactly as in use. A choice has no gradient, so that of a relaxation stands in for it (straight-through): entry j of the
context has the factor m_j, 1 if it is kept and 0 if not, in

    o_i = (sum_j m_j e^{s_ij} v_j + own) / (sum_j m_j e^{s_ij} + own)

whose derivative is known for those that are left out as well: what an entry would change if it came back. m_j follows
the rank as `sigmoid((rank_j - threshold) / spread)` would; the threshold is between the worst that is kept and the best that
is not, and moves with the ranks so that the sum of all stays. `selected_dense` is the plain version of the attention.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..cache.future import kept_mask

SPREAD = 0.5  # of the relaxation, in standard deviations of a head's ranks


def choose(ranks: Tensor, budget: int, sinks: int, window: int) -> Tensor:
    """Factors [H, n] of the entries of a context with ranks [H, n]: 1 for the `budget` that are kept, and 0.

    The gradient is that of the relaxation. Sinks and the last `window` entries are always kept and have none.
    """
    kept = kept_mask(ranks.detach(), budget, sinks, window)
    n = ranks.shape[-1]
    pinned = torch.arange(n, device=ranks.device)
    pinned = (pinned < sinks) | (pinned >= n - window)
    candidates = ranks.detach()[:, ~pinned]
    if not candidates.shape[-1] or bool(kept.all()):
        return kept.float()
    inside = kept[:, ~pinned]
    worst = candidates.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
    best = candidates.masked_fill(inside, -torch.inf).amax(-1, keepdim=True)
    threshold = torch.where(worst.isinf(), best, (worst + best) / 2)
    width = SPREAD * candidates.std(-1, correction=0, keepdim=True).clamp_min(1e-6)
    soft = ((ranks.detach() - threshold) / width).sigmoid()
    slope = torch.where(pinned, 0, soft * (1 - soft) / width)
    # The threshold follows the ranks, so that as many stay: only being above the others of a head is worth anything.
    moved = (slope * ranks).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
    change = slope * (ranks - moved)
    return torch.where(pinned, kept.float(), kept.float() + (change - change.detach()))


def selected_attention(q: Tensor, k: Tensor, v: Tensor, factors: Tensor, k_new: Tensor, v_new: Tensor, scale: float) -> Tensor:
    """q [Hq, m, D]; k, v [H, n, D] of the context, factors [H, n]; k_new, v_new [H, m, D] of the rows -> [Hq, m, D].

    Float32 inside, the dtype of q outside. No gradient for k and v.
    """
    operands = (t.float() for t in (q, k, v, factors, k_new, v_new))
    return _Selected.apply(*operands, scale).to(q.dtype)


def selected_dense(q: Tensor, k: Tensor, v: Tensor, factors: Tensor, k_new: Tensor, v_new: Tensor, scale: float) -> Tensor:
    """The same as the equation says it, differentiable in everything; only for logits that `exp` can take."""
    group, m = len(q) // len(k), q.shape[1]
    grouped = q.unflatten(0, (len(k), group))
    old = (scale * grouped @ k[:, None].mT).exp() * factors[:, None, None]
    new = (scale * grouped @ k_new[:, None].mT).exp().tril()
    total = old.sum(-1, keepdim=True) + new.sum(-1, keepdim=True)
    return ((old @ v[:, None] + new @ v_new[:, None]) / total).reshape(len(q), m, -1)


class _Selected(torch.autograd.Function):
    """What is kept for the gradient is of the size of the operands; probabilities are computed again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, factors: Tensor, k_new: Tensor, v_new: Tensor, scale: float) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        for h, heads in _groups(q, k):
            old, new = _logits(q[heads], k[h], k_new[h], scale)
            lse[heads] = torch.cat((old.masked_fill(factors[h] == 0, -torch.inf), new), -1).logsumexp(-1)
            p_old, p_new = _probabilities(old, new, factors[h], lse[heads])
            out[heads] = p_old @ v[h] + p_new @ v_new[h]
        ctx.save_for_backward(q, k, v, factors, k_new, v_new, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:  # type: ignore[override]
        q, k, v, factors, k_new, v_new, out, lse = ctx.saved_tensors
        scale = ctx.scale
        dq, dm, dk, dv = map(torch.zeros_like, (q, factors, k_new, v_new))
        delta = (grad * out).sum(-1, keepdim=True)
        for h, heads in _groups(q, k):
            old, new = _logits(q[heads], k[h], k_new[h], scale)
            p_old, p_new = _probabilities(old, new, factors[h], lse[heads])
            g, d = grad[heads], delta[heads]
            said = g @ v[h].mT - d  # what more of each entry would change
            ds_old, ds_new = p_old * said, p_new * (g @ v_new[h].mT - d)
            # One that comes back takes its share of the rows. By the derivative alone, e^{s - lse}, it could be more than all.
            back = (old - lse[heads][..., None]).sigmoid()
            dm[h] = (torch.where(factors[h] > 0, p_old, back) * said).sum((0, 1))
            dq[heads] = scale * (ds_old @ k[h] + ds_new @ k_new[h])
            dk[h] = scale * (ds_new.mT @ q[heads]).sum(0)
            dv[h] = (p_new.mT @ g).sum(0)
        return dq, None, None, dm, dk, dv, None


def _groups(q: Tensor, k: Tensor) -> list[tuple[int, slice]]:
    group = len(q) // len(k)
    return [(h, slice(h * group, (h + 1) * group)) for h in range(len(k))]


def _logits(q: Tensor, k: Tensor, k_new: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[G, m, n] of the context and [G, m, m] of the rows, -inf in their future."""
    m = q.shape[1]
    future = torch.ones(m, m, dtype=torch.bool, device=q.device).triu(1)
    return scale * (q @ k.mT), (scale * (q @ k_new.mT)).masked_fill_(future, -torch.inf)


def _probabilities(old: Tensor, new: Tensor, factors: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    p = (old - lse[..., None]).exp().masked_fill_(factors == 0, 0)
    return p, (new - lse[..., None]).exp()
