"""A file that one process works on at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from indexmem_edge.files import lock
from indexmem_edge.files.lock import InUse, holding

HOLD = "import sys; from indexmem_edge.files.lock import holding\nwith holding(sys.argv[1]): print('held', flush=True); sys.stdin.read()"


@contextlib.contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds it."""
    root = str(Path(lock.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    with process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_it_is_one_at_a_time_and_nothing_remains(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    for _ in range(2):
        with holding(str(path)):
            assert os.listdir(tmp_path) == ["talk.lock"]
            with pytest.raises(InUse, match=str(os.getpid())), holding(str(path)):
                pass
            with holding(str(tmp_path / "other")):
                pass
        assert os.listdir(tmp_path) == []


def test_a_link_is_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "talk")
    with holding(str(tmp_path / "link")), pytest.raises(InUse), holding(str(tmp_path / "talk")):
        pass


def test_another_process_has_it_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    with another_process(path) as process:
        with pytest.raises(InUse) as refused, holding(str(path)):
            pass
        assert refused.value.pid == process.pid
        process.kill()
        process.wait()
        assert os.listdir(tmp_path) == ["talk.lock"]
        with holding(str(path)):
            assert (tmp_path / "talk.lock").read_text() == str(os.getpid())
    assert os.listdir(tmp_path) == []


def test_nobody_gets_a_lock_on_a_file_that_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits to lock a file that its owner removes in between has a lock that nobody else would see."""
    path, lock_it, left = tmp_path / "talk", lock._lock, []
    other = holding(str(path))

    def between(handle: int) -> None:
        if not left:
            left.append(True)
            other.__exit__(None, None, None)
        lock_it(handle)

    other.__enter__()
    monkeypatch.setattr(lock, "_lock", between)
    with holding(str(path)), pytest.raises(InUse), holding(str(path)):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), holding(str(tmp_path / "none" / "talk")):
        pass


def test_a_link_in_its_place_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("all")
    (tmp_path / "talk.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError), holding(str(tmp_path / "talk")):
        pass
    assert (tmp_path / "precious").read_text() == "all"


def test_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a byte is locked, which nobody else can read, and an open file cannot be removed."""
    locked: dict[int, os.stat_result] = {}

    def locking(handle: int, mode: int, n: int) -> None:
        assert mode == 2 and n == 1 and os.lseek(handle, 0, os.SEEK_CUR) > 1 << 20
        if any(os.path.samestat(os.fstat(handle), other) for other in locked.values()):
            raise PermissionError(errno.EACCES, "Permission denied")
        locked[handle] = os.fstat(handle)

    close, unlink = os.close, os.unlink

    def closing(handle: int) -> None:
        locked.pop(handle, None)
        close(handle)

    def removing(path: str) -> None:
        assert not locked, "the file is open"
        unlink(path)

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(lock.sys, "platform", "win32")
    monkeypatch.setattr(lock.os, "close", closing)
    monkeypatch.setattr(lock.os, "unlink", removing)
    path = str(tmp_path / "talk")
    for _ in range(2):
        with holding(path):
            with pytest.raises(InUse, match=str(os.getpid())), holding(path):
                pass
        assert os.listdir(tmp_path) == []
