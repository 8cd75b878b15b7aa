"""A server that runs while it is measured, and is asked as a client asks it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from indexmem_edge.errors import IndexMemError

from ..machine import rss_of

Message = dict[str, Any]
_START = 120.0  # seconds until a server has to answer


class ServerError(IndexMemError):
    """A server does not start, or refuses what it is asked."""


@dataclass(frozen=True)
class Kind:
    """A server that is measured: a program and its options beside model, port and threads."""

    name: str
    program: Path
    options: tuple[str, ...] = ()
    context: int = 0  # tokens that each conversation may have where the cache grows with them

    def with_slots(self, n: int) -> Kind:
        """The same with `n` conversations at once."""
        room = ("-c", str(self.context * n)) if self.context else ()
        return replace(self, options=(*self.options, "-np", str(n), *room))


@dataclass(frozen=True)
class Answer:
    """An answer as it came.

    Attributes:
        text: the answer.
        evaluated: tokens of the prompt that were evaluated.
        cached: tokens of the prompt that were there already.
        generated: tokens of the answer.
        first: seconds until its first token.
        seconds: until its end.
    """

    text: str
    evaluated: int
    cached: int
    generated: int
    first: float
    seconds: float


class Running:
    """A server that listens at `port`."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid

    def chat(
        self, messages: Sequence[Message], n: int, seed: int = 0, slot: Optional[int] = None, temperature: Optional[float] = None
    ) -> Answer:
        """An answer of at most `n` tokens, streamed. Safe to call from several threads.

        Raises:
            ServerError: the server refuses, or ends.
        """
        body: dict[str, Any] = {"messages": list(messages), "max_tokens": n, "seed": seed, "stream": True, "timings_per_token": True}
        if slot is not None:
            body["id_slot"] = slot
        if temperature is not None:
            body["temperature"] = temperature
        started, first = time.perf_counter(), 0.0
        pieces: list[str] = []
        timings: dict[str, Any] = {}
        with self._post("/v1/chat/completions", body) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ServerError(f"the server at port {self.port} answered {event['error']}")
                timings = event.get("timings", timings)
                piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if piece:
                    first = first or time.perf_counter() - started
                    pieces.append(piece)
        seconds = time.perf_counter() - started
        evaluated, cached, generated = (int(timings.get(key, 0)) for key in ("prompt_n", "cache_n", "predicted_n"))
        return Answer("".join(pieces), evaluated, cached, generated, first or seconds, seconds)

    def slot(self, slot: int, action: str, file: str) -> None:
        """Saves or restores what a slot has, in the server's folder.

        Raises:
            ServerError: it cannot.
        """
        with self._post(f"/slots/{slot}?action={action}", {"filename": file}) as response:
            response.read()

    def get(self, path: str) -> Any:
        """What the server says at a path."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())

    @property
    def rss_bytes(self) -> int:
        """Resident memory; 0 where there is no /proc."""
        return rss_of(self.pid) or 0

    @contextlib.contextmanager
    def _post(self, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            try:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                if response.status != 200:
                    raise ServerError(f"the server at port {self.port} answered {response.status}: {response.read()[:200]!r}")
                yield response
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"the server at port {self.port} is gone: {error!r}") from error


@contextlib.contextmanager
def running(kind: Kind, model: Path, threads: int) -> Iterator[Running]:
    """Runs a server until the end of the block.

    Raises:
        ServerError: it does not start; with what it said last.
    """
    port = _free_port()
    command = [kind.program, "-m", model, "--port", port, "-t", threads, "--no-webui", *kind.options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=subprocess.STDOUT)
        try:
            server = Running(port, process.pid)
            _wait(server, process, kind, log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Running, process: subprocess.Popen[bytes], kind: Kind, log: Any) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            if server.get("/health").get("status") == "ok":
                return
        time.sleep(0.05)
    log.seek(max(0, log.seek(0, os.SEEK_END) - 500))
    raise ServerError(f"{kind.program} does not start ({kind.name}): {log.read().decode(errors='replace')}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
