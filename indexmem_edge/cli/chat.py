"""A chat in the terminal that never outgrows its KV cache."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

from ..errors import CacheWarning, Cancelled, IndexMemError, SessionError
from ..files.textfile import read_text
from ..llama import Llama
from ..sessions import file as sessionfile
from .interrupt import ctrl_c_cancels
from .options import RunOptions, describe
from .terminal import LEAVE, ProgressBar, Terminal

Message = dict[str, Any]

HELP = f"""\
/stats       what the KV cache has seen, kept and dropped
/reset       forget the conversation
/save FILE   save the conversation, KV cache included
/load FILE   continue a saved conversation; only what is new will be evaluated
/read FILE   read a text file into the conversation now; ask about it afterwards
/help        this list
/exit        leave ({LEAVE}, too); Ctrl-C stops an answer"""


class Chat:
    """One conversation: its messages, the commands, and what the person is told about the cache."""

    def __init__(self, llm: Llama, options: RunOptions) -> None:
        self._llm = llm
        self._options = options
        self._terminal = Terminal(options.as_json)
        self._messages: list[Message] = []
        self._document = ""  # read, but not asked about yet: the beginning of the next message
        self._warnings: list[CacheWarning] = []  # said after the answer
        llm.kv_warn = self._warnings.append
        self._failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/stats": self._stats,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/read": self._read,
            "/help": lambda _: self._terminal.say(HELP),
        }
        self._start_over()

    def run(self) -> int:
        """Answers until the input ends; returns the exit status: 1 if a line of a program's input failed."""
        self._terminal.say_to_person(self._greeting())
        while True:
            line = self._terminal.read_line()
            if line is None or line in ("/exit", "/quit"):
                break
            if line:
                self._handle(line)
        return 1 if self._failed and not self._terminal.interactive else 0

    def _greeting(self) -> str:
        stats = self._llm.kv_stats()
        cache = f"KV cache {stats.policy}" + (f" ({stats.indexer})" if stats.indexer else "")
        cache += f", budget {stats.budget:,}" if stats.budget else ""
        cache += f", memory {stats.memory}" if stats.remembers else ""
        return f"{os.path.basename(self._llm.model_path)} · {cache} · /help lists the commands, {LEAVE}"

    def _handle(self, line: str) -> None:
        try:
            if line.startswith("/"):
                name, _, argument = line.partition(" ")
                command = self._commands.get(name)
                if command is None:
                    raise IndexMemError(f"unknown command {name}: {', '.join(self._commands)}, /exit")
                command(argument.strip())
            else:
                self._answer(line)
        except KeyboardInterrupt:
            self._terminal.note("stopped")
        except (IndexMemError, ValueError, RuntimeError, OSError, MemoryError) as error:
            if os.environ.get("INDEXMEM_DEBUG") == "1":
                raise
            self._failed = True
            self._terminal.error(describe(error))

    # answers

    def _answer(self, question: str) -> None:
        content = f"{self._document}\n\n{question}" if self._document else question
        messages = [*self._messages, {"role": "user", "content": content}]
        text: list[str] = []
        finish: Optional[str] = None
        first = 0.0
        try:
            for chunk in self._chunks(messages):
                choice = chunk["choices"][0]
                finish = choice["finish_reason"] or finish
                piece = choice["delta"].get("content")
                if piece:
                    first = first or time.perf_counter()
                    text.append(piece)
                    self._terminal.stream(piece)
        except KeyboardInterrupt:
            finish = "stopped"
        except Cancelled:  # before the first word: nothing has happened
            finish = "stopped"
            text.clear()
        finally:
            self._terminal.end_stream(bool(text))
            if text or finish == "stop":  # an answer cut short is part of the conversation; no answer is not
                self._messages = [*messages, {"role": "assistant", "content": "".join(text)}]
                self._document = ""
        if finish == "stopped":
            self._terminal.note("stopped")
        elif finish == "length":
            self._terminal.note(self._options.why_cut(self._llm.kv_stats()))
        self._account("".join(text), finish, time.perf_counter() - first if first else 0.0)

    def _chunks(self, messages: list[Message]) -> Iterator[Any]:
        """The answer as it comes. The first piece comes when all that is new has been read, which may take long."""
        with ctrl_c_cancels(self._llm):
            chunks = self._llm.create_chat_completion(messages, stream=True, **self._options.sampling())
            first = next(chunks)
        yield first
        yield from chunks

    def _account(self, text: str, finish: Optional[str], seconds: float) -> None:
        stats = self._llm.kv_stats()
        speed = stats.turn_generated / seconds if seconds > 0 else 0.0
        if self._options.as_json:
            answer = {"answer": text, "finish_reason": finish, **self._options.cut_by(finish, stats), "tokens_per_second": round(speed, 2)}
            self._terminal.write(json.dumps({**answer, "stats": stats.to_dict()}))
        self._tell()
        self._terminal.footer(stats.line() + (f" · {speed:.0f} tok/s" if speed else ""))

    def _tell(self) -> None:
        """Nothing is dropped silently."""
        for warning in self._warnings:
            self._terminal.note(str(warning))
        self._warnings.clear()

    # commands

    def _start_over(self) -> None:
        system = self._options.system
        self._messages = [{"role": "system", "content": system}] if system is not None else []
        self._document = ""

    def _stats(self, _: str) -> None:
        stats = self._llm.kv_stats()
        self._terminal.say(json.dumps({"stats": stats.to_dict()}) if self._options.as_json else str(stats))

    def _reset(self, _: str) -> None:
        self._llm.reset()
        self._start_over()
        self._terminal.note("the conversation is forgotten")

    def _save(self, argument: str) -> None:
        path = _path("/save", argument)
        size = self._llm.save_session(path, extra={"messages": self._messages, "document": self._document})
        self._terminal.note(f"saved {self._llm.n_tokens:,} tokens in {path} ({size / 1e6:.1f} MB)")

    def _load(self, argument: str) -> None:
        path = _path("/load", argument)
        extra = sessionfile.read(path).extra
        messages = extra.get("messages") if isinstance(extra, dict) else None
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            raise SessionError(f"{path} was not saved by a chat: it has no messages")
        self._llm.load_session(path)
        self._start_over()
        self._messages, self._document = messages, str(extra.get("document") or "")
        self._terminal.note(f"continuing after {self._llm.n_tokens:,} tokens, {len(messages)} messages")
        if messages and messages[-1]["role"] == "assistant":
            self._terminal.say_to_person(messages[-1]["content"])

    def _read(self, argument: str) -> None:
        path = _path("/read", argument)
        text = read_text(path).strip()
        if not text:
            raise IndexMemError(f"{path} is empty")
        document = f"Document {os.path.basename(path)}:\n\n{text}"
        document = f"{self._document}\n\n{document}" if self._document else document
        started = time.perf_counter()
        with ProgressBar(f"reading {os.path.basename(path)}", self._terminal) as bar:
            try:
                with ctrl_c_cancels(self._llm):
                    n = self._llm.prefill_chat([*self._messages, {"role": "user", "content": document}], bar.update)
            except (Cancelled, KeyboardInterrupt):
                raise IndexMemError(f"stopped: {path} was not added to the conversation") from None
        self._document = document
        seconds = time.perf_counter() - started
        self._terminal.note(f"read {n:,} tokens in {seconds:.1f} s; now ask about them")
        stats = self._llm.kv_stats()
        self._tell()
        self._terminal.footer(stats.line())


def _path(command: str, argument: str) -> str:
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "\"'":
        argument = argument[1:-1]
    if not argument:
        raise IndexMemError(f"{command} needs a file: {command} FILE")
    return str(Path(argument).expanduser())


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
