"""A server that runs while a test does, and is asked as a client asks it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from indexmem_edge.native.find import program

SERVER = program("llama-server")


class Server:
    """Asks a server that listens at `port`."""

    def __init__(self, port: int, process: subprocess.Popen[str]) -> None:
        self.port, self.process = port, process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def wait(self, path: str = "/health", seconds: float = 60) -> None:
        """Until it answers at `path`; AssertionError with what it said if it ends before that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                self._reader.join(5)
                raise AssertionError(self.said)
            with contextlib.suppress(OSError):
                if self.ask(path)[0] == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(self.said)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and text of an answer."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    @contextlib.contextmanager
    def stream(self, path: str, body: Any) -> Iterator[Iterator[str]]:
        """The lines of an answer as they come. Leaving it closes the connection."""
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
            yield (line.decode() for line in answer)

    def get(self, path: str) -> Any:
        status, text = self.ask(path)
        assert status in (200, 503), text
        return json.loads(text)

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """A chat completion at temperature 0, its answer and `timings`."""
        body = {"messages": messages, "temperature": 0, "max_tokens": 12, **options}
        status, text = self.ask("/v1/chat/completions", body)
        assert status == 200, text
        return json.loads(text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serving(model: Path, *arguments: Any) -> contextlib.AbstractContextManager[Server]:
    """Runs the server on a model with some more of its arguments."""
    return listening(SERVER, "-m", model, "-t", 1, "-tb", 2, "--no-webui", *arguments)


@contextlib.contextmanager
def listening(
    *command: Any, environment: dict[str, str] | None = None, port: int | None = None, path: str = "/health"
) -> Iterator[Server]:
    """Runs a command that serves at the port that its last option names, or at one that it knows by itself, until `path` answers."""
    words = [str(word) for word in command]
    if port is None:
        port = free_port()
        words += ["--port", str(port)]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={"OMP_WAIT_POLICY": "passive", **(os.environ if environment is None else environment)}, # the machine does something else, too
    )  # fmt: skip
    server = Server(port, process)
    try:
        server.wait(path)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
