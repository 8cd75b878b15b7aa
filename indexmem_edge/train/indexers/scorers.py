"""Indexers that are trained: one module per layer, hidden state in, state of an entry out, as native/indexers has them.

Names of parameters are those of docs/sidecar.md, so a state dict is the content of a sidecar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import TrainingError
from .pairwise import Pairwise


class Retention(nn.Module):
    """Retention scorer of IndexMem++ (method sections 1.2 and 1.3), kind `retention`."""

    kind = "retention"

    def __init__(self, n_embd: int, n_head_kv: int, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.constants = dict(constants)
        eps, mid = constants["norm_eps"], constants["mid_dim"]
        width = mid or n_embd
        self.in_norm = nn.LayerNorm(n_embd, eps=eps)
        if mid:
            self.input_proj = nn.Linear(n_embd, mid, bias=False)
            self.mid_norm = nn.LayerNorm(mid, eps=eps)
        self.magnitude_proj = nn.Linear(width, n_head_kv, bias=False)
        self.gate_scale = nn.Parameter(torch.ones(1))  # of the training gate; ranks do not read it
        if constants["decay"]:
            self.retention_proj = nn.Linear(width, n_head_kv)
            nn.init.zeros_(self.retention_proj.weight)
            nn.init.constant_(self.retention_proj.bias, math.log(math.expm1(constants.get("decay_init", 1.0))))

    @staticmethod
    def defaults(mid_dim: int = 128, decay: bool = False) -> dict[str, Any]:
        return {
            "trunk": "mlp" if mid_dim else "linear", "mid_dim": mid_dim, "norm_eps": 1e-5, "pos_slope": 1e-6,
            "age_scale": 16384.0, "decay": decay,
        }  # fmt: skip

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden [..., T, d] -> magnitude and log retention rate, [..., H, T] float32; no rate without decay."""
        x = self.in_norm(hidden.to(self.in_norm.weight.dtype))
        if self.constants["mid_dim"]:
            x = F.gelu(self.mid_norm(self.input_proj(x)))
        magnitude = self.magnitude_proj(x).float().mT
        if not self.constants["decay"]:
            return magnitude, None
        return magnitude, -F.softplus(self.retention_proj(x).float()).mT

    def intercept(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score intercept e and rate, [..., H, T]: the score from position i is `e + rate * i / age_scale`."""
        magnitude, rate = self(hidden)
        j = positions.float()
        e = magnitude + self.constants["pos_slope"] * j
        return (e, None) if rate is None else (e - rate * j / self.constants["age_scale"], rate)

    def ranks(self, hidden: Tensor, positions: Tensor, newest: int) -> Tensor:
        """Ranks [..., H, T] of the entries at `positions` when the newest token is at `newest`."""
        return self.ranks_and_rate(hidden, positions, newest)[0]

    def ranks_and_rate(self, hidden: Tensor, positions: Tensor, newest: int) -> tuple[Tensor, Tensor | None]:
        """Ranks, and how they change in `age_scale` tokens; both [..., H, T]."""
        e, rate = self.intercept(hidden, positions)
        return (e, None) if rate is None else (e + rate * (newest / self.constants["age_scale"]), rate)


class KVzap(nn.Module):
    """KVzap (arXiv 2601.07891), kind `kvzap`: a linear map, or one hidden layer with exact GELU."""

    kind = "kvzap"

    def __init__(self, n_embd: int, n_head_kv: int, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.constants = dict(constants)
        mid = constants["mid_dim"]
        if mid:
            self.in_proj = nn.Linear(n_embd, mid)
        self.out_proj = nn.Linear(mid or n_embd, n_head_kv)
        self.gate_scale = nn.Parameter(torch.ones(1))

    @staticmethod
    def defaults(mid_dim: int = 128, decay: bool = False) -> dict[str, Any]:
        return {"mid_dim": mid_dim}

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        x = hidden.to(self.out_proj.weight.dtype)
        if self.constants["mid_dim"]:
            x = F.gelu(self.in_proj(x))
        return self.out_proj(x).float().mT, None

    def intercept(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        return self(hidden)

    def ranks(self, hidden: Tensor, positions: Tensor, newest: int) -> Tensor:
        return self(hidden)[0]

    def ranks_and_rate(self, hidden: Tensor, positions: Tensor, newest: int) -> tuple[Tensor, None]:
        return self(hidden)


def with_decay(modules: nn.ModuleList) -> nn.ModuleList:
    """The same indexers, with ranks that fall with age; at first slowly, and those of all entries alike.

    Raises:
        TrainingError: they are of a kind whose ranks have no age.
    """
    made = []
    for module in modules:
        if not isinstance(module, Retention):
            raise TrainingError(f"--decay: ranks of kind {module.kind} do not fall with age, those of kind {Retention.kind} can")
        if not module.constants["decay"]:
            old = module
            n_head_kv, n_embd = len(old.magnitude_proj.weight), len(old.in_norm.weight)
            module = Retention(n_embd, n_head_kv, {**old.constants, "decay": True, "decay_init": 0.5})
            module.load_state_dict({**module.state_dict(), **old.state_dict()})
        made.append(module)
    return nn.ModuleList(made)


Scorer = Retention | KVzap | Pairwise
SCORERS: dict[str, type[Scorer]] = {module.kind: module for module in (Retention, KVzap, Pairwise)}
