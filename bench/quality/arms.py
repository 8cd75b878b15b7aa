"""What a quality run compares: policies, shares of the full cache, latent memories and types of the entries, each with the
sidecar that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from indexmem_edge.cli.inspection import examine
from indexmem_edge.files.modelfile import check_sidecar_file, fingerprint
from indexmem_edge.options import LEAST_WINDOW
from indexmem_edge.runtime.choice import DEFAULT_MEMORY_SLOTS, INDEXER_POLICY, MEMORY_OFF, SLOTTED_MEMORY

from ..runner import F16, UNBOUNDED, BenchError, Setup

NONE = "none"  # the kind of what a sidecar does not hold


class Arm(NamedTuple):
    policy: str  # as rows name it: an indexer can have a name of its own
    ratio: float  # of what the full cache takes for the context; 1 for that cache, whatever the type of its entries
    memory: str = MEMORY_OFF  # as it was asked for: a kind, or kind:slots
    cache_type: str = F16

    @property
    def kind(self) -> str:
        """The policy, with the type of the entries where that is another than usual."""
        return self.policy + ("" if self.cache_type == F16 else f" {self.cache_type}")

    @property
    def name(self) -> str:
        return self.kind + ("" if self.memory == MEMORY_OFF else f" with memory {self.memory}")


FULL_ARM = Arm(UNBOUNDED, 1.0)  # the reference


@dataclass(frozen=True)
class Sidecar:
    path: Path
    indexer: str  # kinds
    memory: str
    memory_slots: int  # 0: the file names no number
    random: bool  # its weights were drawn, not trained
    identity: str

    @classmethod
    def open(cls, path: Path) -> Sidecar:
        facts = examine(check_sidecar_file(path))
        if facts["what"] != "sidecar":
            raise BenchError(f"{path.name} is not a sidecar")
        hashes = facts["provenance"].get("source_sha256", [])
        return cls(
            path,
            facts["indexer"]["kind"] or NONE,
            facts["memory"]["kind"] or NONE,
            facts["memory"].get("slot_count") or 0,
            any(set(text) == {"0"} for text in hashes),  # what synthetic.py writes: there was no file to hash
            fingerprint(path),
        )

    def __str__(self) -> str:
        return self.path.name + (" (random weights)" if self.random else "")


@dataclass(frozen=True)
class Sidecars:
    """A sidecar with an indexer is a policy. One with a memory alone goes with the other policies when that is on."""

    indexers: Mapping[str, Sidecar] = field(default_factory=dict)  # by the name of the policy
    memory: Sidecar | None = None

    @classmethod
    def open(cls, paths: Sequence[Path]) -> Sidecars:
        found = [Sidecar.open(path) for path in paths]
        ranking, others = [s for s in found if s.indexer != NONE], [s for s in found if s.indexer == NONE]
        if len(others) > 1:
            raise BenchError(f"{others[0].path.name} and {others[1].path.name} hold a memory only: name one of them")
        names = [INDEXER_POLICY] if len(ranking) == 1 else [f"{s.indexer} {_stem(s.path)}" for s in ranking]
        if len(set(names)) < len(names):
            raise BenchError(f"sidecars cannot be told apart in the report: {', '.join(names)}; rename a file")
        return cls(dict(zip(names, ranking)), others[0] if others else None)

    def of(self, policy: str, memory: str) -> Sidecar | None:
        """The sidecar that is used then."""
        if policy in self.indexers:
            return self.indexers[policy]
        return self.memory if self.memory and self.memory.memory == memory.partition(":")[0] else None

    def lent(self) -> Sidecars:
        """The same, the memory of a sidecar with an indexer lent to the other policies: for what each part does alone.

        Raises:
            BenchError: no sidecar has a memory, or several have one.
        """
        having = [s for s in (*self.indexers.values(), self.memory) if s and s.memory != NONE]
        if len(having) != 1:
            found = ", ".join(s.path.name for s in having) or "none"
            raise BenchError(f"expected one sidecar with a memory, found {found}: name it with --indexmem FILE")
        return replace(self, memory=having[0])

    def describe(self) -> dict[str, str]:
        """For the report: what the policies stand for."""
        memory = {f"memory {self.memory.memory}": str(self.memory)} if self.memory else {}
        return {name: str(sidecar) for name, sidecar in self.indexers.items()} | memory


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gguf").removesuffix(".indexmem")


def check_memories(wanted: Sequence[str], known: Mapping[str, str]) -> tuple[str, ...]:
    """Memories as they were asked for.

    Raises:
        BenchError: one of them is unknown, or has a number of slots that it cannot have.
    """
    for text in wanted:
        kind, colon, slots = text.partition(":")
        if kind != MEMORY_OFF and kind not in known:
            raise BenchError(f"unknown memory {kind!r}: choose from {', '.join([MEMORY_OFF, *sorted(known)])}")
        if colon and (kind != SLOTTED_MEMORY or not slots.isdecimal() or int(slots) < 1):
            raise BenchError(f"memory {text!r}: only {SLOTTED_MEMORY} takes slots, as in {SLOTTED_MEMORY}:16")
    if not wanted:
        raise BenchError(f"no memory was named: {MEMORY_OFF} stands for none")
    return tuple(dict.fromkeys(wanted))


def arms(
    policies: Sequence[str],
    ratios: Sequence[float],
    memories: Sequence[str],
    sidecars: Sidecars,
    cache_types: Sequence[str] = (F16,),
) -> list[Arm]:
    """All that can be: a memory that needs trained weights goes with sidecars that have them.

    Those that differ in memory alone are neighbours.
    """

    def possible(policy: str, memory: str) -> bool:
        sidecar = sidecars.of(policy, memory)
        return memory.partition(":")[0] in (MEMORY_OFF, SLOTTED_MEMORY, sidecar.memory if sidecar else None)

    for memory in memories if policies else ():
        if not any(possible(policy, memory) for policy in policies):
            raise BenchError(f"the memory {memory!r} needs trained weights: name a sidecar with them (--indexmem FILE)")
    return [
        Arm(p, ratio, m, cache_type)
        for ratio in ratios
        for cache_type in cache_types
        for p in policies
        for m in memories
        if possible(p, m)
    ]


def setup_for(base: Setup, arm: Arm, sidecars: Sidecars, context_tokens: int, more_tokens: int) -> Setup:
    """Budget = share of the context's tokens. What makes a budget of bytes is in byte_budget.py."""
    if arm.policy == UNBOUNDED:
        size = context_tokens + more_tokens
        return replace(base, policy=UNBOUNDED, budget=0, n_ctx=size, sidecar=None, cache_type=arm.cache_type)
    return bounded_setup(base, arm, sidecars, round(arm.ratio * context_tokens))


