"""Divergence between the outputs of the model with entries missing and the whole one, without holding all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..model.decoder import soft_capped

ROWS = 256


Block = Callable[[Tensor, Tensor], Tensor]  # log probabilities of student and teacher [n, n_vocab] -> [n]


def reverse_kl(
    student: Tensor, teacher: Tensor, head: Tensor, weight: Tensor | None = None, rows: int = ROWS,
    bias: Tensor | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Mean over positions of `sum_v p_s (log p_s - log p_t)`, float32 (method section 7.3).

    student and teacher [N, d] are hidden states after the last norm, head [n_vocab, d], bias [n_vocab] and `softcap` what
    makes logits of both, weight [N] of each position. Blocks of `rows` positions are computed, and computed again for the
    gradient.
    """
    return _mean(lambda s, t: (s.exp() * (s - t)).sum(-1), student, teacher, head, weight, rows, bias, softcap)


def both_kl(
    student: Tensor, teacher: Tensor, head: Tensor, weight: Tensor | None = None, rows: int = ROWS,
    bias: Tensor | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The mean of reverse and forward divergence, `sum_v (p_s - p_t) (log p_s - log p_t) / 2`; arguments as of `reverse_kl`.

    The reverse one punishes what the student makes up, the forward one what it has forgotten.
    """

    def both(s: Tensor, t: Tensor) -> Tensor:
        return ((s.exp() - t.exp()) * (s - t)).sum(-1) / 2

    return _mean(both, student, teacher, head, weight, rows, bias, softcap)


def _mean(
    of: Block, student: Tensor, teacher: Tensor, head: Tensor, weight: Tensor | None, rows: int, bias: Tensor | None,
    softcap: float,
) -> Tensor:  # fmt: skip
    def block(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = (soft_capped(F.linear(h, head, bias).float(), softcap).log_softmax(-1) for h in (student, teacher))
        return (of(s, t) * weight).sum()

    weight = torch.ones(len(student), device=student.device) if weight is None else weight
    total = torch.zeros((), device=student.device)
    for i in range(0, len(student), rows):
        part = student[i : i + rows], teacher[i : i + rows].detach(), weight[i : i + rows]
        total = total + checkpoint(block, *part, use_reentrant=False)
    return total / weight.sum()
