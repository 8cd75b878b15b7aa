"""What the chat writes, and where: answers, remarks and errors, for a person, a pipe, or a program that wants JSON."""

from __future__ import annotations

import json
import sys

from .console import Bar, console
from .streams import make_forgiving

_ENDS = "\n\t"


def printable(text: str) -> str:
    """Text of unknown origin for a terminal: whatever could move the cursor or hide something is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def without_controls(text: str) -> str:
    """An answer for a terminal: its characters and line breaks, and nothing that moves the cursor or changes colours."""
    return "".join(c for c in text if c in _ENDS or not (c < " " or "\x7f" <= c < "\xa0"))


class Terminal:
    """Answers go to standard output. Remarks go to a person's terminal, else to standard error.

    Args:
        as_json: answers are objects of JSON, and so are errors.
        quiet: nothing but answers, errors, and what should not pass unnoticed.
    """

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.interactive = sys.stdin.isatty()
        make_forgiving()
        self._console = console()
        self._for_a_person = self.interactive and self._console.is_terminal and not as_json

    def write(self, text: str) -> None:
        """A line of output proper."""
        print(text, flush=True)

    def say(self, text: str) -> None:
        """What a command was asked for."""
        self.write(without_controls(text) if self._console.is_terminal else text)

    def say_to_person(self, text: str) -> None:
        """Courtesy that only a person wants."""
        if self._for_a_person and not self.quiet:
            self._dim(text)

    def stream(self, piece: str) -> None:
        """A piece of an answer as it comes."""
        if not self.as_json:
            print(without_controls(piece) if self._console.is_terminal else piece, end="", flush=True)

    def end_stream(self, anything: bool) -> None:
        """The end of an answer."""
        if not self.as_json and anything:
            print(flush=True)

    def note(self, text: str) -> None:
        """Something that should not pass unnoticed."""
        if self._for_a_person:
            self._dim(f"[{text}]")
        else:
            print(f"note: {printable(text)}", file=sys.stderr, flush=True)

    def footer(self, text: str) -> None:
        """Figures after an answer."""
        if self._for_a_person and not self.quiet:
            self._dim(text)

    def error(self, text: str) -> None:
        """What went wrong, on one line."""
        if self.as_json:
            self.write(json.dumps({"error": text}))
        console(error=True).print(f"error: {text}", style="red", markup=False)

    def bar(self, what: str) -> Bar:
        """A bar while something is read."""
        return Bar(what, wanted=not (self.as_json or self.quiet))

    def _dim(self, text: str) -> None:
        self._console.print(without_controls(text), style="dim", markup=False)  # some of it may come out of a file
