"""What the chat tells a person about the cache: nothing is dropped silently, and nothing is said in the middle of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..errors import CacheWarning
    from ..llama import Llama
    from .terminal import Terminal


class CacheNotes:
    """Warnings of a `Llama`, until they can be told."""

    def __init__(self, terminal: Terminal, llm: Llama) -> None:
        self._terminal = terminal
        self._waiting: list[CacheWarning] = []
        llm.kv_warn = self._waiting.append

    def tell(self) -> None:
        """Whatever is new."""
        for warning in self._waiting:
            self._terminal.note(str(warning))
        self._waiting.clear()