def bounded_setup(base: Setup, arm: Arm, sidecars: Sidecars, budget: int) -> Setup:
    """Of a small budget, window and memory take a quarter each; a window that is left to the cache does so of any."""
    quarter = budget // 4
    left = 0 if quarter > LEAST_WINDOW else quarter  # 0: to the cache, which takes no less than this
    sidecar = sidecars.of(arm.policy, arm.memory)
    return replace(
        base,
        policy=INDEXER_POLICY if arm.policy in sidecars.indexers else arm.policy,
        budget=budget,
        window=min(base.window, quarter) if base.window else left,
        sidecar=str(sidecar.path) if sidecar else None,
        cache_type=arm.cache_type,
        **memory_for(arm.memory, budget, sidecar),
    )


def memory_for(memory: str, budget: int, sidecar: Sidecar | None) -> dict[str, Any]:
    """Kind and slots: as many as asked for, but at most a quarter of the budget in whole eights."""
    kind, _, asked = memory.partition(":")
    if kind != SLOTTED_MEMORY:
        return {"memory": kind, "memory_slots": 0}
    of_sidecar = sidecar.memory_slots if sidecar and sidecar.memory == kind else 0
    most = int(asked or 0) or of_sidecar or DEFAULT_MEMORY_SLOTS
    return {"memory": kind, "memory_slots": min(most, max(budget // 32 * 8, 8))}
