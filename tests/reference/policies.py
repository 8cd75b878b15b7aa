"""The bounded cache in slow, plain NumPy: which positions every KV head keeps, and the logits that follow.

After each ubatch of T tokens a head that holds more than `budget` entries evicts its lowest-ranked candidates. See
`RANKS` for the ranks, and `indexers.py` for those of the policy `indexer`. The decoder below never forgets a key;
evicted positions are merely made invisible. With a memory (`memories.py`) what leaves a head is written to it, and read
from the next ubatch on; its slots, if it has any, are paid from the budget. With a span (`spans.py`) rotary positions are
renewed before a ubatch that would go past it.

Rounding can swap two entries whose ranks are nearly equal, after which nothing downstream is comparable. Every
eviction therefore reports its `gap`, and `adopt` continues from the choice that another implementation made.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np
from numpy.typing import DTypeLike

from reference.cache_types import CacheType
from reference.decoder import Decoder, causal, softmax
from reference.indexers import Indexer
from reference.memories import HeadMemory, Memory
from reference.rotary import Rotary
from reference.spans import end_of_rebased, rebased
from tiny.models import TinyConfig

MASK64 = (1 << 64) - 1


class Full(Exception):
    """The policy `full` has used up its budget."""


class Eviction(NamedTuple):
    ubatch: int
    layer: int
    head: int
    positions: tuple[int, ...]  # evicted, ascending
    gap: float  # between the worst kept and the best evicted candidate, relative; inf if rounding cannot matter


@dataclass(frozen=True)
class View:
    """What a policy sees of one KV head after a ubatch, before the eviction. n entries, G query heads."""

    layer: int
    head: int
    positions: np.ndarray  # [n], ascending
    keys: np.ndarray  # [n, D] as cached
    queries: np.ndarray  # [N, G, D] of all tokens so far
    scale: float
    seed: int
    rotary: Optional[Rotary] = None  # of the layer


def rank_streaming(v: View) -> np.ndarray:
    return v.positions.astype(float)


def hash_rank(seed: int, layer: int, head: int, position: int) -> float:
    """24 bits of a SplitMix64 hash, in [0, 1)."""
    x = (seed + 0x9E3779B97F4A7C15 * (1 + position + (head + (layer << 12) << 32))) & MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return ((x ^ (x >> 31)) >> 40) / 2**24


def rank_random(v: View) -> np.ndarray:
    return np.array([hash_rank(v.seed, v.layer, v.head, int(p)) for p in v.positions])


def rank_knorm(v: View) -> np.ndarray:
    """Keys of small norm draw attention."""
    return -np.linalg.norm(v.keys, axis=-1)


def rank_keydiff(v: View) -> np.ndarray:
    """Keys that point away from the mean direction stay."""
    unit = v.keys / np.linalg.norm(v.keys, axis=-1, keepdims=True)
    mean = unit.mean(axis=0)
    return -(unit @ mean) / np.linalg.norm(mean)


def rank_tova(v: View) -> np.ndarray:
    """Attention of the last token."""
    scores = v.scale * v.queries[-1] @ v.keys.T  # [G, n]
    return softmax(scores, np.ones(scores.shape, bool)).mean(axis=0)


def rank_snapkv(v: View, n_queries: int = 32, n_pool: int = 7) -> np.ndarray:
    """Attention of the last queries, averaged over neighbouring entries."""
    n_tokens, n = len(v.queries), len(v.positions)
    attention = np.zeros(n)
    rows = range(max(0, n_tokens - n_queries), n_tokens)
    for q in rows:
        scores = v.scale * v.queries[q] @ v.keys.T  # [G, n]
        attention += softmax(scores, v.positions <= q).mean(axis=0) / len(rows)
    half = n_pool // 2
    return np.array([attention[max(0, i - half) : i + half + 1].mean() for i in range(n)])


def rank_expected(v: View, n_queries: int = 32, n_ahead: int = 512) -> np.ndarray:
    """The logit that queries like the last ones give on average, from the next positions."""
    queries = v.queries[-n_queries:]
    if v.rotary:
        queries = queries @ v.rotary.mean_ahead(n_ahead, queries.shape[-1])
    return v.scale * (v.keys @ queries.mean(axis=(0, 1)))


RANKS: dict[str, Callable[[View], np.ndarray]] = {
    "streaming": rank_streaming,
    "random": rank_random,
    "knorm": rank_knorm,
    "keydiff": rank_keydiff,
    "tova": rank_tova,
    "snapkv": rank_snapkv,
    "expected": rank_expected,
}
POLICIES = ("full", *RANKS)
EXACT = {"streaming", "random"}  # ranks that no rounding touches


class RememberingDecoder(Decoder):
    """Heads attend through their memories, where they have one."""

    memories: list[list[Optional[HeadMemory]]]  # [L][H]

    def attend(self, il: int, h: int, q: np.ndarray, visible: np.ndarray) -> np.ndarray:
        memory = self.memories[il][h]
        if memory is None:
            return super().attend(il, h, q, visible)
        return memory.attend(q, self.keys[il][:, h], self.values[il][:, h], visible, self.config.scale)


class BoundedReference:
    """One sequence with a bounded cache. `kept[il][h]` are the positions held by a KV head, ascending."""

    def __init__(
        self,
        config: TinyConfig,
        *,
        budget: int,
        sinks: int = 4,
        window: int = 128,
        pin: int = 0,
        evict_step: int = 0,
        policy: str = "streaming",
        seed: int = 0,
        budget_ratio: float = 0.0,
        indexer: Indexer | None = None,
        memory: Memory | None = None,
        span: int = 0,
        dtype: DTypeLike = np.float64,
        cache_dtype: CacheType = None,
        n_ctx: int = 0,
        budgets: Sequence[Sequence[int]] = (),  # of each KV head of each layer, where they differ
    ) -> None:
        if policy not in POLICIES and (policy != "indexer" or indexer is None):
            raise ValueError(f"no policy {policy!r}, or no indexer for it")
        self.n_latent = memory.n_slots if memory else 0
        if budget < max(sinks, pin) + window + 1 + self.n_latent:
            raise ValueError("no room beyond what is protected")
        self.config, self.policy, self.seed = config, policy, seed
        self.budget, self.sinks, self.window, self.pin = budget, sinks, window, pin
        self.budgets = [list(layer) for layer in budgets]
        self.evict_step, self.budget_ratio, self.indexer = evict_step, budget_ratio, indexer
        self.memory, self.span = memory, span
        self.decoder = RememberingDecoder(config, dtype, cache_dtype, n_ctx)
        self._forget()
        self.n_ubatches = 0
        self.n_before = 0  # tokens seen at the last eviction or rebase
        self.gone, self.moved = math.inf, 0  # all are kept of [0, gone) and of [moved, n_seen), whatever is protected now
        self.n_rebases = 0
        self.evictions: list[Eviction] = []
        self.slots: list[list[list[int]]] = [[[] for _ in range(config.n_head_kv)] for _ in range(config.n_layer)]
        self._ranks: dict[tuple[int, int], dict[int, float]] = {}  # of the candidates of the last ubatch
        self._spread: dict[tuple[int, int], float] = {}  # deviation of all ranks of the head, likewise
        self._before: dict[tuple[int, int], tuple[list[int], Optional[HeadMemory]]] = {}  # slots and memory, likewise

    @property
    def protected(self) -> int:
        """Number of first positions that are to stay."""
        return max(self.sinks, self.pin)

    def first(self, il: int, h: int) -> int:
        """How many of them stay in a KV head: all, or seven eighths of what it has room for."""
        budget = self.budgets[il][h] if self.budgets else self.budget
        room = budget - self.window - 1 - self.n_latent
        return self.protected if self.protected <= room else max(self.sinks, room - room // 8)

    @property
    def first_of_all(self) -> int:
        """How many of them stay in all heads."""
        return min(self.first(il, h) for il, h in self.heads())

    @property
    def kept(self) -> list[list[list[int]]]:
        return [[sorted(head) for head in layer] for layer in self.slots]

    @property
    def budget_now(self) -> int:
        """The budget at this length."""
        if not self.budget_ratio:
            return self.budget
        share = math.ceil(self.budget_ratio * self.n_seen)
        return min(self.budget, max(share, self.protected + self.window + 1 + self.n_latent))

    def capacity(self, il: int, h: int) -> int:
        """Entries that may stay in a KV head at this length: the budget without the slots of a memory."""
        if not self.budgets:
            return self.budget_now - self.n_latent
        least, least_here = (n + self.window + 1 + self.n_latent for n in (self.protected, self.first(il, h)))
        mine = self.budgets[il][h]
        if self.budget_ratio and self.budget_now < self.budget:  # what is not protected is shared as ever
            mine = min(mine, least_here + (self.budget_now - least) * (mine - least_here) // (self.budget - least))
        return mine - self.n_latent

    @property
    def step(self) -> int:
        """Entries evicted at once during decode, in all heads together."""
        room = min(self.capacity(il, h) - self.first(il, h) for il, h in self.heads()) - self.window
        of_mean = self.budget_now - self.n_latent - self.protected - self.window
        return min(self.evict_step or max(min(max(32, of_mean // 128), of_mean // 8, room // 2), 1), room)

    @property
    def n_seen(self) -> int:
        return self.decoder.n_tokens

    @property
    def next_position(self) -> int:
        """Rotary position of the next token, if there is no rebase before it."""
        return self.n_seen - self.decoder.shift

    @property
    def rotary(self) -> list[list[np.ndarray]]:
        """Rotary positions of what is kept, in order of index."""
        return [[self.decoder.rotary[il][head, h] for h, head in enumerate(layer)] for il, layer in enumerate(self.kept)]

    def heads(self) -> Iterator[tuple[int, int]]:
        return ((il, h) for il in range(self.config.n_layer) for h in range(self.config.n_head_kv))

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Evaluates one ubatch, then evicts; returns logits [T, V]."""
        n_past, n_new = self.n_seen, len(tokens)
        if self.policy == "full" and n_past + n_new > self.budget - self.n_latent:
            raise Full
        self.make_room(n_new)
        visible = [[causal(n_past, n_new) for _ in layer] for layer in self.slots]
        for il, h in self.heads():
            evicted = np.setdiff1d(np.arange(n_past), self.slots[il][h])
            visible[il][h][:, evicted] = False
        logits = self.decoder.append(tokens, visible)

        self._ranks.clear()
        for il, h in self.heads():
            self.slots[il][h] += range(n_past, n_past + n_new)
        if any(len(self.slots[il][h]) > self.capacity(il, h) for il, h in self.heads()):
            for il, h in self.heads():
                self._evict(il, h)
        self.n_ubatches += 1
        return logits

    def refit(self, **options: object) -> None:
        """Goes on with other options of the constructor, evicting what is too much now, as in an ubatch of no tokens."""
        for name, value in options.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        if "memory" in options:
            self.n_latent = self.memory.n_slots if self.memory else 0
            self._forget()
        self._ranks.clear()
        budgets = self.budgets or [[self.budget] * self.config.n_head_kv] * self.config.n_layer
        too_many = any(len(self.slots[il][h]) > budgets[il][h] - self.n_latent for il, h in self.heads())
        for il, h in self.heads() if too_many else ():
            self._evict(il, h)
        self.n_ubatches += 1

    def make_room(self, n_new: int) -> bool:
        """The rebase before a ubatch of n_new tokens, if it wants one."""
        if not self.span or self.next_position + n_new <= self.span:
            return False
        end = end_of_rebased(max(len(self.slots[il][h]) for il, h in self.heads()), n_new, self.span)
        by = end - self.next_position
        for il, h in self.heads():
            index = np.array(self.kept[il][h], int)
            first, last = int(min(self.first(il, h), self.gone)), min(self.window, self.n_seen - self.moved)
            at = rebased(index, self.decoder.rotary[il][index, h], first, last, end)
            self.decoder.renew(il, h, index, at)
            memory, rotary = self.decoder.memories[il][h], self.decoder.rotaries[il]
            if memory and rotary:
                memory.rotate(rotary, by)
        self.decoder.move_end(end)
        self.gone = min(self.gone, self.first_of_all)
        self.n_before = self.n_seen
        self.n_rebases += 1
        return True

    def feed_all(self, tokens: Sequence[int], n_ubatch: int) -> np.ndarray:
        """Feeds ubatches of up to n_ubatch tokens; returns logits [T, V]."""
        return np.concatenate([self.feed(tokens[i : i + n_ubatch]) for i in range(0, len(tokens), n_ubatch)])

    def truncate(self, n: int) -> bool:
        """Takes back all but the first n tokens; not beyond the last eviction or rebase, which is for good."""
        if n > 0 and n < self.n_before:
            return False
        self.decoder.truncate(n)
        self.slots = [[[p for p in head if p < n] for head in layer] for layer in self.slots]
        self.n_before = min(self.n_before, n)
        if n == 0:
            self._forget()
            self.n_rebases = 0
            self.gone, self.moved = math.inf, 0
        return True

    def _forget(self) -> None:
        """Empty memories."""
        c, dtype = self.config, self.decoder.cache_dtype
        self.decoder.memories = [
            [self.memory.head(il, c.head_dim, dtype, c.value_dim) if self.memory else None for _ in range(c.n_head_kv)]
            for il in range(c.n_layer)
        ]

    def _evict(self, il: int, h: int) -> None:
        kept, last = sorted(self.slots[il][h]), self.n_seen - 1
        over = len(kept) - self.capacity(il, h)
        n_evict = max(over, self.step) if over > 0 else max(over - 1 + self.step, 0)  # the others make as much room
        n_evict = min(n_evict, len(kept) - self.first(il, h) - self.window)
        if n_evict <= 0:
            return
        ranks = self._rank(il, h)
        candidates = {
            p: -np.inf if np.isnan(r) else float(r)
            for p, r in zip(kept, ranks)
            if self.first(il, h) <= p <= last - self.window
        }
        order = sorted(candidates, key=lambda p: (candidates[p], -p))  # of equals, the later one leaves
        gone = set(order[:n_evict])
        cut = [candidates[p] for p in order[n_evict - 1 : n_evict + 1]]
        self._spread[il, h] = float(np.nanstd(ranks))
        gap = self._distance(cut[1], cut[0], self._spread[il, h]) if len(cut) == 2 else np.inf
        self._ranks[il, h] = candidates
        self._before[il, h] = self.slots[il][h], copy.deepcopy(self.decoder.memories[il][h])
        self._leave(il, h, gone)
        self.n_before = self.n_seen
        self.gone = min(self.gone, self.first_of_all)
        self.moved = max(self.moved, self.n_seen - self.window)
        self.evictions.append(Eviction(self.n_ubatches, il, h, tuple(sorted(gone)), gap))

    def _leave(self, il: int, h: int, gone: set[int]) -> None:
        """Out of the slots, into the memory in their order; then survivors at the end of the slots fill the holes."""
        slots = self.slots[il][h]
        leaving = [p for p in slots if p in gone]
        memory = self.decoder.memories[il][h]
        if memory:
            memory.write(self.decoder.keys[il][leaving, h], self.decoder.values[il][leaving, h])
        head, tail = slots[: len(slots) - len(gone)], slots[len(slots) - len(gone) :]
        moving = iter([p for p in tail if p not in gone])
        self.slots[il][h] = [next(moving) if p in gone else p for p in head]

    def _rank(self, il: int, h: int) -> np.ndarray:
        """Ranks of the entries of one head, by position."""
        kept, c = sorted(self.slots[il][h]), self.config
        if self.policy == "indexer":
            assert self.indexer is not None
            hidden = self.decoder.hidden[il]
            state = self.indexer.state(il, hidden[kept])  # [n, H or 1, c]
            queries = self.indexer.queries(il, hidden)
            return self.indexer.rank(state[:, h % state.shape[1]], np.array(kept), self.n_seen - 1, queries)
        return RANKS[self.policy](
            View(
                layer=il,
                head=h,
                positions=np.array(kept),
                keys=self.decoder.keys[il][kept, h],
                queries=self.decoder.queries[il][:, h * c.group : (h + 1) * c.group],
                scale=c.scale,
                seed=self.seed,
                rotary=self.decoder.rotaries[il],
            )
        )

    def _distance(self, high: float, low: float, spread: float) -> float:
        """high - low in units of the ranks' magnitude: 1 for cosines, the deviation of ranks that may be of either sign,
        otherwise the larger of the two."""
        if self.policy in EXACT or (low == -np.inf and high != low):
            return np.inf
        unit = {"keydiff": 1.0, "indexer": spread, "expected": spread}.get(self.policy, max(abs(high), abs(low)))
        return (high - low) / unit if high != low else 0.0

    def min_gap(self, ubatch: int | None = None) -> float:
        """Smallest gap of all evictions, or of those after one ubatch."""
        return min((e.gap for e in self.evictions if ubatch in (None, e.ubatch)), default=np.inf)

    def first_tie(self, tolerance: float) -> int | None:
        """First ubatch with a cut that an error of `tolerance` could change; results up to its logits are sure."""
        return next((e.ubatch for e in self.evictions if e.gap < tolerance), None)

    def adopt(self, kept: Sequence[Sequence[Sequence[int]]]) -> float:
        """Replaces the outcome of the last ubatch by another implementation's positions [L][H] and judges it.

        Returns how far the worst choice departs from the rule: the largest relative amount by which an evicted
        candidate outranks a kept one. 0 means that all choices agree; rounding explains small values; inf is wrong:
        another number of entries, an entry that was not there, a protected one missing, or an exact rank violated.
        """
        worst = 0.0
        for il, h in self.heads():
            mine, theirs = self.slots[il][h], sorted(int(p) for p in kept[il][h])
            ranks = self._ranks.get((il, h), {})
            gone, extra = set(mine) - set(theirs), set(theirs) - set(mine)
            if len(mine) != len(theirs) or len(set(theirs)) != len(theirs) or not gone | extra <= ranks.keys():
                return np.inf
            if gone:  # theirs evicted the best of `gone` and kept the worst of `extra`
                high, low = max(ranks[p] for p in gone), min(ranks[p] for p in extra)
                worst = max(worst, self._distance(high, low, self._spread[il, h]))
                self.slots[il][h], self.decoder.memories[il][h] = self._before[il, h]
                self._leave(il, h, set(self.slots[il][h]) - set(theirs))
        return worst
