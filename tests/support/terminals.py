"""A person at a terminal of any size: programs run in a pseudo terminal, whose screen is there to be read."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pyte

import indexmem_edge

PATIENCE = 30.0  # seconds, until a test that waits for something gives up
ENTER, ALT_ENTER, TAB, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\t", "\x1b[A", "\x03", "\x04"


def pasted(text: str) -> str:
    """What a terminal sends when this is pasted into it."""
    return f"\x1b[200~{text}\x1b[201~"


class _Screen(pyte.HistoryScreen):
    """Answers questions of the program, as terminals do."""

    answer: Callable[[str], None]

    def write_process_input(self, data: str) -> None:
        self.answer(data)


class Person:
    """Somebody at a terminal in which a program runs."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int, columns: int, rows: int) -> None:
        self._process = process
        self._terminal = terminal
        self._screen = _Screen(columns, rows, history=2000)
        self._screen.answer = self.type
        self._stream = pyte.ByteStream(self._screen)
        self._changed = threading.Condition()
        self._ended = False
        self.raw = b""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                data = os.read(self._terminal, 65536)
            except OSError:
                data = b""
            with self._changed:
                self.raw += data
                self._ended = not data
                self._stream.feed(data)
                self._changed.notify_all()
            if not data:
                return

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self._terminal, text.encode())

    def signal(self, number: int) -> None:
        """What others send to the program: the system when it shuts down, a terminal that is closed."""
        self._process.send_signal(number)

    def resize(self, columns: int, rows: int) -> None:
        """Makes the terminal another size."""
        with self._changed:
            self._screen.resize(rows, columns)
        _set_size(self._terminal, columns, rows)

    @property
    def sees_what_is_typed(self) -> bool:
        """Whether the terminal is as a shell wants it: it echoes, and hands over lines."""
        import termios

        modes = termios.tcgetattr(self._terminal)[3]
        return modes & termios.ECHO != 0 and modes & termios.ICANON != 0

    @property
    def screen(self) -> str:
        """All that was and is to be seen, its lines as they are broken."""
        width = self._screen.columns
        gone = ["".join(line[x].data for x in range(width)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in (*gone, *self._screen.display)).rstrip()

    @property
    def lines(self) -> list[str]:
        return self.screen.splitlines()

    def wait_for(self, wanted: str | Callable[[str], Any]) -> str:
        """Waits until a text is on the screen, or a condition on the screen is true; returns the screen."""
        found = (lambda: wanted in self._flat()) if isinstance(wanted, str) else (lambda: wanted(self.screen))
        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, PATIENCE)
            assert found(), f"waited for {wanted!r}, found:\n{self.screen}"
            return self.screen

    def _flat(self) -> str:
        """Without the breaks of lines, which stand where the terminal ends."""
        return " ".join(self.screen.split())

    def prompted(self, times: int) -> str:
        """Waits for so many prompts, the last of which is empty."""
        prompts = lambda screen: [line for line in screen.splitlines() if line.startswith(">")]  # noqa: E731
        return self.wait_for(lambda screen: len(prompts(screen)) >= times and screen.splitlines()[-1].rstrip() == ">")

    def ends(self) -> int:
        """Waits for the end of the program; returns its exit status."""
        status = self._process.wait(PATIENCE)
        with self._changed:
            self._changed.wait_for(lambda: self._ended, PATIENCE)
        return status


def _set_size(terminal: int, columns: int, rows: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@contextlib.contextmanager
def person_at(
    *arguments: str, home: Path, columns: int = 100, rows: int = 40, stdout: Optional[Path] = None, **environment: str
) -> Iterator[Person]:
    """Somebody who runs `indexmem` with some arguments, and whose files are in the folder `home`.

    Args:
        stdout: a file that gets standard output.
    """
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    _set_size(theirs, columns, rows)
    root = str(Path(indexmem_edge.__file__).parents[1])
    mine = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONUTF8")}
    mine |= {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "XDG_STATE_HOME": str(home / "state"), "INDEXMEM_CHECK": "0"}
    mine["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    output = theirs if stdout is None else os.open(stdout, os.O_CREAT | os.O_WRONLY)
    process = subprocess.Popen(
        [sys.executable, "-m", "indexmem_edge", *arguments],
        stdin=theirs, stdout=output, stderr=theirs, cwd=home, env={**mine, **environment}, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    for handle in {theirs, output}:
        os.close(handle)
    person = Person(process, ours, columns, rows)
    try:
        yield person
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)
