"""`chat --session FILE`: the conversation goes on where the file ends, and the file follows the conversation.

It is written in a thread, while the person reads and types. What is written is copied while the chat is at rest: a conversation and
the state that belongs to it. A file is replaced as a whole, so that whatever ends the program leaves the one before.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Optional

from ..errors import IndexMemError, SessionError
from ..files.atomic import remove_leftovers
from ..files.lock import InUse, holding
from ..sessions.info import SessionInfo
from .branches import Content, content_of, extra_of
from .interrupt import uninterrupted
from .options import describe

if TYPE_CHECKING:
    from ..llama import Llama

_TURNS = 4  # so many turns are not in the file at most,
_SECONDS = 30.0  # and none for longer than this,
_REST = 20  # unless writing would take more than this part of the time

_POLL = 0.05  # seconds, for a writer that waits for the one before it



class _Writer(threading.Thread):
    """Writes once, after a while, unless the chat goes on before that.

    Attributes:
        changing: the chat goes on: what is not being copied by now is not to be copied any more.
        copied: nothing is read any more that could change.
    """

    def __init__(self, after: float, writing: threading.Lock, save: Callable[[Callable[[], None]], None]) -> None:
        super().__init__(daemon=True)
        self.after, self.changing, self.copied = max(after, 0.0), threading.Event(), threading.Event()
        self._writing, self._save = writing, save

    def run(self) -> None:
        try:
            if self.changing.wait(self.after):
                return
            while not self._writing.acquire(timeout=_POLL):  # an earlier one is not done yet
                if self.changing.is_set():
                    return
            try:
                if not self.changing.is_set():
                    self._save(self.copied.set)
            finally:
                self._writing.release()
        finally:
            self.copied.set()


class Keeper:
    """The file of a conversation. Within the block it is this process's alone.

    Raises:
        SessionError: another process has it, it is no session of a chat, or there is no such folder.
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
        self._writer: Optional[_Writer] = None
        self._writing = threading.Lock()
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
        try:
            if os.path.exists(target):  # what is wrong there is said before anything takes time
                self._content_in(SessionInfo.read(self.path).extra)
        except SessionError:
            self._held.close()
            raise
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
        self._in_file = self._latest = self._content_in(extra)
        return self._in_file

    def at_rest(self, content: Content) -> None:
        """Nothing changes until `before_change`: the file may follow."""
        if self._problem:
            self._tell_problem()
        if content != self._latest:
            self._turns += 1
            self._latest = content
        if self._is_due and (self._writer is None or self._writer.copied.is_set()):
            now = time.monotonic()
            self._since = self._since or now
            wanted = now if self._turns >= _TURNS else self._since + _SECONDS
            self._writer = _Writer(max(wanted, self._not_before) - now, self._writing, self._save)
            self._writer.start()

    def before_change(self) -> None:
        """Waits until nobody copies what is about to change."""
        if self._writer is not None:
            self._writer.changing.set()
            self._writer.copied.wait()

    def finish(self) -> bool:
        """The end: writes what is not in the file yet; returns whether the file has it all."""
        with uninterrupted():
            self.before_change()
            with self._writing:
                if self._is_due:
                    self._save(lambda: None)
        return not self._is_due

    @property
    def problem(self) -> str:
        """What to say where `finish` has returned False."""
        what = "the file ends before what was said since" if self._in_file is not None else "the conversation is lost"
        return f"{self._problem}: {what}"

    def _content_in(self, extra: Any) -> Content:
        content = content_of(extra)
        if content is None:
            raise SessionError(f"{self.path} was not saved by a chat, it has no messages: name another file")
        return content

    @property
    def _is_due(self) -> bool:
        if self._latest is None or self._latest == self._in_file:
            return False
        conversation, branches = self._latest
        return self._in_file is not None or not conversation.is_empty or bool(branches.left)

    def _save(self, copied: Callable[[], None]) -> None:
        assert self._llm is not None and self._latest is not None
        content, started = self._latest, time.monotonic()
        self._turns, self._since = 0, 0.0
        try:
            self._llm.save_session(self.path, extra=extra_of(content), copied=copied)
        except (IndexMemError, ValueError, RuntimeError, OSError, MemoryError) as error:
            self._problem = describe(error)
        else:
            self._in_file, self._problem, self._told = content, None, False
        ended = time.monotonic()
        self._not_before = ended + _REST * (ended - started)

    def _tell_problem(self) -> None:
        if not self._told:
            self._told = True
            self._tell(f"{self._problem}: the chat goes on, and tries again")
