"""The latent memories in plain NumPy: what a KV head remembers of the entries that left it.

Letters in shapes: T tokens, G query heads of a KV head, n entries, R slots, f features, D head size (Dk of keys and Dv
of values where they may differ), L layers.

`CentroidMemory` and `ResidualMemory` are those of one KV head of one sequence; `Centroid` and `Residual` say what all
heads of a model have. The residual one is there again in `memories_torch.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from reference.cache_types import CacheType, rounding
from reference.decoder import attend
from reference.indexers import Indexer, softplus, write_sidecar
from reference.rotary import Rotary


class CentroidMemory:
    """IndexMem++: slots that hold running means of keys and of values. A slot is read like an entry of the cache whose
    logit has log(gate * count) added."""

    def __init__(self, n_slots: int, n_embd_k: int, n_embd_v: int, gate: float = 1.0, dtype: CacheType = None) -> None:
        """dtype: what the slots are rounded to when they are read, as the cache is; the means themselves are exact."""
        self.keys, self.values = np.zeros((n_slots, n_embd_k)), np.zeros((n_slots, n_embd_v))
        self.counts = np.zeros(n_slots)
        self.gate, self.round = gate, rounding(dtype)
        self.gap = math.inf  # smallest margin, relative, by which a slot was nearer than the others

    def write(self, keys: np.ndarray, values: np.ndarray) -> None:
        """What leaves together, [n, Dk] and [n, Dv]: empty slots are filled first; each of the others goes to the slot
        that is nearest once they are, whatever the others do to it."""
        empty = np.flatnonzero(self.counts == 0)[: len(keys)]
        self.keys[empty], self.values[empty], self.counts[empty] = keys[: len(empty)], values[: len(empty)], 1
        rest = range(len(empty), len(keys))
        for i, r in [(i, self._nearest(keys[i])) for i in rest]:
            self.counts[r] += 1
            self.keys[r] += (keys[i] - self.keys[r]) / self.counts[r]
            self.values[r] += (values[i] - self.values[r]) / self.counts[r]

    def write_one_by_one(self, keys: np.ndarray, values: np.ndarray) -> None:
        """The rule of the method: each entry finds the slots as the one before left them."""
        for k, v in zip(keys, values):
            empty = np.flatnonzero(self.counts == 0)
            r = empty[0] if len(empty) else np.argmin(((self.keys - k) ** 2).sum(axis=-1))
            self.counts[r] += 1
            self.keys[r] += (k - self.keys[r]) / self.counts[r]
            self.values[r] += (v - self.values[r]) / self.counts[r]

    def rotate(self, rotary: Rotary, by: int) -> None:
        """A mean of rotated keys has no position of its own: all move as the newest entries do."""
        self.keys = rotary.rotate(self.keys, np.full(len(self.keys), by))

    def _nearest(self, key: np.ndarray) -> int:
        distances = ((self.keys - key) ** 2).sum(axis=-1)
        best = int(np.argmin(distances))  # the first of equals
        if len(distances) > 1:
            first, second = np.partition(distances, 1)[:2]
            self.gap = min(self.gap, (second - first) / second if second > 0 else 0.0)
        return best

    def slots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys [n, Dk], values [n, Dv] and biases [n] of the slots that hold something, as attention reads them."""
        held = self.counts > 0
        keys, values = (self.round(a[held]) for a in (self.keys, self.values))
        return keys, values, np.log(self.gate * self.counts[held])

    def read(self, q: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Attention to nothing but the slots: q [..., Dk] -> [..., Dv] and the log of the softmax's denominator [...];
        zeros and -inf of an empty memory."""
        keys, values, bias = self.slots()
        if not len(keys):
            return np.zeros((*q.shape[:-1], self.values.shape[1])), np.full(q.shape[:-1], -np.inf)
        logits = scale * q @ keys.T + bias
        lse = np.logaddexp.reduce(logits, axis=-1)
        return np.exp(logits - lse[..., None]) @ values, lse

    def attend(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, visible: np.ndarray, scale: float
    ) -> np.ndarray:
        """One softmax over entries and slots: as `reference.attend`."""
        slot_keys, slot_values, bias = self.slots()
        # the bias is one more component of the keys, which all queries have at 1/scale
        q = np.concatenate((q, np.full((*q.shape[:-1], 1), 1 / scale)), axis=-1)
        keys = np.block([[keys, np.zeros((len(keys), 1))], [slot_keys, bias[:, None]]])
        visible = np.concatenate((visible, np.ones((len(visible), len(bias)), bool)), axis=-1)
        return attend(q, keys, np.concatenate((values, slot_values)), visible, scale)


class ResidualMemory:
    """IndexMem: attention to what left, linear in features of keys and queries, added to the attention to the rest."""

    def __init__(self, phi: np.ndarray, n_embd_v: int, gate: float, eta: float, decay: float, eps: float) -> None:
        """phi [f, Dk]"""
        self.phi, self.gate, self.eta, self.decay, self.eps = phi.astype(np.float64), gate, eta, decay, eps
        self.matrix, self.normaliser = np.zeros((len(phi), n_embd_v)), np.zeros(len(phi))

    def write(self, keys: np.ndarray, values: np.ndarray) -> None:
        """What leaves together, [n, Dk] and [n, Dv]. The past decays once, however many they are."""
        f = keys @ self.phi.T
        self.matrix = self.decay * self.matrix + self.eta * f.T @ values
        self.normaliser = self.decay * self.normaliser + self.eta * (f * f).sum(axis=0)

    def read(self, q: np.ndarray) -> np.ndarray:
        """q [..., Dk] -> [..., Dv]"""
        f = q @ self.phi.T
        return f @ self.matrix / np.maximum(f * f @ self.normaliser, self.eps)[..., None]

    def rotate(self, rotary: Rotary, by: int) -> None:
        raise ValueError("what is linear in features of rotated keys cannot be rotated: such a memory goes without a span")

    def attend(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, visible: np.ndarray, scale: float
    ) -> np.ndarray:
        """As `reference.attend`."""
        return attend(q, keys, values, visible, scale) + self.gate * self.read(q)


HeadMemory = Union[CentroidMemory, ResidualMemory]


@dataclass(frozen=True)
class Centroid:
    """A centroid memory of every head. A layer that is not enabled neither reads nor writes, its budget is the same."""

    n_slots: int
    enabled: list[bool]  # [L]
    gate: list[float]  # [L]

    def head(self, il: int, head_dim: int, dtype: CacheType = None, value_dim: int = 0) -> Optional[CentroidMemory]:
        """An empty one for a cache of this type."""
        if not self.enabled[il]:
            return None
        return CentroidMemory(self.n_slots, head_dim, value_dim or head_dim, self.gate[il], dtype)

    def sidecar(self) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
        """Keys, and tensors of each layer."""
        keys = {"slot_count": self.n_slots, "enabled": self.enabled, "gate": self.gate}
        return _named("centroid", keys), [{} for _ in self.gate]


@dataclass(frozen=True)
class Residual:
    """A residual memory of every head, whose layers share their parameters among the heads."""

    phi: list[np.ndarray]  # [L] of [f, D]
    gate_logit: list[float]  # [L]
    eta_raw: list[float]  # [L]
    decay_logit: list[float]  # [L]
    eps: float
    enabled: list[bool]  # [L]

    n_slots = 0  # takes nothing from the budget

    def head(self, il: int, head_dim: int, dtype: CacheType = None, value_dim: int = 0) -> Optional[ResidualMemory]:
        """An empty one, which is fp32 for every type of cache."""
        if not self.enabled[il]:
            return None
        return ResidualMemory(
            self.phi[il], value_dim or head_dim, sigmoid(self.gate_logit[il]), float(softplus(self.eta_raw[il])),
            sigmoid(self.decay_logit[il]), self.eps,
        )  # fmt: skip

    def sidecar(self) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
        """Keys, and tensors of each layer."""
        keys = {
            "feature_dim": len(self.phi[0]), "head_dim": self.phi[0].shape[1], "eps": self.eps, "enabled": self.enabled,
            "gate_logit": self.gate_logit, "eta_raw": self.eta_raw, "decay_logit": self.decay_logit,
        }  # fmt: skip
        return _named("residual", keys), [{"phi_proj.weight": phi} for phi in self.phi]


Memory = Union[Centroid, Residual]


def _named(kind: str, constants: dict[str, Any]) -> dict[str, Any]:
    return {"indexmem.memory.kind": kind} | {f"indexmem.{kind}.{key}": value for key, value in constants.items()}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def random_centroid(n_layer: int, n_slots: int, seed: int = 0) -> Centroid:
    """Gates on both sides of 1."""
    gate = np.random.default_rng(seed).uniform(0.4, 1.8, n_layer).astype(np.float32)
    return Centroid(n_slots, [True] * n_layer, gate.tolist())


def random_residual(n_layer: int, head_dim: int, n_feature: int = 3, seed: int = 0) -> Residual:
    """Few features, which add much to the output; some of the reads run into the lower bound of the denominator. No
    constant is near the initial values of training: a default built in somewhere would be seen."""
    draw = np.random.default_rng([seed, 7])
    phi = [(draw.standard_normal((n_feature, head_dim)) * head_dim**-0.5).astype(np.float32) for _ in range(n_layer)]
    gate, eta, decay = draw.uniform([[0.5], [-1.5], [0.5]], [[2], [1], [2]], (3, n_layer)).astype(np.float32).tolist()
    return Residual(phi, gate, eta, decay, 20.0, [True] * n_layer)


def write_memory_sidecar(
    path: Path, memory: Memory, indexer: Optional[Indexer] = None, n_embd: int = 0, n_head_kv: int = 0, **keys: Any
) -> None:
    """A sidecar with a memory, and with an indexer or for a model of that geometry. `keys`: as for `write_sidecar`."""
    own, tensors = memory.sidecar()
    base = indexer or Indexer("none", n_embd, n_head_kv, {}, [{} for _ in tensors])
    layers = [{**a, **b} for a, b in zip(base.layers, tensors)]
    write_sidecar(path, Indexer(base.kind, base.n_embd, base.n_head_kv, base.constants, layers), keys=own | keys)
