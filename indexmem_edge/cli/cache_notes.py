"""What the chat tells a person about the cache: nothing is dropped silently, and nothing is told twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from ..stats import KVStats
    from .terminal import Terminal


class CacheNotes:
    """What has been told of the present conversation.

    Args:
        ratio: the share of the text that is kept at most, if there is such an option.
    """

    def __init__(self, terminal: Terminal, ratio: Optional[float]) -> None:
        self._terminal = terminal
        self._ratio = ratio
        self._reevaluated = 0
        self.start_over(0)

    def start_over(self, rebases: int) -> None:
        """Another conversation, whose positions have been renewed so often before."""
        self._told_evicted = self._told_renewed = False
        self._told: set[str] = set()
        self._rebases = rebases

    def tell(self, stats: KVStats) -> None:
        """Whatever is new."""
        if stats.evicted > 0 and not self._told_evicted:
            self._told_evicted = True
            self._terminal.note(self._eviction(stats))
        if stats.rebases > self._rebases and not self._told_renewed:
            self._told_renewed = True
            self._terminal.note(
                f"position {stats.span:,} has been reached: what is kept gets new positions, in its order but closer "
                "together, so that all stay below that. /stats counts how often"
            )
        if stats.reevaluated > self._reevaluated:
            n = stats.reevaluated - self._reevaluated
            self._terminal.note(f"{n:,} cached tokens had to be evaluated again: {stats.reevaluated_reason}")
            self._reevaluated = stats.reevaluated
        for warning in stats.warnings:
            kind = warning.partition(" is ")[2]  # once, not again for every position
            if kind not in self._told:
                self._told.add(kind)
                self._terminal.note(warning)

    def _eviction(self, stats: KVStats) -> str:
        reached = f"the KV budget of {stats.budget:,} is reached"
        if self._ratio is not None and stats.budget_now < stats.budget:
            reached = f"the KV cache keeps a share of {self._ratio:g} of the text, at most {stats.budget:,} entries"
        takes_up = f", and the memory `{stats.memory}` takes them up" if stats.remembers else ""
        return (
            f"{reached}: from now on the policy `{stats.policy}` drops entries{takes_up}. The first "
            f"{max(stats.sinks, stats.pin):,} and the last {stats.window:,} tokens always stay; /stats counts the rest"
        )
