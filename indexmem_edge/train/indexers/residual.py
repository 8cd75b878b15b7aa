"""The residual memory of IndexMem v1 (method appendix B): attention to what left, linear in features, added to the rest.

    f(x) = x W                                                                                    k, q after RoPE
    write, once per eviction, all its entries E:   A <- decay A + eta sum_E f(k)^T v,   b <- decay b + eta sum_E f(k)^2
    read:                                          o = o_kept + gate f(q) A / max(f(q)^2 . b, eps)

Parameters belong to a layer, the state (A, b) to a KV head. Letters in shapes: f features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, Tensor]  # A [H, f, D] and b [H, f]

GATE, ETA, DECAY = 1e-3, 1e-3, 0.99  # what training starts from


class Residual(nn.Module):
    """Memory of one layer, kind `residual`.

    `phi_proj.weight` is a tensor of docs/sidecar.md, the three scalars are its constants of the same names.
    """

    kind = "residual"

    def __init__(self, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.constants = dict(constants)
        self.phi_proj = nn.Linear(constants["head_dim"], constants["feature_dim"], bias=False)
        self.gate_logit = nn.Parameter(torch.tensor(_logit(GATE)))
        self.eta_raw = nn.Parameter(torch.tensor(math.log(math.expm1(ETA))))
        self.decay_logit = nn.Parameter(torch.tensor(_logit(DECAY)))

    @staticmethod
    def defaults(head_dim: int, feature_dim: int = 64) -> dict[str, Any]:
        return {"feature_dim": feature_dim, "head_dim": head_dim, "eps": 1e-6}

    @property
    def dtype(self) -> torch.dtype:
        return self.phi_proj.weight.dtype

    def start(self, n_head_kv: int) -> State:
        """The state that nothing was written to."""
        weight = self.phi_proj.weight
        n_feature, head_dim = weight.shape
        return weight.new_zeros(n_head_kv, n_feature, head_dim), weight.new_zeros(n_head_kv, n_feature)

    def write(self, state: State, k: Tensor, v: Tensor) -> State:
        """The state after one eviction, of keys and values [H, n, D]. The past decays once, however many they are."""
        A, b = state
        f = self.phi_proj(k)
        eta, decay = F.softplus(self.eta_raw), torch.sigmoid(self.decay_logit)
        return decay * A + eta * (f.mT @ v), decay * b + eta * f.square().sum(1)

    def read(self, state: State, q: Tensor) -> Tensor:
        """What is added to the output of queries q [Hq, n, D], gate included; zeros before the first eviction."""
        A, b = state
        f = self.phi_proj(q.unflatten(0, (len(A), -1)))  # [H, G, n, f]
        total = (f.square() @ b[:, None, :, None]).clamp_min(self.constants["eps"])
        return torch.sigmoid(self.gate_logit) * (f @ A[:, None] / total).flatten(0, 1)

    def forward(self, state: State, q: Tensor, kept: Tensor) -> Tensor:
        """q and the output of the attention to what is kept, [Hq, n, D] -> output [Hq, n, D]."""
        return kept + self.read(state, q)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
