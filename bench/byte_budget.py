"""How many entries fit into so many bytes, with everything counted that a cache keeps. The library is asked, not copied.

    full cache      tokens of the context x K and V of a token in f16: shares are shares of that
    bounded cache   entries of the budget x a slot + what does not grow with them + weights of the sidecar

A slot is K, V, a position, and the state that an indexer keeps of an entry. What does not grow with them: rows that wait to
be scored, the queries that snapkv or an indexer keeps, slots and state of a latent memory.

Slots beyond the budget hold something only while a ubatch is evaluated, as activations do: they are room to work in, told
apart (`room_bytes`) and not counted, because what has to be kept for a conversation, and grows with it, is the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .arms import Arm, Sidecars, bounded_setup, setup_for
from .runner import F16, UNBOUNDED, BenchError, Model, Setup, System

UNITS = ("bytes", "entries")
LEAST_ENTRIES = 16  # fewer exact entries are no cache to compare
HOW = {
    "bytes": "budgets are shares of the bytes that the full f16 cache takes for exactly the tokens of the context; K and V of the "
    "entries, positions, state of policy, indexer and memory and weights of the sidecar count, the working room of one "
    "ubatch (room_bytes) does not",
    "entries": "budgets are shares of the tokens of the context; bytes_share is what K and V of the entries, positions, state of "
    "policy, indexer and memory and weights of the sidecar take of the bytes of the full f16 cache for these tokens; the working "
    "room of one ubatch (room_bytes) is not in it",
}


class DoesNotFit(BenchError):
    """So few bytes that no cache can be made of them."""


@dataclass(frozen=True)
class Cost:
    """Bytes of one kind of cache."""

    slot: int  # of one more entry
    fixed: int  # whatever the budget, weights included

    def used(self, entries: int) -> int:
        return self.fixed + self.slot * entries


class Budgets:
    """What arms become for a context of so many tokens, by bytes or by entries, and what that takes."""

    def __init__(self, model: Model, base: Setup, sidecars: Sidecars, unit: str = "bytes"):
        if unit not in UNITS:
            raise BenchError(f"unknown unit of budgets {unit!r}: choose {' or '.join(UNITS)}")
        self.model, self.base, self.sidecars, self.unit = model, base, sidecars, unit
        self._costs: dict[tuple[object, ...], Cost] = {}

    def setup(self, arm: Arm, context_tokens: int, more_tokens: int) -> Setup:
        """The largest budget within the share of the arm.

        Raises:
            DoesNotFit: it would hold fewer than LEAST_ENTRIES entries.
        """
        if arm.policy == UNBOUNDED:
            return setup_for(self.base, arm, self.sidecars, context_tokens, more_tokens)
        if self.unit == "entries":
            setup = setup_for(self.base, arm, self.sidecars, context_tokens, more_tokens)
        else:
            setup = self._within(arm, int(arm.ratio * self.full_bytes(context_tokens)))
        found = setup.budget - setup.memory_slots
        if found < LEAST_ENTRIES:
            raise DoesNotFit(
                f"{arm.name} with {arm.ratio:.0%} of the {self.unit} of {context_tokens} tokens would keep {max(found, 0)} "
                f"entries, and {LEAST_ENTRIES} are needed: choose larger budgets or longer contexts"
            )
        return setup

    def _within(self, arm: Arm, limit: int) -> Setup:
        """With slots of a memory, the most that may be taken of what fits beside them."""
        setup = bounded_setup(self.base, arm, self.sidecars, 1 << 30)
        for slots in _fewer(setup.memory_slots):
            cost = self.cost(replace(setup, memory_slots=slots))
            budget = max(slots + (limit - cost.fixed) // cost.slot, 0)
            if (found := bounded_setup(self.base, arm, self.sidecars, budget)).memory_slots >= slots:
                break
        return replace(found, memory_slots=slots)

    def cost(self, setup: Setup) -> Cost:
        """By two contexts, one with 256 slots more. That is a matter of milliseconds, and every kind is measured once."""
        key = setup.policy, setup.memory, setup.memory_slots, setup.cache_type, setup.sidecar
        if key not in self._costs:
            room = 4 * (setup.sinks + setup.window + setup.memory_slots + 1)
            small, large = (self._sizes(replace(setup, budget=room + more, ubatch=32)) for more in (0, 256))
            slot = (large[1] - small[1]) // (large[0] - small[0])
            self._costs[key] = Cost(slot, small[1] - slot * small[0])
        return self._costs[key]

    def _sizes(self, setup: Setup) -> tuple[int, int]:
        """Slots and all bytes."""
        with System(self.model, setup) as system:
            return system.stats()["slots"], _allocated(system)

    def full_bytes(self, context_tokens: int) -> int:
        """K and V of the full f16 cache for exactly so many tokens."""
        return context_tokens * self.model.token_bytes(F16)

    def count(self, system: System, context_tokens: int) -> dict[str, float]:
        """used_bytes: what counts; room_bytes: the rest of what is allocated; bytes_share: of the full f16 cache."""
        setup = system.setup
        if setup.budget:
            used = self.cost(setup).used(setup.budget - setup.memory_slots)
        else:
            used = context_tokens * self.model.token_bytes(setup.cache_type)
        return {
            "used_bytes": used,
            "room_bytes": _allocated(system) - used,
            "bytes_share": used / self.full_bytes(context_tokens),
        }


def _fewer(slots: int) -> Iterator[int]:
    """So many, then ever fewer, in whole eights."""
    yield slots
    yield from range((slots - 1) // 8 * 8, 0, -8)


def _allocated(system: System) -> int:
    stats = system.stats()
    return stats["kv_bytes"] + stats["meta_bytes"] + stats["sidecar_bytes"]
