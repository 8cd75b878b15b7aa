"""The indexers once more, in float32 and as PyTorch modules: close to how they are trained and released.

Importing this needs PyTorch; tests import it through `pytest.importorskip`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.indexers import Indexer


class Retention(nn.Module):
    def __init__(self, indexer: Indexer) -> None:
        super().__init__()
        c, d, H = indexer.constants, indexer.n_embd, indexer.n_head_kv
        width = c["mid_dim"] or d
        self.in_norm = nn.LayerNorm(d, eps=c["norm_eps"])
        if c["trunk"] == "mlp":
            self.input_proj = nn.Linear(d, width, bias=False)
            self.mid_norm = nn.LayerNorm(width, eps=c["norm_eps"])
        self.magnitude_proj = nn.Linear(width, H, bias=False)
        if c["decay"]:
            self.retention_proj = nn.Linear(width, H)

    def trunk(self, hidden: Tensor) -> Tensor:
        x = self.in_norm(hidden.to(self.in_norm.weight.dtype))
        return F.gelu(self.mid_norm(self.input_proj(x))) if hasattr(self, "input_proj") else x

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, d] -> [T, H, 1 or 2]"""
        x = self.trunk(hidden)
        state = [self.magnitude_proj(x).float()]
        if hasattr(self, "retention_proj"):
            state.append(-F.softplus(self.retention_proj(x).float()))
        return torch.stack(state, dim=-1)


class KVzap(nn.Module):
    def __init__(self, indexer: Indexer) -> None:
        super().__init__()
        width = indexer.constants["mid_dim"]
        self.in_proj = nn.Linear(indexer.n_embd, width) if width else None
        self.out_proj = nn.Linear(width or indexer.n_embd, indexer.n_head_kv)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden if self.in_proj is None else F.gelu(self.in_proj(hidden))
        return self.out_proj(x).unsqueeze(-1)


class FastKVzip(nn.Module):
    def __init__(self, indexer: Indexer) -> None:
        super().__init__()
        c, d, H = indexer.constants, indexer.n_embd, indexer.n_head_kv
        self.shape, self.dim = (H, c["group_count"], c["dim"]), c["dim"]
        self.q_proj = nn.Linear(d, H * c["group_count"] * self.dim)
        self.k_proj = nn.Linear(d, H * self.dim, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.dim, eps=c["norm_eps"]) for _ in range(2))
        self.k_base = nn.Parameter(torch.empty(H, c["base_count"], self.dim))
        self.b = nn.Parameter(torch.empty(H, c["group_count"]))

    def forward(self, hidden: Tensor) -> Tensor:
        q = self.q_norm(self.q_proj(hidden).unflatten(-1, self.shape))  # [T, H, g, dim]
        k = self.k_norm(self.k_proj(hidden).unflatten(-1, (self.shape[0], 1, self.dim)))
        own = (q * k).sum(-1, keepdim=True) * self.dim**-0.5 + self.b[..., None]
        base = q @ self.k_base.mT * self.dim**-0.5
        return torch.cat([own, base], dim=-1).softmax(-1)[..., 0].mean(-1, keepdim=True)


class Pairwise(nn.Module):
    def __init__(self, indexer: Indexer) -> None:
        super().__init__()
        c, d = indexer.constants, indexer.n_embd
        self.n_head, self.dim = c["head_count"], c["head_dim"]
        self.w_q, self.w_k = nn.Linear(d, self.n_head * self.dim), nn.Linear(d, self.dim)
        self.weights_proj = nn.Linear(d, self.n_head)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.dim, eps=c["norm_eps"]) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.k_norm(self.w_k(hidden)).unsqueeze(-2)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """A [s, n] of hidden states [s, d] and [n, d]"""
        q = self.q_norm(self.w_q(queries).unflatten(-1, (self.n_head, self.dim)))
        c = self.weights_proj(queries) * (self.n_head * self.dim) ** -0.5
        return (F.relu(q @ self.forward(keys)[:, 0].mT) * c[..., None]).sum(1)


MODULES = {"retention": Retention, "kvzap": KVzap, "fast_kvzip": FastKVzip, "pairwise": Pairwise}


def module(indexer: Indexer, il: int) -> nn.Module:
    """The indexer of one layer."""
    made = MODULES[indexer.kind](indexer).requires_grad_(False)
    made.load_state_dict({name: torch.from_numpy(a) for name, a in indexer.layers[il].items()})
    return made
