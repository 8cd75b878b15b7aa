"""All that the window does, without a window: it is given what a person wants, and tells a `View` what there is to see.

Everything here runs in the thread of the window, which calls `poll` some thirty times a second. What the worker has to tell
waits until then, so nothing needs a lock, and the window never waits for the model.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Protocol

from chats import Chat, Document, Message
from turns import Turn, Turns
from worker import Job, Worker

from indexmem_edge import CacheWarning, Cancelled

if TYPE_CHECKING:
    from indexmem_edge import KVStats, Llama

SUFFIX = ".imsess"
Load = Callable[[Callable[[CacheWarning], None]], "Llama"]


class View(Protocol):
    """What a window can do."""

    def added(self, chat: Chat) -> None:
        """There is one more tab, and it is looked at."""

    def removed(self, chat: Chat) -> None:
        """The tab goes."""

    def show(self, chat: Chat) -> None:
        """All of a chat as it is now."""

    def piece(self, chat: Chat, text: str) -> None:
        """Some more text of the answer, which `chat.answer` ends with already."""

    def progress(self, chat: Chat, done: int, total: int) -> None:
        """How many tokens of a prompt have been read."""

    def tell(self, text: str, error: bool = False) -> None:
        """One line for the person."""

    def closed(self) -> None:
        """Everything has been saved, and the model is gone: the window can be, too."""


class Controller:
    """Chats with one model.

    Args:
        load: makes the `Llama`; it is given what to pass on as `kv_warn`.
        view: the window.
        folder: chats are saved here when the window closes, and are there again next time.
        sampling: of answers, as `create_chat_completion` takes it.
    """

    def __init__(self, load: Load, view: View, folder: Path, **sampling: Any) -> None:
        self.chats: list[Chat] = []
        self.closing = False
        self._without_model = False  # it could not be loaded, so there is nothing to save
        self._given_up: set[Chat] = set()  # those that could not be saved, as the person has been told
        self._view, self._folder = view, folder
        self._turns = Turns(**sampling)
        self._events: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        self._worker = Worker(lambda: load(self._warn), self._emit, self._loaded)

    def begin(self) -> None:
        """Opens what was saved when the window was closed, or two new tabs."""
        kept = sorted(self._folder.glob(f"*{SUFFIX}"))
        for path in kept:
            self._open(path, kept=path)
        if kept:
            self._worker.submit(Job(lambda llm, job: None, lambda *_: self._two_tabs()))
        else:
            self._two_tabs()

    def poll(self) -> None:
        """Does what the worker has handed over since the last time."""
        while not self._events.empty():
            function, arguments = self._events.get()
            function(*arguments)
        if self.closing and not any(chat.busy for chat in self.chats):
            self._go_on_closing()

    # what a person wants

    def new(self) -> Chat:
        """One more tab."""
        return self._add(Chat())

    def remove(self, chat: Chat) -> None:
        """Closes a tab for good."""
        self.stop(chat)
        if chat.kept is not None:
            chat.kept.unlink(missing_ok=True)
        self.chats.remove(chat)
        self._view.removed(chat)
        self._two_tabs()

    def send(self, chat: Chat, question: str) -> None:
        """Asks a question."""
        if not chat.busy and question.strip():
            chat.ask(question.strip())
            self._answer(chat)

    def regenerate(self, chat: Chat) -> None:
        """Has the last question answered once more."""
        if chat.can_regenerate:
            self._answer(chat, instead_of=chat.messages.pop())

    def stop(self, chat: Chat) -> None:
        """Ends what is being done for a chat; what has come of an answer stays."""
        if chat.job is not None:
            self._worker.stop(chat.job)

    def read(self, chat: Chat, path: Path) -> None:
        """Reads a document, which the next question is about."""
        if chat.busy:
            self._view.tell(f"{path.name}: wait for the end of the answer, or stop it, and drop it again", error=True)
            return
        messages, state, before = list(chat.messages), chat.state, chat.document
        chat.reading = path.name

        def done(read: Optional[tuple[Turn, Document]], error: Optional[Exception]) -> None:
            chat.reading = ""
            turn = None
            if read is not None:
                turn, chat.document = read
                chat.changed = True
            self._finish(chat, turn, error)

        self._start(chat, lambda llm, job: self._turns.read(llm, job, state, messages, before, path), done)

    def save(self, chat: Chat, path: Path) -> None:
        """Writes a chat to a file."""
        if chat.busy:
            self._view.tell("wait for the end of the answer, or stop it, and save again", error=True)
            return
        self._save(chat, path, lambda size: self._view.tell(f"saved as {path.name}, {size / 2**20:.1f} MiB"), self._fail)

    def open(self, path: Path) -> None:
        """Opens a file with a chat in a tab of its own. It goes on where it was: nothing is read again."""
        self._open(path, kept=None)

    def close(self) -> None:
        """Stops what is being done, saves all chats, frees the model, and then says `View.closed`. If a chat could not be
        saved, the person is told, and the next `close` does not try again.
        """
        if not self.closing:
            self.closing = True
            for chat in self.chats:
                self.stop(chat)

    # how it is done

    def _answer(self, chat: Chat, instead_of: Optional[Message] = None) -> None:
        messages, state = list(chat.messages), chat.state

        def piece(text: str, stats: KVStats) -> None:
            chat.answer += text
            chat.stats = stats
            if chat in self.chats:
                self._view.piece(chat, text)

        def done(turn: Optional[Turn], error: Optional[Exception]) -> None:
            if chat.answer or turn is not None:
                chat.keep_answer()
                chat.changed = True
            elif instead_of is not None:
                chat.messages.append(instead_of)
            else:
                chat.take_back_question()
            self._finish(chat, turn, error)

        self._start(
            chat,
            lambda llm, job: self._turns.answer(llm, job, state, messages, lambda *told: self._emit(piece, *told)),
            done,
        )

    def _save(self, chat: Chat, path: Path, saved: Callable[[int], None], failed: Callable[[Exception], None]) -> None:
        state, extra = chat.state, chat.to_extra()

        def done(size: Optional[int], error: Optional[Exception]) -> None:
            if path == chat.kept and error is None:
                chat.changed = False
            self._finish(chat)
            if error is not None:
                failed(error)
            elif size is not None:
                saved(size)

        self._start(chat, lambda llm, job: self._turns.save(llm, job, state, path, extra), done)

    def _open(self, path: Path, kept: Optional[Path]) -> None:
        def done(opened: Optional[tuple[Turn, Any]], error: Optional[Exception]) -> None:
            if opened is None:
                self._fail(error)
                return
            turn, extra = opened
            try:
                chat = Chat.from_extra(extra)
            except ValueError as unknown:
                self._view.tell(f"{path.name}: {unknown}", error=True)
                return
            chat.state, chat.stats, chat.kept, chat.changed = turn.state, turn.stats, kept, kept is None
            self._add(chat)

        self._worker.submit(Job(lambda llm, job: self._turns.open(llm, path), done))

    def _start(self, chat: Chat, work: Callable[[Llama, Job], Any], done: Callable[[Any, Optional[Exception]], None]) -> None:
        def progress(done: int, total: int) -> None:
            if chat in self.chats:
                self._view.progress(chat, done, total)

        self._given_up.discard(chat)
        chat.job = Job(work, done, progress)
        self._view.show(chat)
        self._worker.submit(chat.job)

    def _finish(self, chat: Chat, turn: Optional[Turn] = None, error: Optional[Exception] = None) -> None:
        chat.job = None
        if turn is not None:
            chat.state, chat.stats = turn.state, turn.stats
        self._fail(error)
        if chat in self.chats:
            self._view.show(chat)

    def _go_on_closing(self) -> None:
        changed = [chat for chat in self.chats if chat.changed and chat not in self._given_up]
        if changed and not self._without_model:
            for chat in changed:
                self._keep(chat)
        elif self._worker.alive:
            self._worker.close()
        elif self._events.empty():
            self._view.closed()

    def _keep(self, chat: Chat) -> None:
        """Saves a chat for the next time."""

        def failed(error: Exception) -> None:
            self.closing = False
            self._given_up.add(chat)
            self._view.tell(f"{chat.title} was not saved: {error}. Close once more to leave without it", error=True)

        chat.kept = chat.kept or self._free_name()
        self._save(chat, chat.kept, lambda size: None, failed)

    def _free_name(self) -> Path:
        """Of a file that is neither there nor going to be: one that could not be opened is not overwritten."""
        taken = {chat.kept for chat in self.chats}
        paths = (self._folder / f"{n:03}{SUFFIX}" for n in itertools.count(1))
        return next(path for path in paths if path not in taken and not path.exists())

    def _add(self, chat: Chat) -> Chat:
        self.chats.append(chat)
        self._view.added(chat)
        self._view.show(chat)
        return chat

    def _two_tabs(self) -> None:
        while len(self.chats) < 2:
            self.new()

    def _fail(self, error: Optional[Exception]) -> None:
        if isinstance(error, Cancelled):
            self._view.tell("stopped")
        elif isinstance(error, OSError) and error.filename:
            self._view.tell(f"{Path(error.filename).name}: {error.strerror}", error=True)
        elif error is not None:
            self._view.tell(str(error) or type(error).__name__, error=True)

    def _loaded(self, error: Optional[Exception]) -> None:
        self._without_model = error is not None
        if error is None:
            self._view.tell("ready")
        self._fail(error)

    # in the thread of the worker

    def _emit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._events.put((function, arguments))

    def _warn(self, warning: CacheWarning) -> None:
        self._emit(self._view.tell, str(warning))
