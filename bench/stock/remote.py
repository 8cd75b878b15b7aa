"""A system that lives in a worker's process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from indexmem_edge.native.find import LIB_PATH_VARIABLE

from ..runner import BenchError, Setup

SLICE = 4096  # tokens of one request, so that progress can be shown
# with the modules that this process has, wherever it was started
START = f"import sys; sys.path[:] = {{path!r}}; from {__package__}.worker import serve; serve(sys.stdin, sys.stdout)"


class Remote:
    """A system under test in a process of its own.

    Args:
        library: folder of the libraries to load; None: ours.
        shift: the stock cache with llama.cpp's context shift, of `setup.n_ctx` cells.
    """

    def __init__(self, name: str, model: Path, setup: Setup, *, library: Path | None, shift: bool, text: Path | None):
        self.name, self.setup, self.seen = name, setup, 0
        environment = dict(os.environ)
        if library is not None:
            environment[LIB_PATH_VARIABLE] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, "-c", START.format(path=sys.path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        values = dataclasses.asdict(setup)
        values["sidecar"] = os.path.abspath(setup.sidecar) if setup.sidecar else None
        try:
            opened = self._ask(
                "open", model=str(model.resolve()), setup=values, shift=shift, text=str(text.resolve()) if text else None
            )
        except BaseException:
            self.close()
            raise
        self.library, self.can_copy = str(opened["library"]), bool(opened["can_copy"])

    def fill(self, depth: int, advance: Callable[[int], None] = lambda n: None) -> float:
        """Reads on up to a depth; seconds. `advance` is told how many tokens were read."""
        seconds = 0.0
        while self.seen < depth:
            n = min(SLICE, depth - self.seen)
            seconds += self.feed(n)
            advance(n)
        return seconds

    def feed(self, n: int) -> float:
        seconds = float(self._ask("feed", n=n)["seconds"])
        self.seen += n
        return seconds

    def copy(self, depth: int) -> None:
        """Fills its cache up to a depth with copies of what it has read."""
        self.seen = int(self._ask("copies", to=depth)["seen"])

    def decode(self, n: int) -> float:
        """Tokens per second of `n` greedy steps."""
        seconds = float(self._ask("decode", n=n)["seconds"])
        self.seen += n
        return n / seconds

    def go_back(self, depth: int) -> None:
        """To where it was, if its cache can do that exactly; else what it has read counts as seen."""
        self.seen = int(self._ask("rollback", to=depth)["seen"])

    def figures(self) -> dict[str, Any]:
        return self._ask("figures")

    def close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, do: str, **values: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(f"{self.name}: its process ended with {self._process.wait()} when it was asked to {do}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer
