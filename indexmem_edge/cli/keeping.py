"""`chat --session FILE`: the conversation goes on where the file ends, and the file follows the conversation.

It is written in a thread, while the person reads and types, and only while the chat is at rest: a conversation and the state that
belongs to it. A file is replaced as a whole, so that whatever ends the program leaves the one before.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Optional

from ..errors import IndexMemError, SessionError
from ..files.atomic import remove_leftovers
from ..files.lock import InUse, holding
from .branches import Branches
from .conversation import Conversation
from .interrupt import uninterrupted
from .options import describe

if TYPE_CHECKING:
    from ..llama import Llama

_TURNS = 4  # so many turns are not in the file at most,
_SECONDS = 30.0  # and none for longer than this,
_REST = 20  # unless writing would take more than this part of the time

Content = tuple[Conversation, Branches]


class Keeper:
    """The file of a conversation. Within the block it is this process's alone.

    Raises:
        SessionError: another process has it, or there is no such folder.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._held = contextlib.ExitStack()
        self._llm: Optional[Llama] = None
        self._tell: Callable[[str], None] = lambda text: None
        self._in_file: Optional[Content] = None
        self._latest: Optional[Content] = None
        self._turns, self._since = 0, 0.0  # that are not in the file, and since when
        self._not_before = 0.0
        self._timer: Optional[threading.Timer] = None
        self._problem: Optional[str] = None  # why the file cannot follow,
        self._told = False  # which is said once

    def __enter__(self) -> Keeper:
        target = os.path.realpath(self.path)
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            raise SessionError(f"the conversation cannot be kept in {self.path}: there is no folder {folder}; make it first")
        if os.path.exists(target) and not os.path.isfile(target):
            raise SessionError(f"the conversation cannot be kept in {self.path}: that is no regular file; name another one")
        try:
            self._held.enter_context(holding(target))
        except InUse as other:
            raise SessionError(f"another chat ({other}) keeps its conversation in {self.path}: leave it, or name another file") from None
        except OSError as error:
            if not os.access(folder, os.W_OK):  # else it is a file system without locks
                self._problem = f"cannot save the session to {self.path}: {error.strerror or error}"
        else:
            remove_leftovers(target)
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._held.close()

    def start(self, llm: Llama, tell: Callable[[str], None]) -> Optional[Content]:
        """What the file has, which `llm` goes on with from now on; None if there is no file yet.

        Args:
            tell: is called with what a person should know.

        Raises:
            SessionError: it is damaged, of another model, or no chat has made it. It stays as it is.
        """
        self._llm, self._tell = llm, tell
        if self._problem:
            self._tell_problem()
        if not os.path.exists(self.path):
            return None
        extra = llm.load_session(self.path)
        conversation = Conversation.from_dict(extra)
        if conversation is None:
            raise SessionError(f"{self.path} was not saved by a chat, it has no messages: name another file")
        self._in_file = self._latest = (conversation, Branches.from_dict(extra))
        return self._in_file

    def at_rest(self, content: Content) -> None:
        """Nothing changes until `before_change`: the file may follow."""
        if self._problem:
            self._tell_problem()
        if content != self._latest:
            self._turns += 1
            self._since = self._since or time.monotonic()
            self._latest = content
        if self._is_due and (self._timer is None or not self._timer.is_alive()):
            now = time.monotonic()
            wanted = now if self._turns >= _TURNS else self._since + _SECONDS
            self._timer = threading.Timer(max(wanted, self._not_before) - now, self._save)
            self._timer.daemon = True
            self._timer.start()

    def before_change(self) -> None:
        """Waits until nobody reads what is about to change."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def finish(self) -> bool:
        """The end: writes what is not in the file yet; returns whether the file has it all."""
        with uninterrupted():
            self.before_change()
            if self._is_due:
                self._save()
        return not self._is_due

    @property
    def problem(self) -> str:
        """What to say where `finish` has returned False."""
        what = "the file ends before what was said since" if self._in_file is not None else "the conversation is lost"
        return f"{self._problem}: {what}"

    @property
    def _is_due(self) -> bool:
        if self._latest is None or self._latest == self._in_file:
            return False
        conversation, branches = self._latest
        return self._in_file is not None or not conversation.is_empty or bool(branches.left)

    def _save(self) -> None:
        assert self._llm is not None and self._latest is not None
        content, started = self._latest, time.monotonic()
        conversation, branches = content
        try:
            self._llm.save_session(self.path, extra={**conversation.to_dict(), **branches.to_dict()})
        except (IndexMemError, ValueError, RuntimeError, OSError, MemoryError) as error:
            self._problem = describe(error)
        else:
            self._in_file, self._problem, self._told = content, None, False
            self._turns, self._since = 0, 0.0
        ended = time.monotonic()
        self._not_before = ended + _REST * (ended - started)

    def _tell_problem(self) -> None:
        if not self._told:
            self._told = True
            self._tell(f"{self._problem}: the chat goes on, and tries again")
