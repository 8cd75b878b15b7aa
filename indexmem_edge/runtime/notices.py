"""What should not pass unnoticed: that text is dropped, evaluated again, or read by a chat format that is not the model's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Optional

from ..errors import CacheWarning
from ..native import api
from ..options import CacheOptions
from ..stats import KVStats
from .inside import Inside

Hook = Callable[[CacheWarning], None]

DROPPED, RENEWED, BEYOND, REEVALUATED = "dropped", "renewed", "beyond trained length", "evaluated again"
SYSTEM, TEMPLATE, SIDECAR, SESSION = "system prompt", "chat template", "sidecar", "session"


class Notices:
    """The notices of one `Llama`: to its owner's function, or as a Python warning, each kind once an object."""

    def __init__(self, hook: Optional[Hook] = None) -> None:
        self.hook = hook
        self._warned: set[str] = set()
        self._told: set[str] = set()  # of this conversation
        self._waiting: list[tuple[str, str]] = []
        self._rebases = 0  # that are old news

    def tell(self, kind: str, text: str) -> None:
        """Says something, whenever it happens; without a hook, the first time."""
        if self.hook is not None:
            self.hook(CacheWarning(text, kind))
        elif kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(CacheWarning(text, kind), stacklevel=2)

    def tell_later(self, kind: str, text: str) -> None:
        """Says it when tokens have been evaluated: not where an exception, of a hook or a filter, would leave things half done."""
        self._waiting.append((kind, text))

    def tell_once(self, kind: str, text: str) -> None:
        """Says what is so for the rest of the conversation."""
        if kind not in self._told:
            self._told.add(kind)
            self.tell(kind, text)

    def start_over(self, rebases: int = 0) -> None:
        """What was said of a conversation can be said of the next, which may have had its positions renewed before."""
        self._told.clear()
        self._rebases = rebases

    def look(self, llm: Inside, options: CacheOptions, stats: Callable[[], KVStats]) -> None:
        """After tokens have been evaluated: says what has happened to the cache meanwhile."""
        while self._waiting:
            self.tell(*self._waiting.pop(0))
        if not options.bounded:
            position, span = llm.n_tokens, 0
        else:
            native = api.get_stats(llm.ctx)
            position, span = native.next_position, native.span
            if native.n_evicted and DROPPED not in self._told:
                self.tell_once(DROPPED, dropped(stats(), options.budget_ratio))
            if native.n_rebases > self._rebases and RENEWED not in self._told:
                self.tell_once(RENEWED, renewed(span))
        if not span and position > llm.n_ctx_train and BEYOND not in self._told:
            for text in stats().warnings:
                self.tell_once(BEYOND, text)


def dropped(stats: KVStats, ratio: Optional[float]) -> str:
    """That the budget has been reached, and what always stays."""
    reached = f"the KV budget of {stats.budget:,} is reached"
    if ratio is not None and stats.budget_now < stats.budget:
        reached = f"the KV cache keeps a share of {ratio:g} of the text, at most {stats.budget:,} entries"
    part = f" (in KV heads with small budgets {stats.first:,})" if stats.first < stats.pin else ""
    taken_up = f", and the memory `{stats.memory}` takes them up. " if stats.remembers else ". "
    return (
        f"{reached}: from now on the policy `{stats.policy}` drops entries{taken_up}"
        f"The first {max(stats.sinks, stats.pin):,}{part} and the last {stats.window:,} tokens always stay"
    )


def renewed(span: int) -> str:
    """That positions have begun to be renewed."""
    return (
        f"position {span:,} has been reached: what is kept gets new positions, in its order but closer together, so that all "
        "stay below that"
    )


def evaluated_again(tokens: int, why: str) -> str:
    """That part of the conversation had to be read again."""
    return f"{tokens:,} cached tokens had to be evaluated again: {why}"


