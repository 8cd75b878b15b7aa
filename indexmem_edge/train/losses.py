"""Divergence between the outputs of the gated and the ungated model, without holding the logits of all positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 256


def reverse_kl(
    student: Tensor, teacher: Tensor, head: Tensor, weight: Tensor | None = None, rows: int = ROWS, bias: Tensor | None = None
) -> Tensor:
    """Mean over positions of `sum_v p_s (log p_s - log p_t)`, float32 (method section 7.3).

    student and teacher [N, d] are hidden states after the last norm, head [n_vocab, d] and bias [n_vocab] the
    output matrix of both, weight [N] of each position. Blocks of `rows` positions are computed, and computed again for the gradient.
    """
    weight = torch.ones(len(student), device=student.device) if weight is None else weight
    total = torch.zeros((), device=student.device)
    for i in range(0, len(student), rows):
        part = student[i : i + rows], teacher[i : i + rows].detach(), head, bias, weight[i : i + rows]
        total = total + checkpoint(_block, *part, use_reentrant=False)
    return total / weight.sum()


def _block(student: Tensor, teacher: Tensor, head: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    s = F.linear(student, head, bias).float().log_softmax(-1)
    t = F.linear(teacher, head, bias).float().log_softmax(-1)
    return ((s.exp() * (s - t)).sum(-1) * weight).sum()
