"""The session file under attack: every truncation, every flipped byte, foreign files, a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexmem_edge import SessionError
from indexmem_edge.native import find
from indexmem_edge.sessions import file as sessionfile
from indexmem_edge.sessions.file import MAGIC, SessionData, read, write

SAMPLE = SessionData(
    header={"model": "abc", "kv_budget": 256},
    tokens=np.array([1, 5, 49151], dtype=np.int32),
    extra={"messages": [{"role": "user", "content": "héllo \ud800"}]},
    state=bytes(range(200)),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.session"
    write(path, SAMPLE)
    return path


def sealed(header: bytes, rest: bytes, version: int = 1, header_bytes: int | None = None) -> bytes:
    """A file with a valid checksum, whatever it contains."""
    body = struct.pack("<8sII", MAGIC, version, len(header) if header_bytes is None else header_bytes) + header + rest
    return body + hashlib.sha256(body).digest()


def test_round_trip(file: Path) -> None:
    data = read(file)
    assert data.header == SAMPLE.header and data.extra == SAMPLE.extra and data.state == SAMPLE.state
    assert data.tokens.tolist() == SAMPLE.tokens.tolist() and data.tokens.dtype == np.int32


def test_size_is_what_write_returns_and_the_folder_is_clean(tmp_path: Path) -> None:
    size = write(tmp_path / "a", SAMPLE)
    assert os.path.getsize(tmp_path / "a") == size
    assert os.listdir(tmp_path) == ["a"]


def test_every_truncation_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for n in range(len(whole)):
        file.write_bytes(whole[:n])
        with pytest.raises(SessionError):
            read(file)


def test_every_flipped_byte_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for i in range(len(whole)):
        altered = bytearray(whole)
        altered[i] ^= 0x01
        file.write_bytes(altered)
        with pytest.raises(SessionError):
            read(file)


def test_appended_bytes_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(SessionError, match="truncated or damaged"):
        read(file)


@pytest.mark.parametrize("content", [b"", b"G", b"GGUF" + bytes(100), MAGIC, MAGIC[:-1], b"PK\x03\x04" * 50])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(SessionError, match="not a session file|truncated"):
        read(tmp_path / "x")


def test_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(sealed(b"{}", b"", version=7))
    with pytest.raises(SessionError, match="format 7, this program reads formats 1 to 3"):
        read(tmp_path / "x")


SIZES = {"n_tokens": 0, "extra_bytes": 4, "state_bytes": 0}


@pytest.mark.parametrize(
    "changed",
    [
        {"n_tokens": -1},
        {"n_tokens": 2**62},
        {"n_tokens": 1.0},
        {"n_tokens": True},
        {"n_tokens": None},
        {"state_bytes": 2**63},
        {"state_bytes": "0"},
        {"extra_bytes": 5},
        {"extra_bytes": 10**400},
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_allocated(tmp_path: Path, changed: dict[str, Any]) -> None:
    (tmp_path / "x").write_bytes(sealed(json.dumps({**SIZES, **changed}).encode(), b"null"))
    with pytest.raises(SessionError, match="damaged"):
        read(tmp_path / "x")


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff", b"[" * 100_000, b"null", b""])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "x").write_bytes(sealed(header, b""))
    with pytest.raises(SessionError, match="header"):
        read(tmp_path / "x")


@pytest.mark.parametrize("header_bytes", [3, 1 << 21, 2**32 - 1])
def test_a_wrong_header_size_is_refused(tmp_path: Path, header_bytes: int) -> None:
    (tmp_path / "x").write_bytes(sealed(json.dumps(SIZES).encode(), b"null", header_bytes=header_bytes))
    with pytest.raises(SessionError):
        read(tmp_path / "x")


def test_folders_missing_files_and_devices_are_refused(tmp_path: Path) -> None:
    windows = sys.platform == "win32"  # which does not open folders, and has no such device
    folder, device = ("denied", "No such file") if windows else ("directory", "regular file")
    for path, words in [(tmp_path, folder), (tmp_path / "none", "No such file"), ("/dev/zero", device)]:
        with pytest.raises(SessionError, match=words):
            read(path)


def test_writing_where_one_cannot(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="folder"):
        write(tmp_path, SAMPLE)
    with pytest.raises(SessionError, match="No such file"):
        write(tmp_path / "no" / "such" / "file", SAMPLE)
    with pytest.raises(SessionError, match="JSON"):
        write(tmp_path / "x", SessionData({}, SAMPLE.tokens, {1, 2}, b""))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_while_writing_keeps_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sessionfile.os, call, full)
    with pytest.raises(SessionError, match="No space left"):
        write(file, SAMPLE)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_an_interrupt_while_writing_keeps_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sessionfile.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(file, SAMPLE)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_a_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    """A real limit on the file size, met in the middle of the state, as on a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    program = (
        "import sys, numpy as np\n"
        "from indexmem_edge import SessionError\n"
        "from indexmem_edge.sessions.file import SessionData, write\n"
        "try:\n"
        "    write(sys.argv[1], SessionData({}, np.zeros(3, np.int32), None, bytes(1 << 20)))\n"
        "except SessionError as error:\n"
        "    print(error)\n"
    )
    target = tmp_path / "x"
    target.write_bytes(b"old")
    result = subprocess.run(
        [sys.executable, "-c", program, str(target)],
        capture_output=True,
        text=True,
        env=with_package(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 0, result.stderr
    assert "cannot save the session" in result.stdout and "too large" in result.stdout
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    try:
        (tmp_path / "link").symlink_to(tmp_path / "real")
    except OSError:
        pytest.skip("Windows makes links for administrators alone")
    write(tmp_path / "link", SAMPLE)
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "real").state == SAMPLE.state


def with_package() -> dict[str, str]:
    """An environment in which a new Python finds the package that this one uses."""
    import indexmem_edge

    root = str(Path(indexmem_edge.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


# with a model

needs_library = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
TEXT = "The tide comes in and the tide goes out, and the old boat waits for its crew. " * 8


def load(model: Path, **options: Any) -> Any:
    from indexmem_edge import Llama

    defaults = {"kv_budget": 96, "kv_window": 32, "indexmem": "off", "n_threads": 1, "n_threads_batch": 1}
    return Llama(str(model), verbose=False, **{**defaults, **options})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A session after evictions."""
    path = tmp_path_factory.mktemp("sessions") / "s"
    llm = load(demo_model)
    llm.prefill(llm.tokenize(TEXT.encode()))
    llm.save_session(path)
    return path


@needs_library
def test_continuing_evaluates_only_what_is_new(tmp_path: Path, demo_model: Path) -> None:
    first, second = load(demo_model), load(demo_model)
    prompt = first.tokenize(TEXT.encode())
    first.prefill(prompt)
    assert first.kv_stats().evicted > 0
    first.save_session(tmp_path / "s", extra=["anything"])
    assert second.load_session(tmp_path / "s") == ["anything"]
    more = prompt + first.tokenize(b" And then the crew")
    answers = [[t for _, t in zip(range(5), llm.generate(more, temp=0.0))] for llm in (first, second)]
    assert answers[0] == answers[1]
    stats = second.kv_stats()
    assert stats.turn_evaluated == len(more) - len(prompt) and stats.turn_reused == len(prompt)
    assert stats.reevaluated == 0


@needs_library
@pytest.mark.parametrize(
    "options, word",
    [
        ({"kv_budget": None, "kv_window": None, "n_ctx": 2048}, "kv_budget = 96, this one has none"),
        ({"kv_policy": "tova", "kv_budget": 90}, "query of the newest token"),
        ({"kv_policy": "snapkv"}, "without the last 32 queries"),
        ({"kv_policy": "full", "kv_budget": 90}, "evict nothing"),
        ({"type_k": 8}, "type_k"),
        ({"rope_freq_base": 5000.0}, "rope_freq_base"),
    ],
)
def test_what_a_state_cannot_go_on_with_is_refused_by_name(saved: Path, demo_model: Path, options: dict[str, Any], word: str) -> None:
    other = load(demo_model, **options)
    other.eval([5, 6, 7])
    with pytest.raises(SessionError, match=word):
        other.load_session(saved)
    assert other.n_tokens == 3


@needs_library
def test_a_file_from_before_there_were_sidecars_is_accepted(tmp_path: Path, saved: Path, demo_model: Path) -> None:
    data = read(saved)
    header = {k: v for k, v in data.header.items() if "sidecar" not in k}
    assert len(header) == len(data.header) - 2
    write(tmp_path / "old", SessionData(header, data.tokens, data.extra, data.state))
    llm = load(demo_model)
    llm.load_session(tmp_path / "old")
    assert llm.n_tokens == len(data.tokens)


@needs_library
def test_a_refused_file_leaves_the_conversation_as_it_was(tmp_path: Path, demo_model: Path) -> None:
    llm = load(demo_model)
    prompt = llm.tokenize(TEXT.encode())
    llm.prefill(prompt)
    llm.save_session(tmp_path / "s")
    good = read(tmp_path / "s")
    expected = [t for _, t in zip(range(3), llm.generate(prompt + prompt[:5], temp=0.0))]

    attacks = {
        "model": SessionData({**good.header, "model": "0-0"}, good.tokens, None, good.state),
        "vocabulary": SessionData(good.header, good.tokens + 10**8, None, good.state),
        "negative": SessionData(good.header, good.tokens - 10**8, None, good.state),
        "no state": SessionData(good.header, good.tokens, None, b""),
        "half a state": SessionData(good.header, good.tokens, None, good.state[: len(good.state) // 2]),
        "longer state": SessionData(good.header, good.tokens, None, good.state + bytes(64)),
        "foreign state": SessionData(good.header, good.tokens, None, bytes(len(good.state))),
        "fewer tokens": SessionData(good.header, good.tokens[:-3], None, good.state),
    }
    for name, data in attacks.items():
        llm.load_session(tmp_path / "s")
        write(tmp_path / "bad", data)
        with pytest.raises(SessionError):
            llm.load_session(tmp_path / "bad")
        assert llm.n_tokens == len(prompt), name
        assert [t for _, t in zip(range(3), llm.generate(prompt + prompt[:5], temp=0.0))] == expected, name
        assert llm.kv_stats().reevaluated == 0, name
