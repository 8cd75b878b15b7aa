"""Consoles and progress bars: the one place that knows how they are drawn. Colours and bars are for a person's terminal;
in a pipe or a file there is nothing but text. NO_COLOR and TERM=dumb are heard, and terminals may be narrow.
"""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID

_SILENT_FOR = 0.4  # seconds before a bar is shown: what takes no longer needs none
_NARROW = 60  # columns, below which a bar has no room beside what it says


def console(*, error: bool = False, width_in_pipes: Optional[int] = None) -> Console:
    """For text on standard output, or standard error, as wide as the terminal.

    Args:
        error: standard error.
        width_in_pipes: columns where there is no terminal. None: lines are as long as they are.
    """
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))  # rich itself would still print bold and dim
    found = Console(stderr=error, highlight=False, emoji=False, color_system=None if plain else "auto")
    if not found.is_terminal:
        found.soft_wrap = width_in_pipes is None
        if width_in_pipes is not None:
            found.width = width_in_pipes
    return found


def shows_bars(target: Console) -> bool:
    """Whether a bar can be drawn and wiped out again."""
    return target.is_terminal and not target.is_dumb_terminal


def progress(wanted: bool, *, transient: bool = True, figures: bool = False) -> Progress:
    """Bars on standard error for a person at a terminal; it draws nothing otherwise, or if not wanted.

    Args:
        transient: the bars vanish at their end.
        figures: beside each bar stands its field `figures`.
    """
    from rich.progress import Progress

    target = console(error=True)
    columns = _columns(target.width, figures)
    return Progress(*columns, console=target, transient=transient, disable=not (wanted and shows_bars(target)))


def _columns(width: int, figures: bool) -> list[ProgressColumn]:
    """What a line of so many columns has room for."""
    from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    def text(field: str, most: int) -> ProgressColumn:
        column = Column(no_wrap=True, overflow="ellipsis", max_width=most)
        return TextColumn(f"{{task.{field}}}", markup=False, table_column=column)

    if width < _NARROW:
        return [text("description", width - 6), TaskProgressColumn()]
    beside = [text("fields[figures]", width // 3)] if figures else []
    bar = max(6, min(40, width - width // 3 - 30 - (width // 3 if figures else 0)))
    remaining = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    return [text("description", width // 3), BarColumn(bar_width=bar), MofNCompleteColumn(), remaining, *beside]


class Bar:
    """A bar for one thing, on standard error, that vanishes at its end. It is not shown before it takes long."""

    def __init__(self, what: str, wanted: bool) -> None:
        self._what = what
        self._wanted = wanted and sys.stderr is not None and sys.stderr.isatty()
        self._progress: Optional[Progress] = None
        self._task: Optional[TaskID] = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(_SILENT_FOR, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Bar:
        if self._wanted:
            self._progress = progress(True)
            self._task = self._progress.add_task(self._what, total=None)
            self._timer.start()
        return self

    def update(self, done: int, total: int) -> None:
        """`done` of `total` is done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def _show(self) -> None:
        with self._lock:
            if self._progress is not None:
                self._progress.start()

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._timer.cancel()
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None
