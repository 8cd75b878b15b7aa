"""The pairwise indexer of IndexMem v1 (method appendices A and B): queries of its own that ask for keys of its own.

`A_st = sum_h c_sh relu(q_sh . k_t)` is what the token at s asks of the entry at t; the rank of an entry is A reduced over the
latest queries, and the same for all KV heads of a layer. Letters in shapes: n_i and d_i, number and size of its heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Pairwise(nn.Module):
    """Indexer of one layer, kind `pairwise`. Names of parameters are those of docs/sidecar.md."""

    kind = "pairwise"

    def __init__(self, n_embd: int, n_head_kv: int, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.constants = dict(constants)
        n_head, dim, eps = constants["head_count"], constants["head_dim"], constants["norm_eps"]
        self.w_q = nn.Linear(n_embd, n_head * dim)
        self.w_k = nn.Linear(n_embd, dim)
        self.weights_proj = nn.Linear(n_embd, n_head)
        self.q_norm = nn.LayerNorm(dim, eps=eps)
        self.k_norm = nn.LayerNorm(dim, eps=eps)

    @staticmethod
    def defaults(
        mid_dim: int = 128, decay: bool = False, head_dim: int = 16, reduce: str = "max", query_count: int = 128
    ) -> dict[str, Any]:
        """`mid_dim` is the width of all heads together. As released, there are Hq/2 heads of size D/4.

        The mean is what was released; the maximum is the paper's, and what its objective trains.
        """
        return {
            "head_count": max(mid_dim // head_dim, 1), "head_dim": head_dim, "norm_eps": 1e-5, "reduce": reduce,
            "query_count": query_count,
        }  # fmt: skip

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., T, d] -> keys [..., T, d_i], the state of an entry."""
        return self.k_norm(self.w_k(hidden.to(self.w_k.weight.dtype)))

    def queries(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [..., S, d] -> queries [..., S, n_i, d_i] and the weights of heads c [..., S, n_i]."""
        n_head, dim = self.constants["head_count"], self.constants["head_dim"]
        x = hidden.to(self.w_q.weight.dtype)
        q = self.q_norm(self.w_q(x).unflatten(-1, (n_head, dim)))
        return q, self.weights_proj(x) * (n_head * dim) ** -0.5

    def scores(self, q: Tensor, c: Tensor, keys: Tensor) -> Tensor:
        """What queries [..., S, n_i, d_i] with weights [..., S, n_i] ask of keys [..., T, d_i]: A [..., S, T]. No mask."""
        # all heads of all queries in one product: one for each query would be as many small ones
        similar = F.relu(q.flatten(-3, -2) @ keys.mT).unflatten(-2, q.shape[-3:-1])  # [..., S, n_i, T]
        return (c.unsqueeze(-2) @ similar).squeeze(-2)

    def ranks(self, hidden: Tensor, positions: Tensor, newest: int) -> Tensor:
        """Ranks [..., 1, T] float32 of the entries at `positions` when the newest token is at `newest`.

        The queries are those of the last `query_count` tokens up to `newest`, which therefore must be among the T. As in
        the runtime none of them is kept from asking for a later entry: a window at least as long protects such entries.
        """
        latest = (positions <= newest) & (positions > newest - self.constants["query_count"])
        a = self.scores(*self.queries(hidden[..., latest, :]), self(hidden))
        reduced = a.mean(-2, keepdim=True) if self.constants["reduce"] == "mean" else a.amax(-2, keepdim=True)
        return reduced.float()
