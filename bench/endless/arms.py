"""What keeps a conversation without end: bounded caches with or without a span, and the rival that every program has.

The rival is llama.cpp's context shift: a cache of as many cells as the budget has entries. When it is full, the sinks stay,
half of the rest is dropped and what is left moves up. It forgets everything that is older, and its text stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..quality.arms import Arm, Sidecars, bounded_setup
from ..report import Row
from ..runner import UNBOUNDED, BenchError, Model, Setup, System, llama_cpp

SHIFT = "shift"  # named like a policy
TRAINED = "trained"  # the span that is the length that the model was trained for


@dataclass(frozen=True)
class EndlessArm:
    policy: str
    span: int | None = None  # as Setup has it; a shift has none

    @property
    def span_name(self) -> str:
        if self.policy == SHIFT:
            return "-"
        return TRAINED if self.span is None else str(self.span) if self.span else "off"

    @property
    def name(self) -> str:
        return self.policy if self.policy == SHIFT else f"{self.policy}, span {self.span_name}"


def spans_of(text: str) -> list[int | None]:
    """Spans as they are written: `trained`, 0 for none, or a number.

    Raises:
        BenchError: something else.
    """
    out: list[int | None] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word != TRAINED and not word.isdecimal():
            raise BenchError(f"expected spans such as {TRAINED},0,4096, found {word!r}")
        out.append(None if word == TRAINED else int(word))
    if not out:
        raise BenchError(f"no span was named: {TRAINED} is the length that the model was trained for, 0 stands for none")
    return list(dict.fromkeys(out))


def arms_of(policies: Sequence[str], spans: Sequence[int | None]) -> list[EndlessArm]:
    """Every policy with every span; the shift, which is what the others are compared with, comes first."""
    shift = [EndlessArm(SHIFT)] if SHIFT in policies else []
    return shift + [EndlessArm(policy, span) for policy in policies if policy != SHIFT for span in spans]


def shifting(base: Setup, cells: int) -> Setup:
    """The stock cache of so many cells that a `ShiftingSystem` takes; what is read at once fits beside the half that a shift leaves."""
    return replace(base, policy=UNBOUNDED, budget=0, n_ctx=cells, ubatch=max(1, min(base.ubatch, cells // 8)))


def setup_of(base: Setup, arm: EndlessArm, sidecars: Sidecars, budget: int) -> Setup:
    if arm.policy == SHIFT:
        return shifting(base, budget)
    return replace(bounded_setup(base, Arm(arm.policy, 1.0), sidecars, budget), span=arm.span)


def open_system(model: Model, base: Setup, arm: EndlessArm, sidecars: Sidecars, budget: int) -> System:
    kind = ShiftingSystem if arm.policy == SHIFT else System
    return kind(model, setup_of(base, arm, sidecars, budget))


class ShiftingSystem(System):
    """The stock cache with llama.cpp's context shift."""

    def __init__(self, model: Model, setup: Setup):
        self.used = self.shifts = 0  # cells in use, which is the next position, too
        super().__init__(model, setup)
        self.cells = int(llama_cpp.llama_n_ctx(self.ctx))
        if not llama_cpp.llama_memory_can_shift(llama_cpp.llama_get_memory(self.ctx)):
            self.close()
            raise BenchError(f"the cache of {model.path.name} cannot shift its context: leave {SHIFT} out of --arms")

    def _room_for(self, n: int) -> int:
        while self.used + n > self.cells:
            self._shift()
        return self.used

    def _shift(self) -> None:
        """As llama.cpp's own programs do it: sinks stay, the older half of the rest goes, the others move up."""
        memory, keep = llama_cpp.llama_get_memory(self.ctx), self.setup.sinks
        drop = (self.used - keep) // 2
        if drop < 1 or not llama_cpp.llama_memory_seq_rm(memory, 0, keep, keep + drop):
            raise BenchError(f"a cache of {self.cells} cells with {keep} sinks cannot be shifted: choose a larger budget")
        llama_cpp.llama_memory_seq_add(memory, 0, keep + drop, self.used, -drop)
        self.used -= drop
        self.shifts += 1

    def _ubatch(self, tokens: Sequence[int], want: str) -> float:
        seconds = super()._ubatch(tokens, want)
        self.used += len(tokens)
        return seconds

    def save(self) -> tuple[Any, int, np.ndarray | None]:
        state, seen, logits = super().save()
        return (state, self.used, self.shifts), seen, logits

    def restore(self, state: tuple[Any, int, np.ndarray | None]) -> None:
        (buffer, self.used, self.shifts), seen, logits = state
        super().restore((buffer, seen, logits))

    def rollback(self, n_seen: int) -> bool:
        return False

    def stats(self) -> dict[str, int]:
        return {**super().stats(), "kept": self.used, "evicted": self.seen - self.used}


def counts(system: System) -> Row:
    """What a run leaves beside its figures: bytes, and how often positions were renewed."""
    stats, found = system.stats(), system.byte_counts()
    renewed = system.shifts if isinstance(system, ShiftingSystem) else stats["rebases"]
    return {
        **found,
        "cells": stats.get("slots", getattr(system, "cells", None)),
        "tokens_seen": system.seen,
        "rebases": renewed,
        "span_in_force": stats.get("span", 0),
        "span_reason": system.span_reason(),
    }
