"""How many entries fit into so many bytes, with everything counted that a cache keeps. The library is asked, not copied.

    full cache      tokens of the context x K and V of a token in f16 + windows and states: shares are shares of that
    bounded cache   entries of the budget x a slot + what does not grow with them + weights of the sidecar

A slot is K, V, a position (two where there is a span), and the state that an indexer keeps of an entry. What does not grow with every entry: rows that
wait to be scored (a few more with a larger budget), the queries that snapkv or an indexer keeps, slots and state of a latent
memory; in models that have some, caches of layers with a window and states of recurrent layers, which the full cache has, too.

Slots beyond the budget hold something only while a ubatch is evaluated, as activations do: they are room to work in, told
apart (`room_bytes`) and not counted, because what has to be kept for a conversation, and grows with it, is the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..runner import F16, FIXED_KEYS, UNBOUNDED, WHOLE_KEYS, BenchError, Model, Setup, System
from .arms import Arm, Sidecars, bounded_setup, setup_for

UNITS = ("bytes", "entries")
FAR = 1 << 30  # a span
_ENOUGH = 8192  # entries
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
    fixed: int  # of the rest, at that budget, weights included

    def used(self, entries: int) -> int:
        return self.fixed + self.slot * entries


class Budgets:
    """What arms become for a context of so many tokens, by bytes or by entries, and what that takes."""

    def __init__(self, model: Model, base: Setup, sidecars: Sidecars, unit: str = "bytes"):
        if unit not in UNITS:
            raise BenchError(f"unknown unit of budgets {unit!r}: choose {' or '.join(UNITS)}")
        self.model, self.base, self.sidecars, self.unit = model, base, sidecars, unit
        self._slots: dict[tuple[object, ...], int] = {}
        self._fixed: dict[tuple[object, ...], int] = {}
        self._spans: dict[tuple[object, ...], int] = {}
        self._others: dict[str, int] = {}

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
            budget = self._largest(replace(setup, memory_slots=slots), limit)
            if (found := bounded_setup(self.base, arm, self.sidecars, budget)).memory_slots >= slots:
                break
        return replace(found, memory_slots=slots)

    def _largest(self, setup: Setup, limit: int) -> int:
        """The largest budget within the limit, by bisection: what is fixed grows a little with the budget."""
        slots = setup.memory_slots

        def fits(budget: int) -> bool:
            return self.cost(replace(setup, budget=budget)).used(budget - slots) <= limit

        low = _least(setup)  # of which a context can be made
        slot = self.cost(replace(setup, budget=low)).slot
        if not fits(low):
            return slots + max((limit - self.cost(replace(setup, budget=low)).fixed) // slot, 0)  # too few
        high = slots + max(limit // slot, low) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def cost(self, setup: Setup) -> Cost:
        """What the library allocates for this budget, taken apart. Making a context is a matter of milliseconds."""
        setup = self._with_or_without_span(setup)
        key = (*_kind(setup), setup.budget)
        if key not in self._fixed:
            slots, whole = self._sizes(replace(setup, ubatch=32, window=1))
            self._fixed[key] = whole - self._slot(setup) * slots
        return Cost(self._slot(setup), self._fixed[key])

    def _with_or_without_span(self, setup: Setup) -> Setup:
        """The same with a span that every budget fits, if one is in force; if not, without: what is measured has other budgets."""
        key = (*_kind(setup), setup.budget, setup.ubatch)
        if setup.span not in (0, FAR) and key not in self._spans:
            with System(self.model, replace(setup, window=1)) as system:
                self._spans[key] = FAR if system.stats()["span"] else 0
        return replace(setup, span=self._spans.get(key, setup.span))

    def _slot(self, setup: Setup) -> int:
        """By two contexts that differ by 256 slots, and are so large that no more tokens wait to be scored in the larger one."""
        if _kind(setup) not in self._slots:
            sizes = (self._sizes(replace(setup, budget=_ENOUGH + more, ubatch=32)) for more in (0, 256))
            (few, small), (many, large) = sizes
            self._slots[_kind(setup)] = (large - small) // (many - few)
        return self._slots[_kind(setup)]

    def _sizes(self, setup: Setup) -> tuple[int, int]:
        """Slots and all bytes."""
        with System(self.model, setup) as system:
            return system.stats()["slots"], _allocated(system)

    def full_bytes(self, context_tokens: int) -> int:
        """Of the full f16 cache for exactly so many tokens."""
        return self._full(context_tokens, F16)

    def _full(self, context_tokens: int, cache_type: str) -> int:
        """K and V of so many tokens, windows and recurrent states: these as they are beside a bounded cache."""
        if cache_type not in self._others:
            small = Setup(policy="streaming", budget=256, ubatch=32, cache_type=cache_type, threads=self.base.threads)
            others = 0
            if self.model.has_fixed():
                with System(self.model, small) as system:
                    others = sum(system.stats()[key] for key in FIXED_KEYS)
            self._others[cache_type] = others
        return context_tokens * self.model.token_bytes(cache_type) + self._others[cache_type]

    def count(self, system: System, context_tokens: int) -> dict[str, float]:
        """used_bytes: what counts; room_bytes: the rest of what is allocated; bytes_share: of the full f16 cache."""
        setup = system.setup
        if setup.budget:
            used = self.cost(setup).used(setup.budget - setup.memory_slots)
        else:
            used = self._full(context_tokens, setup.cache_type)
        return {
            "used_bytes": used,
            "room_bytes": _allocated(system) - used,
            "bytes_share": used / self.full_bytes(context_tokens),
        }




def _kind(setup: Setup) -> tuple[object, ...]:
    return setup.policy, setup.memory, setup.memory_slots, setup.cache_type, setup.sidecar, setup.span


def _least(setup: Setup) -> int:
    return setup.memory_slots + setup.sinks + LEAST_ENTRIES


def _fewer(slots: int) -> Iterator[int]:
    """So many, then ever fewer, in whole eights."""
    yield slots
    yield from range((slots - 1) // 8 * 8, 0, -8)


def _allocated(system: System) -> int:
    stats = system.stats()
    return sum(stats[key] for key in WHOLE_KEYS)
