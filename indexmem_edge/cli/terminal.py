"""Where the chat reads and writes: a person at a terminal, a pipe, or a program that wants JSON."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import Optional, Type

from .streams import can_show, make_forgiving, shows_escapes

LEAVE = "Ctrl-Z and Enter leave" if sys.platform == "win32" else "Ctrl-D leaves"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def printable(text: str) -> str:
    """Text of unknown origin for a terminal: whatever could move the cursor or hide something is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Terminal:
    """Answers go to standard output. Remarks go to a person's terminal, else to standard error."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.interactive = sys.stdin.isatty()
        self._colour = shows_escapes(sys.stdout) and not as_json
        make_forgiving()
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() a history and editing)

    def read_line(self) -> Optional[str]:
        """The next line without surrounding space, or None at the end of the input."""
        if not self.interactive:
            line = sys.stdin.readline()
            return line.strip() if line else None
        while True:
            try:
                return input("> ").strip()
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print(f"  ({LEAVE}, so does /exit)")

    def write(self, text: str) -> None:
        """A line of output proper."""
        print(text, flush=True)

    def say(self, text: str) -> None:
        """What a command was asked for."""
        self.write(text)

    def say_to_person(self, text: str) -> None:
        """Courtesy that only a person wants."""
        if self.interactive and not self.as_json:
            print(self._dim(text), flush=True)

    def stream(self, piece: str) -> None:
        """A piece of an answer as it comes."""
        if not self.as_json:
            print(piece, end="", flush=True)

    def end_stream(self, anything: bool) -> None:
        """The end of an answer."""
        if not self.as_json and anything:
            print(flush=True)

    def note(self, text: str) -> None:
        """Something that should not pass unnoticed."""
        if self._colour and self.interactive:
            print(self._dim(f"[{text}]"), flush=True)
        else:
            print(f"note: {text}", file=sys.stderr, flush=True)

    def footer(self, text: str) -> None:
        """Figures after an answer."""
        if self._colour and self.interactive:
            print(self._dim(text), flush=True)

    def error(self, text: str) -> None:
        """What went wrong, on one line."""
        if self.as_json:
            import json

            self.write(json.dumps({"error": text}))
        print(f"error: {text}", file=sys.stderr, flush=True)

    def _dim(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._colour else text


class ProgressBar:
    """A bar on standard error while a document is read; nothing where there is no terminal."""

    def __init__(self, title: str, terminal: Terminal) -> None:
        self._title = title
        self._shown = shows_escapes(sys.stderr) and not terminal.as_json
        self._full, self._empty = "█░" if can_show("█░", sys.stderr) else "#."

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, done: int, total: int) -> None:
        """Draws `done` of `total`."""
        if self._shown and total > 0:
            filled = 30 * done // total
            bar = self._full * filled + self._empty * (30 - filled)
            print(f"\r{self._title} {bar} {done:,}/{total:,} tokens", end="", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
