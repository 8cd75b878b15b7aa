"""A process that holds one system under test and does what it is told: a line of JSON in, a line of JSON out.

A library can be loaded once in a process, so the stock one and ours take a process each; and what a process has held at most is
then the memory of one system.

    {"do": "open", "model": PATH, "setup": {...}, "shift": false, "text": PATH or null}
    {"do": "feed", "n": 512}      {"do": "decode", "n": 32}
    {"do": "copies", "to": 32768}                                {"do": "figures"}
    {"do": "rollback", "to": 8192}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from indexmem_edge.errors import IndexMemError
from indexmem_edge.native.memory import peak_memory, resident_memory

from ..endless.arms import ShiftingSystem
from ..runner import BenchError, Model, Setup, System, library
from ..text import TokenStream, read_text
from .copies import can_copy, fill_with_copies


class Worker:
    def __init__(self) -> None:
        self.system: System | None = None
        self.stream = TokenStream([0])

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What comes back for one request.

        Raises:
            BenchError: the request makes no sense, or the library refuses it.
        """
        do = request.pop("do", None)
        action = getattr(self, f"do_{do}", None) if isinstance(do, str) else None
        if action is None:
            raise BenchError(f"a worker of the bench was asked for {do!r}, which it does not know")
        answer: dict[str, Any] = action(**request)
        return answer

    def do_open(self, model: str, setup: dict[str, Any], shift: bool, text: str | None) -> dict[str, Any]:
        sidecar = setup.pop("sidecar", None)
        loaded = Model(Path(model))
        wanted = Setup(**setup, sidecar=sidecar)
        self.system = (ShiftingSystem if shift else System)(loaded, wanted)
        self.stream = TokenStream(loaded.tokens(read_text(Path(text) if text else None)))
        return {"library": library(), "can_copy": can_copy(self.system)}

    def do_feed(self, n: int) -> dict[str, Any]:
        times = self._open.feed(self._next(n), last_logits=True)
        return {"seconds": sum(seconds for _, seconds in times)}

    def do_decode(self, n: int) -> dict[str, Any]:
        return {"seconds": sum(self._open.decode(n, self._next(1)[0]))}

    def do_copies(self, to: int) -> dict[str, Any]:
        fill_with_copies(self._open, to)
        return {"seen": self._open.seen}

    def do_rollback(self, to: int) -> dict[str, Any]:
        done = self._open.rollback(to)
        return {"done": done, "seen": self._open.seen}

    def do_figures(self) -> dict[str, Any]:
        system = self._open
        return {"seen": system.seen, "rss_bytes": resident_memory(), "peak_bytes": peak_memory(), **system.byte_counts()}

    @property
    def _open(self) -> System:
        if self.system is None:
            raise BenchError("a worker of the bench has to open a model first")
        return self.system

    def _next(self, n: int) -> list[int]:
        """The text goes on where the system is, so that all systems read the same."""
        self.stream.next = self._open.seen
        return self.stream.take(n)


def serve(lines: TextIO, out: TextIO) -> None:
    worker = Worker()
    for line in lines:
        try:
            answer = worker.answer(json.loads(line))
        except IndexMemError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=out, flush=True)
