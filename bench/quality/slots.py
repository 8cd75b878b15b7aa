"""The best that the slots of a memory could hold: means of what left a cache, found over all of it at once.

A memory in use meets each entry when it leaves and never again; here all that left are sorted into R groups by their keys
(k-means), and a slot is the mean key and value of a group, with the logarithm of its size as a bias of the logit. Where even
that gives nothing, no memory of means will.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

ROUNDS = 10
RUNNERS_UP = 4  # entries of a slot, where only the best of what left are taken in


@dataclass(frozen=True)
class Held:
    """What a layer holds: K and V [H, n, D], and what is added to the logits of each entry [H, n]."""

    k: Tensor
    v: Tensor
    bias: Optional[Tensor] = None  # none


def groups(k: Tensor, weight: Tensor, n_slots: int, rounds: int = ROUNDS) -> Tensor:
    """The group [H, n] of each key [H, n, D], of `n_slots` at most; by weighted k-means, the same for the same keys.

    Begins with keys that are evenly spaced, and gives the heaviest of the keys that are far from their mean to a group that has
    lost all of its own.
    """
    k, weight = k.float(), weight.float().clamp_min(0)
    heads, n, size = k.shape
    first = torch.linspace(0, n - 1, n_slots, device=k.device).round().long()
    means = k[:, first]
    for _ in range(rounds):
        far = torch.cdist(k, means).square()
        best, group = far.min(-1)
        total = torch.zeros(heads, n_slots, device=k.device).scatter_add_(1, group, weight)
        sums = torch.zeros_like(means).scatter_add_(1, group[..., None].expand(-1, -1, size), weight[..., None] * k)
        moved = sums / total.clamp_min(1e-20)[..., None]
        farthest = (best * weight).topk(n_slots, -1).indices
        spare = k.gather(1, farthest[..., None].expand(-1, -1, size))
        means = torch.where((total > 0)[..., None], moved, spare)
    return torch.cdist(k, means).argmin(-1)


def slots_of(k: Tensor, v: Tensor, n_slots: int, weight: Optional[Tensor] = None) -> Held:
    """`n_slots` slots of entries with K and V [H, n, D]; a slot that got none is never attended to.

    Args:
        weight: [H, n], what an entry counts in the means; default: all alike. The bias counts entries, whatever their weight.
    """
    weight = torch.ones(k.shape[:2], device=k.device) if weight is None else weight.float()
    weight = weight / weight.mean(-1, keepdim=True).clamp_min(1e-20) + 1e-6  # one without any still has a mean
    group = groups(k, weight, n_slots)
    share = torch.zeros(len(k), n_slots, k.shape[1], device=k.device).scatter_(1, group[:, None], weight[:, None])
    share = share / share.sum(-1, keepdim=True).clamp_min(1e-20)
    size = torch.zeros(len(k), n_slots, device=k.device).scatter_add_(1, group, torch.ones_like(weight))
    return Held((share @ k.float()).to(k.dtype), (share @ v.float()).to(v.dtype), size.log())
