"""The first moments of the program, and streams that are not there: no traceback is seen, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge.native import find

pytestmark = [
    pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built"),
    pytest.mark.skipif(os.name != "posix", reason="signals, and streams that shells close"),
]

ROOT = str(Path(indexmem_edge.__file__).parents[1])
ENVIRONMENT = {**os.environ, "PYTHONPATH": ROOT, "INDEXMEM_CHECK": "0"}


@pytest.fixture
def arguments(tiny: Tiny) -> list[str]:
    return ["-m", str(tiny("llama")[0]), "--kv-budget", "160", "-ub", "32", "-t", "1", "-n", "4", "--temp", "0"]


CTRL_C_AT = {
    "import": """
class Finder:
    def find_spec(self, name, *rest):
        if name == "indexmem_edge.cli.app":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
""",
    "loading": """
from indexmem_edge.native import logs
hear = logs._Listener.hear
def talking(*arguments):
    signal.raise_signal(signal.SIGINT)
    hear(*arguments)
logs._Listener.hear = talking
""",
    "end": """
import atexit
atexit.register(signal.raise_signal, signal.SIGINT)
""",
}


@pytest.mark.parametrize("moment", CTRL_C_AT)
def test_ctrl_c_before_there_is_a_chat_and_after_it(arguments: list[str], moment: str) -> None:
    code = f"import signal, sys\n{CTRL_C_AT[moment]}\nfrom indexmem_edge.cli.start import main\nmain()"
    result = subprocess.run(
        [sys.executable, "-c", code, "chat", "-q", *arguments], input="", capture_output=True, text=True, env=ENVIRONMENT, timeout=100
    )
    assert result.returncode == -signal.SIGINT and result.stderr == "" == result.stdout


def test_ctrl_c_while_the_library_talks_is_heard_when_it_has_done_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """In the callback that listens, Python would drop it, and print a traceback."""
    from indexmem_edge.native import logs

    hear = logs._Listener.hear
    lines: list[bytes] = []

    def hearing(listener: Any, level: int, text: bytes) -> None:
        lines.append(text)
        if len(lines) == 3:
            signal.raise_signal(signal.SIGINT)
        hear(listener, level, text)

    monkeypatch.setattr(logs._Listener, "hear", hearing)
    with pytest.raises(KeyboardInterrupt):
        indexmem_edge.Llama(tiny("llama")[0], kv_budget=160, n_ubatch=32, verbose=False)
    assert len(lines) > 3 and capfd.readouterr().err == "" and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def shell(command: str, arguments: list[str], redirected: str) -> subprocess.CompletedProcess[str]:
    words = " ".join([sys.executable, "-m", "indexmem_edge", command, *arguments, redirected])
    return subprocess.run(words, shell=True, input="Hello\nAgain\n", capture_output=True, text=True, env=ENVIRONMENT, timeout=100)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(arguments: list[str], tmp_path: Path, closed: str) -> None:
    path = tmp_path / "talk.imsess"
    result = shell("chat", [*arguments, "--session", str(path)], closed)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert path.exists() is ("<&-" not in closed)  # without input nothing is said
    again = shell("chat", [*arguments, "--session", str(path)], "")
    assert again.returncode == 0 and ("goes on after" in again.stderr) is ("<&-" not in closed)  # nothing else is in the file


def test_a_chat_whose_reader_has_left(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "talk.imsess"
    result = shell("chat", [*arguments, "-q", "--session", str(path)], "| head -n 0")
    assert result.returncode == 0 and result.stderr.count("error") == 0
