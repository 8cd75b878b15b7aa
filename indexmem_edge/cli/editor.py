"""Typing at a terminal: lines are edited, pasted paragraphs are one message, commands and paths are completed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Optional

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output

from .commands import COMMANDS

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyPressEvent

_PROMPT, _CONTINUED = "> ", "  "


class Editor:
    """Reads messages and commands of a person.

    Enter sends, Alt-Enter and a backslash at the end of a line begin another line. What is pasted stays together,
    line breaks included, until Enter is pressed. Tab completes.
    """

    def __init__(self, history: Optional[History] = None) -> None:
        self._too_late = False  # Ctrl-C came when a message had just been sent
        self._session: PromptSession[str] = PromptSession(
            history=history or InMemoryHistory(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            key_bindings=_keys(self._interrupted),
            multiline=True,
            prompt_continuation=_CONTINUED,
            enable_suspend=True,
            output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
        )

    def read(self, draft: str = "") -> str:
        """What was typed, `draft` to begin with.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C, also in the moment after Enter.
        """
        self._too_late = False
        message = self._session.prompt(_PROMPT, default=draft)
        waiting = self._session.app.key_processor.input_queue  # of a prompt that is over: nobody reads them
        if self._too_late or any(press.key is Keys.SIGINT for press in waiting):
            raise KeyboardInterrupt
        return message

    @property
    def typed(self) -> str:
        """What stands in the line, also after Ctrl-C."""
        return self._session.default_buffer.text

    def _interrupted(self, event: KeyPressEvent) -> None:
        if event.app.future is None:  # the prompt is over, and prompt_toolkit has nothing left to interrupt
            self._too_late = True
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")


class CommandCompleter(Completer):
    """Names of commands at the beginning of a message, and of files where a command takes one."""

    _paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """See `prompt_toolkit`."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if not space:
            for command in COMMANDS:
                if command.name.startswith(name.lower()):
                    end = " " if command.argument else ""
                    yield Completion(command.name + end, -len(name), display=command.name, display_meta=command.help)
        elif any(command.name == name.lower() and command.argument == "FILE" for command in COMMANDS):
            yield from self._paths.get_completions(Document(argument.lstrip()), complete_event)


def _keys(interrupted: Callable[[KeyPressEvent], None]) -> KeyBindings:
    keys = KeyBindings()
    keys.add("<sigint>")(interrupted)

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end_of_line:
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
