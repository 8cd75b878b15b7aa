"""Where the chat's messages and commands come from: a person at a terminal, or the lines of a pipe or file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Optional, Protocol

Names = Callable[[], Iterable[str]]


class Reader(Protocol):
    """A source of messages and commands."""

    leave: str  # how a person ends it

    def read(self, draft: str = "") -> Optional[str]:
        """The next one, without space around it, or None at the end. A person may edit `draft`; nothing is left of it
        after Ctrl-C.
        """


def reader(interactive: bool, keep_history: bool = True, names: Names = list) -> Reader:
    """The one for standard input.

    Args:
        interactive: a person is there.
        keep_history: what is typed is there to come back to in the next chat.
        names: gives the branches that there are, for completion.
    """
    if not interactive:
        return Lines()
    if os.environ.get("TERM") != "dumb" and (sys.stdout.isatty() or sys.stderr.isatty()):
        with contextlib.suppress(Exception):  # a console that it does not know
            return Keyboard(keep_history, names)
    return Prompt()


class Lines:
    """The lines of a pipe or file, which is UTF-8 whatever a console has."""

    leave = "their end leaves"

    def __init__(self) -> None:
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")  # type: ignore[union-attr]

    def read(self, draft: str = "") -> Optional[str]:
        """See `Reader`."""
        line = sys.stdin.readline()
        return line.strip() if line else None


class Keyboard:
    """A person at a terminal."""

    leave = "Ctrl-D leaves"

    def __init__(self, keep_history: bool, names: Names) -> None:
        from ..files.folders import state_dir
        from .editor import Editor
        from .history import OFF_VARIABLE, KeptHistory

        kept = keep_history and os.environ.get(OFF_VARIABLE) != "0"
        self._editor = Editor(KeptHistory(state_dir() / "history") if kept else None, names)

    def read(self, draft: str = "") -> Optional[str]:
        """See `Reader`."""
        while True:
            try:
                return self._editor.read(draft).strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if draft:
                    return ""
                if not self._editor.typed.strip():
                    print(f"({self.leave}, so does /exit)", file=sys.stderr, flush=True)


class Prompt:
    """A person at a terminal that shows text and nothing else."""

    leave = "Ctrl-Z and Enter leave" if sys.platform == "win32" else "Ctrl-D leaves"

    def __init__(self) -> None:
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]

    def read(self, draft: str = "") -> Optional[str]:
        """See `Reader`. There is no way to edit here: an empty line takes the draft."""
        if draft:
            print(f"(now: {draft})")
        while True:
            try:
                return input("> ").strip() or draft
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                if draft:
                    return ""
                print(f"  ({self.leave}, so does /exit)")
