"""The commands of the chat: their names, and which lines are commands at all."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Optional

from ..errors import IndexMemError

_LOOKS_LIKE_ONE = re.compile(r"/[A-Za-z][A-Za-z_-]*")


@dataclass(frozen=True)
class Command:
    """`argument` is what the list of commands calls it: FILE, TEXT, in brackets if it can be left out, or nothing."""

    name: str
    argument: str
    help: str

    @property
    def usage(self) -> str:
        return f"{self.name} {self.argument}".rstrip()

    @property
    def takes_lines(self) -> bool:
        """Whether its argument may have several lines."""
        return "TEXT" in self.argument


AS_BACKGROUND, AGAIN = "--as-background", "--again"  # options of /load
COMMANDS = (
    Command("/stats", "", "what the KV cache has seen, kept and dropped"),
    Command("/regen", "", "another answer to the last question"),
    Command("/edit", "[TEXT]", "ask the last question anew, in other words"),
    Command("/undo", "", "take back the last question with its answer, or the last document"),
    Command("/system", "[TEXT]", "set the system prompt, or show it"),
    Command("/reset", "", "forget the conversation"),
    Command("/branch", "[NAME]", "name this point, or go to that branch; alone: list them; -d NAME: forget one"),
    Command("/save", "FILE", "save the conversation, KV cache included"),
    Command("/load", "FILE", "continue a saved conversation; only what is new will be evaluated"),
    Command("/read", "FILE", "read a text file into the conversation now; ask about it afterwards"),
    Command("/help", "", "this list"),
    Command("/exit", "", "leave"),
)
_BY_NAME = {command.name: command for command in COMMANDS} | {"/quit": COMMANDS[-1]}


def help_text(leave: str) -> str:
    """The list of commands; `leave` says how else one leaves."""
    rows = [(command.usage, command.help) for command in COMMANDS[:-1]]
    rows += [("/exit", f"leave ({leave}, too); Ctrl-C stops an answer"), ("//text", "a message that begins with a slash")]
    rows += [("/load FILE", f"{AS_BACKGROUND}: a new one that knows what this one has kept; {AGAIN}: its text is read again")]
    rows += [("Alt-Enter", "another line of the message, as a \\ at its end; pasted lines stay together")]
    width = max(len(usage) for usage, _ in rows)
    return "\n".join(f"{usage:<{width}}  {help}".rstrip() for usage, help in rows)


def parse(text: str) -> tuple[Optional[str], str]:
    """What a person typed: the name of a command and its argument, or None and a message.

    A message may begin with a slash if that is doubled, or where it does not look like a command, as a path does not.

    Raises:
        IndexMemError: it looks like a command, and is none, or has too little or too much behind it.
    """
    if text.startswith("//"):
        return None, text[1:]
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    if not _LOOKS_LIKE_ONE.fullmatch(first):
        return None, text
    command, argument = _BY_NAME.get(first.lower()), text[len(first) :].strip()
    lines = "\n" in text
    if command is None:
        if lines:
            return None, text  # pasted, for example a list of folders
        raise IndexMemError(_unknown(first))
    if lines and not command.takes_lines:
        raise IndexMemError(f"{first} is a command of one line: begin with // to send the lines as a message")
    if argument and not command.argument:
        raise IndexMemError(f"{first} takes no argument, found {argument!r}: begin with // to send it as a message")
    if not argument and command.argument and not command.argument.startswith("["):
        raise IndexMemError(f"{first} needs a {command.argument.lower()}: {command.usage}")
    return command.name, argument


def load_options(argument: str) -> tuple[str, set[str]]:
    """What stands behind /load: the file, and the options behind that."""
    options: set[str] = set()
    file, _, last = argument.rpartition(" ")
    while file and last in (AS_BACKGROUND, AGAIN):
        options.add(last)
        argument = file.rstrip()
        file, _, last = argument.rpartition(" ")
    return argument, options


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), _BY_NAME, n=2)
    choices = f"did you mean {' or '.join(close)}" if close else f"choose from {', '.join(c.name for c in COMMANDS)}"
    return f"unknown command {name}: {choices}, or begin with // to send it as a message"
