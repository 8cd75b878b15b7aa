"""The residual memory once more, in float32 and in the terms of its release: module, names and raw parameters.

Importing this needs PyTorch; tests import it through `pytest.importorskip`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.memories import Residual


class ResidualMemory(nn.Module):
    """The parameters of one layer; the state of each KV head, A [H, f, D] and b [H, f], is passed along."""

    def __init__(self, memory: Residual, il: int) -> None:
        super().__init__()
        n_feature, head_dim = memory.phi[il].shape
        self.phi_proj = nn.Linear(head_dim, n_feature, bias=False)
        self.gate_logit, self.eta_raw, self.decay_logit = (nn.Parameter(torch.empty(())) for _ in range(3))
        self.load_state_dict(
            {"phi_proj.weight": torch.from_numpy(memory.phi[il])}
            | {name: torch.tensor(getattr(memory, name)[il]) for name in ("gate_logit", "eta_raw", "decay_logit")}
        )
        self.eps = memory.eps
        self.requires_grad_(False)

    def start(self, n_head_kv: int, n_embd_v: int) -> tuple[Tensor, Tensor]:
        n_feature = self.phi_proj.out_features
        return torch.zeros(n_head_kv, n_feature, n_embd_v), torch.zeros(n_head_kv, n_feature)

    def write(self, state: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [H, n, D] of the entries that one compression evicts"""
        A, b = state
        f = self.phi_proj(k)
        eta, decay = F.softplus(self.eta_raw), torch.sigmoid(self.decay_logit)
        return decay * A + eta * f.mT @ v, decay * b + eta * f.square().sum(1)

    def forward(self, state: tuple[Tensor, Tensor], q: Tensor, kept: Tensor) -> Tensor:
        """q and the output of the attention to what is kept, [Hq, T, D] -> [Hq, T, D]"""
        A, b = (a.repeat_interleave(len(q) // len(a), dim=0) for a in state)
        f = self.phi_proj(q)
        total = (f.square() * b[:, None]).sum(-1, keepdim=True)
        return kept + torch.sigmoid(self.gate_logit) * (f @ A) / total.clamp_min(self.eps)
