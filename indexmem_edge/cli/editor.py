"""Typing at a terminal: lines are edited, pasted paragraphs are one message, commands and paths are completed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Optional

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import create_output

from .commands import COMMANDS
from .interrupt import signals_call

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyPressEvent

_PROMPT, _CONTINUED = "> ", "  "


class Editor:
    """Reads messages and commands of a person.

    Enter sends, Alt-Enter and a backslash at the end of a line begin another line. What is pasted stays together,
    line breaks included, until Enter is pressed. Tab completes.

    Signals never raise in the middle of prompt_toolkit, which would leave an event loop half made or half closed, and say so on
    the terminal: they end the prompt, or are remembered until it has ended.
    """

    def __init__(self, history: Optional[History] = None, names: Callable[[], Iterable[str]] = list) -> None:
        self._signalled: Optional[type[BaseException]] = None  # what the prompt is to end with
        self._session: PromptSession[str] = PromptSession(
            history=history or InMemoryHistory(),
            completer=CommandCompleter(names),
            complete_while_typing=False,
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation=_CONTINUED,
            enable_suspend=True,
            output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
        )

    def read(self, draft: str = "") -> str:
        """What was typed, `draft` to begin with.

        Raises:
            EOFError: Ctrl-D, or the program was asked to end.
            KeyboardInterrupt: Ctrl-C, also in the moment after Enter.
        """
        self._signalled = None
        with signals_call(lambda: self._end_with(KeyboardInterrupt), lambda: self._end_with(EOFError)):
            message = self._session.prompt(_PROMPT, default=draft, pre_run=self._begun, handle_sigint=False)
        if self._signalled is not None:
            raise self._signalled
        return message

    @property
    def typed(self) -> str:
        """What stands in the line, also after Ctrl-C."""
        return self._session.default_buffer.text

    def _begun(self) -> None:
        """The prompt is about to be drawn: Ctrl-C until now was about nothing."""
        if self._signalled is EOFError:
            self._exit()
        self._signalled = None

    def _end_with(self, error: type[BaseException]) -> None:
        """A signal says so: it may have come at any time."""
        self._signalled = error if self._signalled is not EOFError else EOFError
        loop = self._session.app.loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(self._exit)

    def _exit(self) -> None:
        app, error = self._session.app, self._signalled
        if error is not None and app.future is not None and not app.future.done():
            app.exit(exception=error(), style="class:aborting")


class CommandCompleter(Completer):
    """Names of commands at the beginning of a message, and of files and branches where a command takes one."""

    _paths = PathCompleter(expanduser=True)

    def __init__(self, names: Callable[[], Iterable[str]] = list) -> None:
        self._names = names

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
        elif name.lower() == "/branch":
            begun = argument.lstrip().removeprefix("-d ").lstrip()
            yield from (Completion(known, -len(begun)) for known in self._names() if known.startswith(begun))
        elif any(command.name == name.lower() and command.argument == "FILE" for command in COMMANDS):
            yield from self._paths.get_completions(Document(argument.lstrip()), complete_event)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end_of_line:
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("c-@", filter=Condition(lambda: not get_app().current_buffer.text))
    def _(event: KeyPressEvent) -> None:
        """Ctrl-D typed while there was no prompt, after an answer say: the terminal hands its end of a file on as a NUL."""
        event.app.exit(exception=EOFError, style="class:exiting")

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
