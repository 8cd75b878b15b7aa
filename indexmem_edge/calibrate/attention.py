"""Attention over what a bounded cache keeps, with and without a memory of what left, against attention over everything.

Plain NumPy, for one layer at a time. Of each measured row and query head only a few numbers are kept, with which the
error at any gate can be computed: if o_S is the output of the exact entries and d the direction in which the memory
moves it,

    |o_S + w d - o_full|^2 = base + 2 w cross + w^2 square       w: how far, by kind of memory and gate

The output of a centroid memory is one softmax over exact entries and slots, whose mass is multiplied by the gate g:
then d leads from o_S to the output of the slots alone, and w = g M/(1 + g M), where M is the mass of the slots in units
of that of the exact entries. A residual memory is added: d is what it reads, and w = g.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Kept = Sequence[Sequence[Array]]  # after a ubatch: [layer][KV head], ascending positions


@dataclass(frozen=True)
class Softmax:
    """Attention over some entries: for each row the logarithm of their mass, and their mean value."""

    mass: Array
    output: Array


def attend(logits: Array, values: Array, sinks: Optional[Array] = None) -> Softmax:
    """[row][entry] and [entry][n]; a row that sees nothing has no mass, and output 0.

    Args:
        sinks: for each row the logit of one more entry, whose value is 0.
    """
    if sinks is not None:
        logits = np.concatenate([logits, sinks[:, None]], axis=1)
        values = np.concatenate([values, np.zeros_like(values[:1])])
    if logits.shape[1] == 0:
        return Softmax(np.full(len(logits), -np.inf, np.float32), np.zeros((len(logits), values.shape[1]), np.float32))
    top = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(axis=1, keepdims=True)
    return Softmax((top + np.log(total))[:, 0], weights @ values / total)


@dataclass(frozen=True)
class Logits:
    """How a model turns queries and keys into logits."""

    scale: float
    softcap: float = 0.0

    def __call__(self, queries: Array, keys: Array) -> Array:
        logits = np.float32(self.scale) * (queries @ keys.T)
        return np.float32(self.softcap) * np.tanh(logits / np.float32(self.softcap)) if self.softcap else logits


class Memory(Protocol):
    """The memory of one KV head."""

    def absorb(self, keys: Array, values: Array) -> None:
        """Takes up entries that leave together; there is at least one."""

    def read(self, queries: Array, logits: Logits, exact: Softmax) -> tuple[Array, Array]:
        """For each query the direction d, and the logarithm of M, or 0 for a memory without mass."""


class CentroidMemory:
    """Means of keys and values with counts, written by the rule of the op: what leaves with one ubatch fills empty
    slots first; all others go to the slot whose key was nearest before any of them was added.
    """

    def __init__(self, n_slots: int, n_k: int, n_v: int) -> None:
        self.means = np.zeros((n_slots, n_k + n_v))
        self.counts = np.zeros(n_slots)
        self._n_k = n_k

    def absorb(self, keys: Array, values: Array) -> None:
        entries = np.concatenate([keys, values], axis=1).astype(np.float64)
        empty = np.flatnonzero(self.counts == 0)[: len(entries)]
        self.means[empty], self.counts[empty] = entries[: len(empty)], 1
        entries = entries[len(empty) :]
        centres = self.means[:, : self._n_k]
        nearest = (np.square(centres).sum(axis=1) - 2 * entries[:, : self._n_k] @ centres.T).argmin(axis=1)
        sums = self.means * self.counts[:, None]
        np.add.at(sums, nearest, entries)
        np.add.at(self.counts, nearest, 1)
        used = self.counts > 0
        self.means[used] = sums[used] / self.counts[used, None]

    def read(self, queries: Array, logits: Logits, exact: Softmax) -> tuple[Array, Array]:
        used = self.counts > 0
        means = self.means[used].astype(np.float16).astype(np.float32)  # as rows of the cache
        counts = self.counts[used].astype(np.float32)
        slots = attend(logits(queries, means[:, : self._n_k]) + np.log(counts), means[:, self._n_k :])
        return slots.output - exact.output, slots.mass - exact.mass


class ResidualMemory:
    """A matrix and a normaliser over features of keys, as a trained layer writes and reads them.

    It reads queries as they are before any scale; those that it gets have `query_scale`.
    """

    def __init__(self, phi: Array, n_v: int, rate: float, decay: float, eps: float, query_scale: float = 1.0) -> None:
        self._phi, self._rate, self._decay, self._eps = phi.T, rate, decay, eps
        self._query_scale = query_scale
        self.matrix = np.zeros((phi.shape[0], n_v))
        self.normaliser = np.zeros(phi.shape[0])

    def absorb(self, keys: Array, values: Array) -> None:
        features = (keys @ self._phi).astype(np.float64)
        self.matrix = self._decay * self.matrix + self._rate * (features.T @ values)
        self.normaliser = self._decay * self.normaliser + self._rate * np.square(features).sum(axis=0)

    def read(self, queries: Array, logits: Logits, exact: Softmax) -> tuple[Array, Array]:
        features = (queries @ self._phi).astype(np.float64) / self._query_scale
        below = np.maximum(np.square(features) @ self.normaliser, self._eps)
        return features @ self.matrix / below[:, None], np.zeros(len(queries))


@dataclass(frozen=True)
class Errors:
    """Squared lengths, one for each measured row and query head of a layer; see the top of the page."""

    full: Array  # |o_full|^2
    without: Array  # |o - o_full|^2 of the cache without memory
    base: Array
    cross: Array
    square: Array
    log_mass: Array  # of M

    @classmethod
    def of(cls, full: Array, without: Array, exact: Array, direction: Array, log_mass: Array) -> Errors:
        """From outputs [row][n]."""
        full, exact, direction = (a.astype(np.float64) for a in (full, exact, direction))
        off = exact - full
        lost = without - full
        pairs = ((full, full), (lost, lost), (off, off), (off, direction), (direction, direction))
        products: list[Array] = [np.einsum("rd,rd->r", a, b) for a, b in pairs]
        return cls(*products, log_mass.astype(np.float64))  # type: ignore[call-arg]

    @classmethod
    def joined(cls, parts: Sequence[Errors]) -> Errors:
        """Of several heads or texts."""
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))

    def at(self, weight: Array) -> Array:
        """Squared error of each row with its weight w."""
        error: Array = np.maximum(self.base + 2 * weight * self.cross + np.square(weight) * self.square, 0)
        return error


@dataclass(frozen=True)
class Passage:
    """A text as a bounded cache saw it: its ubatches, and what was kept after each but the last, by budget."""

    ubatches: Sequence[tuple[int, int]]
    rows: Sequence[Array]  # of each ubatch, the positions measured; none where nothing has left yet
    kept: Mapping[int, Sequence[Kept]]


def layer_errors(
    passage: Passage,
    layer: int,
    operands: tuple[Sequence[Array], Array, Array],
    logits: Logits,
    new_memory: Callable[[], Memory],
    budget: int,
    exact_budget: int,
    sinks: Optional[Array] = None,
) -> Errors:
    """Errors of one layer on one passage.

    Args:
        operands: queries of the ubatches that have rows, [head][row][n], then keys and values, [KV head][position][n].
        budget: of the cache without memory.
        exact_budget: of the entries that the cache with memory keeps; the memory holds what leaves that one.
        sinks: for each head a logit that is always there, whose value is 0.
    """
    queries, keys, values = operands
    group = len(queries[0]) // len(keys)
    parts = []
    for h, (k, v) in enumerate(zip(keys.astype(np.float32), values.astype(np.float32))):
        memory = new_memory()
        asked = iter(queries)
        before = {b: np.empty(0, np.intp) for b in (budget, exact_budget)}
        for u, (start, end) in enumerate(passage.ubatches):
            own = np.arange(start, end)
            seen = {b: np.concatenate([kept, own]) for b, kept in before.items()}
            if len(passage.rows[u]):
                q = next(asked)[h * group : (h + 1) * group].reshape(-1, k.shape[1])
                scores = logits(q, k[:end])
                scores[:, start:][own > np.tile(passage.rows[u], group)[:, None]] = -np.inf
                sunk = None if sinks is None else np.repeat(sinks[h * group : (h + 1) * group], len(passage.rows[u]))
                full = attend(scores, v[:end], sunk)
                without, exact = (attend(scores[:, seen[b]], v[seen[b]], sunk) for b in (budget, exact_budget))
                direction, log_mass = memory.read(q, logits, exact)
                parts.append(Errors.of(full.output, without.output, exact.output, direction, log_mass))
            if u + 1 < len(passage.ubatches):
                before = {b: passage.kept[b][u][layer][h] for b in before}
                gone = np.setdiff1d(seen[exact_budget], before[exact_budget], assume_unique=True)
                if len(gone):
                    memory.absorb(k[gone], v[gone])
    return Errors.joined(parts)
