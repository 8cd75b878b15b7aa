"""What a training tells while it goes on; and Ctrl-C, which ends it between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Optional

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Watcher:
    """Is told everything and does nothing. Steps are those done, of the objective that was announced last."""

    def note(self, text: str) -> None:
        """Something that should not pass unnoticed."""

    def stage(self, objective: str, steps: int, done: int) -> None:
        """An objective begins, or goes on after `done` steps."""

    def work(self, done: int, total: int, what: str) -> None:
        """Work other than steps: reading text, preparing, measuring."""

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """A step is done."""

    def evaluated(self, step: int, recall: float, best: bool) -> None:
        """Recall on held-out text after that many steps."""


class Interrupt:
    """Within the block, the first Ctrl-C (or SIGTERM) only sets `wanted`.

    The second raises KeyboardInterrupt at once, unless others must be waited for.
    """

    def __init__(self, alone: bool, told: Callable[[], None] = lambda: None) -> None:
        self.wanted, self._alone, self._told = False, alone, told
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raises KeyboardInterrupt if it is wanted: for places where nothing would be lost."""
        if self.wanted:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        if self.wanted and self._alone:
            raise KeyboardInterrupt
        self.wanted = True
        self._told()
