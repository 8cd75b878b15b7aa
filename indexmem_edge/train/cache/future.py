"""How much attention a key receives from later queries: what a perfect indexer would know, and how well one does.

All functions take the operands of one layer and never hold more than one block of queries against all keys, in float32.
`window` is the number of most recent tokens that are never evicted: what a query reads there needs no score.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

BLOCK = 256


def attention_blocks(
    q: Tensor, k: Tensor, scale: float, first: int = 0, block: int = BLOCK, softcap: float = 0.0,
    sinks: Optional[Tensor] = None,
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Probabilities of causal attention, block of queries by block: (i, p [H, G, n, i + n]) of queries i to i + n.

    q [Hq, T, D], k [H, T, D]; query head h reads KV head h // G. Queries before `first` are left out. `softcap` and `sinks`
    are those of `Heads`; what a sink takes is left out, so that rows sum to less than 1.
    """
    n_head, total, _ = q.shape
    grouped = q.unflatten(0, (len(k), n_head // len(k)))
    for i in range(first, total, block):
        n = min(block, total - i)
        s = (grouped[:, :, i : i + n] @ k[:, None, : i + n].mT).float() * scale
        if softcap:
            s = softcap * (s / softcap).tanh()
        s[..., i:].masked_fill_(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        if sinks is None:
            yield i, s.softmax(-1)
        else:
            taken = sinks.float().view(len(k), -1, 1, 1).expand(-1, -1, n, 1)
            yield i, torch.cat((s, taken), -1).softmax(-1)[..., :-1]


def future_attention(
    q: Tensor, k: Tensor, scale: float, window: int, asked: int | None = None, softcap: float = 0.0,
    sinks: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The largest attention that each key receives from a query `window` or more tokens later.

    Returns [H, T] twice, the maximum over the query heads of the group: from all such queries, and from those at
    positions >= `asked` alone (zeros where there is none).
    """
    heads, total = len(k), k.shape[1]
    best, best_asked = (torch.zeros(heads, total, device=k.device) for _ in range(2))
    asked = total if asked is None else asked
    keys = torch.arange(total, device=k.device)
    for i, p in attention_blocks(q, k, scale, softcap=softcap, sinks=sinks):
        n, seen = p.shape[-2], p.shape[-1]
        rows = torch.arange(i, i + n, device=k.device)[:, None]
        p = p.amax(1).masked_fill_(keys[:seen] > rows - window, 0)  # [H, n, seen]
        torch.maximum(best[:, :seen], p.amax(1), out=best[:, :seen])
        if i + n > asked:
            late = p[:, max(asked - i, 0) :].amax(1)
            torch.maximum(best_asked[:, :seen], late, out=best_asked[:, :seen])
    return best, best_asked


def future_mass(
    q: Tensor, k: Tensor, scale: float, n_context: int, softcap: float = 0.0, sinks: Optional[Tensor] = None
) -> Tensor:
    """Attention mass [H, n_context] that keys of the context receive from the queries after it, summed over them and the group."""
    mass = torch.zeros(len(k), n_context, device=k.device)
    for _, p in attention_blocks(q, k, scale, first=n_context, softcap=softcap, sinks=sinks):
        mass += p[..., :n_context].sum((1, 2))
    return mass


def kept_mask(scores: Tensor, budget: int, sinks: int, window: int) -> Tensor:
    """Who stays of n entries [..., n] in the order of their positions: sinks, window, and the best others, `budget` in all.

    Ties go to the earlier position.
    """
    n = scores.shape[-1]
    protected = scores.clone().float()
    protected[..., :sinks] = torch.inf
    if window:
        protected[..., max(n - window, 0) :] = torch.inf
    order = protected.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., : min(budget, n)], True)
