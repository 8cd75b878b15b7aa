"""What differs on Windows and macOS, and in locales other than UTF-8, as far as it can be tried here."""

from __future__ import annotations

import ast
import ctypes
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any, Optional

import pytest

import indexmem_edge
from indexmem_edge.cli import console, streams
from indexmem_edge.files.modelfile import NativePath, check_model_file, gguf_strings, loaded_model
from indexmem_edge.native import find, ggml, memory

ROOT = Path(__file__).resolve().parents[2]
NAME = "модель é 模型 & co.gguf"
needs_library = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

Tiny = Callable[..., tuple[Path, Any]]


# encodings of files

OTHER_OPENS = ("os", "tarfile", "Sidecar", "Sidecars")  # their open() is none of text files


def opens_text(call: ast.Call) -> bool:
    """Whether this call reads or writes a file as text, without an encoding."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name not in ("open", "read_text", "write_text", "fdopen") or any(k.arg == "encoding" for k in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute)  # our own read_text() is a function
    mode = call.args[0:1] if isinstance(call.func, ast.Attribute) and name == "open" else call.args[1:2]
    mode += [k.value for k in call.keywords if k.arg == "mode"]
    if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in OTHER_OPENS:
        return False
    return not any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in mode)


def test_every_text_file_is_opened_with_an_encoding() -> None:
    assert opens_text(ast.parse("open(p)").body[0].value)  # type: ignore[attr-defined]
    assert opens_text(ast.parse("p.open('a')").body[0].value)  # type: ignore[attr-defined]
    assert not opens_text(ast.parse("open(p, 'rb')").body[0].value)  # type: ignore[attr-defined]
    sources = [p for folder in ("indexmem_edge", "bench", "convert", "native") for p in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node)
    ]
    assert not found, "on Windows their encoding would be that of the code page"


# file names


@pytest.fixture
def oddly_named(tiny: Tiny, tmp_path: Path) -> Path:
    path = tmp_path / "a folder" / NAME
    path.parent.mkdir()
    shutil.copy(tiny("llama")[0], path)
    return path


@needs_library
def test_paths_with_spaces_and_any_characters(oddly_named: Path) -> None:
    assert gguf_strings(check_model_file(oddly_named), ["general.architecture"]) == {"general.architecture": "llama"}
    with loaded_model(check_model_file(oddly_named)) as model:
        assert model
    llm = indexmem_edge.Llama(oddly_named, kv_budget=160, n_ubatch=32, verbose=False)
    llm.eval(list(range(1, 60)))
    assert llm.kv_stats().tokens_seen == 59
    session = oddly_named.with_suffix(".imsess")
    llm.save_session(session)
    llm.reset()
    llm.load_session(session)
    assert llm.n_tokens == 59
    llm.close()


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_a_name_that_is_not_text(tiny: Tiny, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.gguf"))
    shutil.copy(tiny("llama")[0], path)
    llm = indexmem_edge.Llama(path, n_ctx=64, verbose=False)
    llm.eval([1, 2, 3])
    assert llm.n_tokens == 3
    llm.close()


def test_native_path_is_what_the_system_calls_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = NativePath("é.gguf")
    assert path == "é.gguf" and path.encode("utf-8") == os.fsencode("é.gguf")
    monkeypatch.setattr(os, "fsencode", lambda name: str.encode(name, "latin-1"))  # LANG=de_DE.ISO-8859-1
    assert path.encode("utf-8") == b"\xe9.gguf"


# consoles


def run(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    root = str(Path(indexmem_edge.__file__).parents[1])  # not the clone, whose package has no libraries in it
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), **environment}
    command = [sys.executable, "-m", "indexmem_edge", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, env=env, cwd=root, timeout=300)


CONSOLES = (
    {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)


@needs_library
@pytest.mark.parametrize("console", CONSOLES, ids=("cp1252", "C"))
def test_commands_on_consoles_without_unicode(oddly_named: Path, console: dict[str, str]) -> None:
    for command in (["--help"], ["chat", "--help"], ["inspect", str(oddly_named)], ["doctor", "-m", str(oddly_named)]):
        done = run(*command, **console)
        assert done.returncode == 0, done.stderr.decode()
        assert b"Traceback" not in done.stderr and done.stdout
    missing = run("inspect", str(oddly_named.parent / "мир.gguf"), **console)
    assert missing.returncode == 1 and missing.stderr.startswith(b"error: ") and missing.stderr.count(b"\n") == 1


@needs_library
def test_an_answer_on_a_console_without_unicode(demo_model: Path) -> None:
    flags = ("generate", "-m", str(demo_model), "--kv-budget", "256", "-n", "8", "-f", "-", "--seed", "1")
    text = "Wiederhole: ☃ ☃ ☃ ☃ ☃ ☃ ☃ ☃ ☃ ☃ ☃ ☃".encode()
    done = run(*flags, stdin=text, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    done.stdout.decode("cp1252")
    asked = (
        run(*flags, "--json", stdin=text, PYTHONIOENCODING=encoding, PYTHONUTF8="0") for encoding in ("cp1252", "utf-8")
    )
    here, there = (json.loads(done.stdout) for done in asked)
    assert here["text"] == there["text"] and here["stats"]["tokens_seen"] == there["stats"]["tokens_seen"]


@needs_library
def test_a_conversation_through_a_pipe_is_utf8(demo_model: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.imsess"
    line = json.dumps({"role": "user", "content": "Say ü and ☃."}, ensure_ascii=False) + "\n"
    flags = ("chat", "-m", str(demo_model), "--kv-budget", "256", "-n", "2", "--json", "--session", str(session))
    done = run(*flags, stdin=b"\xef\xbb\xbf" + line.encode(), PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr.decode()
    kept = run("inspect", str(session), "--json", PYTHONIOENCODING="utf-8")
    assert "Say ü and ☃." in json.dumps(json.loads(kept.stdout), ensure_ascii=False) or "Say ü and ☃." in session.read_bytes().decode("utf-8", "replace")


@pytest.mark.parametrize("encoding, line, other", [("utf-8", "━", "---"), ("cp1252", "---", "━")])
def test_the_bar_is_drawn_with_what_the_console_has(
    encoding: str, line: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = _Console(encoding)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with console.progress(True) as bars:
        bars.add_task("reading", total=10, completed=10)
    assert "reading" in shown.shown and line in shown.shown and other not in shown.shown


class _Console(io.TextIOWrapper):
    """A terminal with an encoding of its own, strict as consoles of Windows are."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.raw_bytes = io.BytesIO()
        super().__init__(self.raw_bytes, encoding=encoding, errors="strict", newline="")

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    @property
    def shown(self) -> str:
        self.flush()
        return self.raw_bytes.getvalue().decode(self.encoding)


