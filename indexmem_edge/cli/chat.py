"""A chat in the terminal that never outgrows its KV cache."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from ..errors import Cancelled, IndexMemError, SessionError
from ..files.textfile import read_text
from ..llama import Llama
from ..sessions.info import SessionInfo
from ..stats import format_bytes
from .answers import cut_by, pieces, why_cut
from .branches import Branches, Content, Copies, content_of, extra_of
from .cache_notes import CacheNotes
from .commands import AGAIN, AS_BACKGROUND, help_text, load_options, parse
from .conversation import Conversation, messages_of_json
from .interrupt import Leave, asked_to_leave, ctrl_c_cancels
from .keeping import Keeper
from .options import RunOptions, describe
from .reading import Reader, reader
from .sampling import AnswerOptions
from .streams import reader_left
from .terminal import Terminal


class Chat:
    """One conversation: its messages, the commands, and what the person is told about the cache."""

    def __init__(
        self, llm: Llama, options: RunOptions, form: Optional[AnswerOptions] = None, keep_history: bool = True,
        keeper: Optional[Keeper] = None,
    ) -> None:  # fmt: skip
        form = form or AnswerOptions()
        self._llm = llm
        self._options = options
        self._form = form.keywords()
        self._terminal = Terminal(options.as_json, form.quiet)
        self._reader: Reader = reader(self._terminal.interactive, keep_history, lambda: list(self._branches))
        self._notes = CacheNotes(self._terminal, llm)
        self._conversation = Conversation(options.system)
        self._branches = Branches()
        self._copies = Copies(llm)
        self._keeper = keeper
        self._again = 0  # answers to the last question so far, without the first
        self._failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/stats": self._stats,
            "/regen": self._regenerate,
            "/edit": self._edit,
            "/undo": self._undo,
            "/system": self._system,
            "/reset": self._reset,
            "/branch": self._branch,
            "/save": self._save,
            "/load": self._load,
            "/read": self._read,
            "/help": lambda _: self._terminal.say(help_text(self._reader.leave)),
        }

    def run(self) -> int:
        """Answers until the input ends; returns the exit status: 1 if a line of a program's input failed, or the conversation
        could not be kept.

        Raises:
            SessionError: the file that it should go on with is refused.
            Leave: the program was asked to end.
        """
        self._terminal.say_to_person(self._greeting())
        if self._keeper is not None:
            self._go_on(self._keeper)
        with asked_to_leave() as leaving:
            try:
                while leaving.status is None and self._next():
                    pass
            except OSError:
                if leaving.status is None:  # else it is because the terminal is gone
                    raise
            finally:
                kept = self._keeper is None or self._keeper.finish()
        if not kept and self._keeper is not None:
            self._terminal.error(self._keeper.problem)
        if leaving.status is not None:
            raise Leave(leaving.status)
        return 1 if not kept or (self._failed and not self._terminal.interactive) else 0

    def _next(self) -> bool:
        """Reads and does one thing; returns False at the end."""
        try:
            entry = self._reader.read()
            return entry is not None and self._handle(entry)
        except KeyboardInterrupt:  # between two things, where there is nothing to stop
            if not self._terminal.interactive:
                raise
            return True

    def _go_on(self, keeper: Keeper) -> None:
        """Where the file of the conversation ends."""
        content = keeper.start(self._llm, self._terminal.note)
        if content is None:
            return
        self._conversation, self._branches = content
        asked = self._options.system
        where = f"{keeper.path} goes on after {self._llm.n_tokens:,} tokens: {self._conversation.summary}"
        if asked is not None and asked != self._conversation.system:
            self._conversation = self._conversation.with_system(asked)
            where += "; with another system prompt, so it is read again"
        if not self._terminal.quiet:
            self._terminal.note(where)
        self._notes.tell()

    def _greeting(self) -> str:
        stats = self._llm.kv_stats()
        cache = f"KV cache {stats.policy}" + (f" ({stats.indexer})" if stats.indexer else "")
        cache += f", budget {stats.budget:,}" if stats.budget else ""
        cache += f", memory {stats.memory}" if stats.remembers else ""
        return f"{os.path.basename(self._llm.model_path)} · {cache} · /help lists the commands, {self._reader.leave}"

    def _handle(self, entry: str) -> bool:
        """Does what was typed; returns False if that was to leave."""
        try:
            if self._keeper is not None:
                self._keeper.before_change()
            if self._options.as_json and entry[:1] in ("{", "["):
                self._add(self._conversation.added(messages_of_json(entry)))
                return True
            command, text = parse(entry)
            if command == "/exit":
                return False
            if command is not None:
                self._commands[command](text)
            elif text:
                self._add(self._conversation.asked(text))
        except KeyboardInterrupt:
            self._terminal.note("stopped")
        except (IndexMemError, ValueError, RuntimeError, OSError, MemoryError) as error:
            if os.environ.get("INDEXMEM_DEBUG") == "1" or reader_left(error):
                raise
            self._failed = True
            self._terminal.error(describe(error))
        finally:
            if self._keeper is not None:
                self._keeper.at_rest((self._conversation, self._branches))
        return True

    # answers

    def _add(self, conversation: Conversation) -> None:
        """Goes on with what has been added, and answers if a question is at its end."""
        self._again = 0
        if conversation.is_open:
            self._answer(conversation)
        else:
            self._conversation = conversation

    def _answer(self, conversation: Conversation) -> None:
        """Answers the question at the end. Without a word of an answer the chat stays as it was."""
        text: list[str] = []
        finish: Optional[str] = None
        first = 0.0
        bar = self._terminal.bar("reading")
        sampling = {**self._options.sampling(), **self._form}
        if self._options.seed >= 0:
            sampling["seed"] += self._again  # another answer, and the same one in the next run

        def begin() -> Any:
            messages: Any = conversation.messages
            return self._llm.create_chat_completion(messages, stream=True, **sampling)

        try:
            for piece, reason in pieces(self._llm, begin, self._options.predict, bar):
                finish = reason or finish
                if piece:
                    first = first or time.perf_counter()
                    text.append(piece)
                    self._terminal.stream(piece)
        except KeyboardInterrupt:
            finish = "stopped"
        except Cancelled:  # nothing has happened
            finish = "taken back"
        finally:
            shown = bool(text)
            if finish == "taken back":
                text.clear()
            if text or finish == "stop" or (finish and self._options.predict == 0):  # also of an answer that is cut short
                self._conversation = conversation.answered("".join(text))
            self._terminal.end_stream(shown)  # last, because it fails where the terminal is gone
        if finish == "taken back":
            self._terminal.note("stopped before there was an answer: the message is taken back")
        elif finish == "stopped":
            self._terminal.note("stopped")
        elif finish == "length" and self._options.predict != 0:
            self._terminal.note(why_cut(self._llm.kv_stats(), self._options.predict))
        seconds = time.perf_counter() - first if first else 0.0
        self._account("".join(text), "stopped" if finish == "taken back" else finish, seconds)

    def _account(self, text: str, finish: Optional[str], seconds: float) -> None:
        stats = self._llm.kv_stats()
        speed = stats.turn_generated / seconds if seconds > 0 else 0.0
        if self._options.as_json:
            answer = {"answer": text, "finish_reason": finish, **cut_by(finish, stats, self._options.predict), "tokens_per_second": round(speed, 2)}
            self._terminal.write(json.dumps({**answer, "stats": stats.to_dict()}))
        self._notes.tell()
        self._terminal.footer(stats.line() + (f" · {speed:.0f} tok/s" if speed else ""))

    # commands

    def _regenerate(self, _: str) -> None:
        conversation = self._conversation.unanswered()
        if self._options.temp == 0:
            self._terminal.note("with --temp 0 the answer is always the same")
        self._again += 1
        self._answer(conversation)

    def _edit(self, text: str) -> None:
        question = self._conversation.question
        if not text:
            if not self._terminal.interactive:
                raise IndexMemError("/edit needs the new question here: /edit TEXT")
            text = self._reader.read(question) or ""
            if not text:
                self._terminal.note("nothing was changed")
                return
        self._add(self._conversation.edited(text))

    def _undo(self, _: str) -> None:
        before, self._conversation, self._again = self._conversation, self._conversation.undone(), 0
        what = "the last document is" if self._conversation.turns == before.turns else "the last question and its answer are"
        self._terminal.note(f"{what} taken back; {len(self._conversation.turns):,} messages are left")

    def _system(self, text: str) -> None:
        if not text:
            self._terminal.say(self._conversation.system or "there is no system prompt")
            return
        self._conversation = self._conversation.with_system(text)
        n = self._llm.n_tokens if self._conversation.turns else 0
        cost = f": with the next message the conversation is evaluated again, about {n:,} tokens" if n else ""
        self._terminal.note(f"the system prompt is set{cost}")

    def _stats(self, _: str) -> None:
        stats = self._llm.kv_stats()
        self._terminal.say(json.dumps({"stats": stats.to_dict()}) if self._options.as_json else str(stats))

    def _reset(self, _: str) -> None:
        self._llm.reset()
        others = len(self._branches.left)
        self._begin(Conversation(self._conversation.system), Branches())
        branches = ", with its other branch" if others == 1 else f", with its {others} other branches" if others else ""
        self._terminal.note(f"the conversation is forgotten{branches}")

    def _begin(self, conversation: Conversation, branches: Branches) -> None:
        """Another one takes the place of this one."""
        self._conversation, self._branches, self._again = conversation, branches, 0
        self._copies.clear()

    def _branch(self, argument: str) -> None:
        if not argument:
            self._list_branches()
            return
        option, _, rest = argument.partition(" ")
        if option == "-d":
            name = rest.strip()
            self._branches = self._branches.without(name)
            self._copies.drop(name)
            self._terminal.note(f"the branch {name} is forgotten")
        elif argument == self._branches.current:
            self._terminal.note(f"the chat is on {argument} already")
        elif argument in self._branches:
            self._go_to_branch(argument)
        else:
            self._branches = self._branches.begun(argument, self._conversation)
            self._copies.take(argument)
            self._terminal.note(f"this point is {argument} now, and /branch {argument} comes back to it; the chat goes on, on {self._branches.current}")

    def _go_to_branch(self, name: str) -> None:
        conversation, here = self._branches.left[name], self._branches.current
        self._copies.go_to(name, here)
        self._branches = self._branches.gone_to(name, self._conversation)
        self._conversation, self._again = conversation, 0
        self._terminal.note(f"on {name} now, {here} stays as it is: {conversation.summary}")
        self._show_answer()

    def _list_branches(self) -> None:
        branches = {name: self._branches.left.get(name, self._conversation) for name in self._branches}
        current = self._branches.current
        if self._options.as_json:
            listed = [{"name": name, "current": name == current, "messages": len(c.messages)} for name, c in branches.items()]
            self._terminal.say(json.dumps({"branches": listed}))
            return
        width = max(map(len, branches))
        for name, conversation in branches.items():
            self._terminal.say(f"{'*' if name == current else ' '} {name:<{width}}  {conversation.summary}")
        if self._copies.nbytes:
            self._terminal.footer(f"copies of the KV cache at their ends: {format_bytes(self._copies.nbytes)}")

    def _save(self, argument: str) -> None:
        path = _path(argument)
        size = self._llm.save_session(path, extra=extra_of((self._conversation, self._branches)))
        self._terminal.note(f"saved {self._llm.n_tokens:,} tokens in {path} ({format_bytes(size)})")

    def _load(self, argument: str) -> None:
        file, options = load_options(argument)
        path, as_background = _path(file), AS_BACKGROUND in options
        content: Optional[Content] = (Conversation(self._conversation.system), Branches())
        if not as_background:
            content = content_of(SessionInfo.read(path).extra)
        if content is None:
            raise SessionError(f"{path} was not saved by a chat: it has no messages")
        conversation, branches = content
        try:
            with self._terminal.bar(f"reading {os.path.basename(path)}") as bar, ctrl_c_cancels(self._llm), self._llm.watch(bar.update):
                self._llm.load_session(path, as_background=as_background, again=AGAIN in options)
        except (Cancelled, KeyboardInterrupt):
            raise IndexMemError(f"stopped: {path} was not loaded") from None
        self._begin(conversation, branches)
        n, kept = self._llm.n_tokens, f"; {self._keeper.path} has this conversation from now on" if self._keeper is not None else ""
        if as_background:
            self._terminal.note(f"a new conversation begins, which knows what is kept of {path} ({n:,} tokens), until /reset{kept}")
        else:
            self._terminal.note(f"continuing after {n:,} tokens, {len(conversation.messages)} messages{kept}")
        self._notes.tell()
        self._show_answer()

    def _show_answer(self) -> None:
        """The last one, to a person who has come back to it."""
        messages = self._conversation.messages
        if messages and messages[-1]["role"] == "assistant":
            self._terminal.say_to_person(messages[-1]["content"])

    def _read(self, argument: str) -> None:
        path = _path(argument)
        text = read_text(path).strip()
        if not text:
            raise IndexMemError(f"{path} is empty")
        name, size = os.path.basename(path), format_bytes(os.path.getsize(path))
        conversation = self._conversation.read(f"Document {name}:\n\n{text}")
        started = time.perf_counter()
        with self._terminal.bar(f"reading {name}") as bar:
            try:
                with ctrl_c_cancels(self._llm):
                    n = self._llm.prefill_chat(conversation.open_messages, bar.update)
            except (Cancelled, KeyboardInterrupt):
                raise IndexMemError(f"stopped: {path} was not added to the conversation") from None
        self._conversation = conversation
        seconds = time.perf_counter() - started
        self._terminal.note(f"read {n:,} tokens ({size}) in {seconds:.1f} s; now ask about them")
        stats = self._llm.kv_stats()
        self._notes.tell()
        self._terminal.footer(stats.line())


def _path(argument: str) -> str:
    if len(argument) > 2 and argument[0] == argument[-1] and argument[0] in "\"'":
        argument = argument[1:-1]
    return str(Path(argument).expanduser())