def test_an_answer_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    console = _Console("cp1252")
    with pytest.raises(UnicodeEncodeError):
        print("☃", file=console)
    monkeypatch.setattr(sys, "stdout", console)
    streams.make_forgiving()
    print("é ☃", end="")
    assert console.shown == "é ?"
    monkeypatch.setattr(sys, "stdout", SimpleNamespace())  # a program's own
    streams.make_forgiving()


@pytest.mark.parametrize("system, invalid", [("posix", False), ("nt", True)])
def test_a_reader_that_has_left(system: str, invalid: bool) -> None:
    assert streams.reader_left(BrokenPipeError(), system)
    assert streams.reader_left(OSError(errno.EINVAL, "Invalid argument"), system) is invalid
    assert not streams.reader_left(OSError(errno.EINVAL, "Invalid argument", "a file"), system)
    assert not streams.reader_left(ValueError(), system)


# libraries


class _Library:
    """What Windows sees of a library: its own functions."""

    def __init__(self, *functions: str) -> None:
        for name in functions:
            setattr(self, name, SimpleNamespace(library=self))


def test_functions_are_found_in_the_library_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, base = _Library("llama_decode"), _Library("ggml_nbytes")
    monkeypatch.setattr(ggml, "_libraries", lambda: iter((llama, base)))
    found = ggml.ggml_function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
    assert found.library is base
    assert (found.restype, found.argtypes) == (ctypes.c_size_t, [ctypes.c_void_p])
    with pytest.raises(indexmem_edge.LibraryError, match="have no ggml_nothing"):
        ggml.ggml_function("ggml_nothing", None)


@pytest.mark.parametrize(
    "platform, names, taken",
    [
        ("win32", ("llama.dll",), "llama.dll"),  # Visual C++
        ("win32", ("libllama.dll", "libllama.dll.a"), "libllama.dll"),  # MinGW
        ("darwin", ("libllama.dylib",), "libllama.dylib"),
        ("linux", ("libllama.dylib", "llama.dll"), None),
    ],
)
def test_names_of_the_library(
    platform: str, names: tuple[str, ...], taken: Optional[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "platform", platform)
    found = find.library_file(tmp_path)
    assert (found and found.name) == taken


# the rest


def test_memory_of_the_process_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(process: ctypes.c_void_p, found: Any, size: int) -> int:
        counters = found._obj
        assert process.value == 2**64 - 1 and size == counters.cb == ctypes.sizeof(counters) == 72
        counters.WorkingSetSize, counters.PeakWorkingSetSize = 123 << 20, 200 << 20
        return 1

    class Current:
        restype: Any = ctypes.c_int

        def __call__(self) -> Optional[int]:
            return ctypes.c_void_p(-1).value

    monkeypatch.setattr(memory.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(memory.sys, "platform", "win32")
    kernel = SimpleNamespace(GetCurrentProcess=Current(), K32GetProcessMemoryInfo=get)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)  # there is none
    assert (memory.resident_memory(), memory.peak_memory()) == (123 << 20, 200 << 20)


def test_names_of_files_in_the_repository_are_possible_on_windows() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode != 0:
        pytest.skip("not a clone")
    names = listed.stdout.decode("utf-8").strip("\0").split("\0")
    assert len(names) > 300
    assert len({name.lower() for name in names}) == len(names), "two names differ in case alone"
    for name in names:
        assert not set('<>:"|?*\\') & set(name) and not PureWindowsPath(name).is_reserved(), name
        assert not any(part.endswith((" ", ".")) for part in PureWindowsPath(name).parts), name
        assert len(name) < 120, f"{name}: with a folder before it, longer than 260 characters"
