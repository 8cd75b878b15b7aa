"""What was typed in earlier chats: kept for this user alone, bounded, and never in the way."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from indexmem_edge.cli import history
from indexmem_edge.cli.history import KeptHistory
from indexmem_edge.files.folders import state_dir


def entries(path: Path) -> list[str]:
    return list(KeptHistory(path).load_history_strings())


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_only_this_user_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    mask = os.umask(0)
    try:
        KeptHistory(path).store_string("a secret")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    assert entries(path) == ["a secret"] and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_entries_of_several_lines_come_back(tmp_path: Path) -> None:
    kept = KeptHistory(tmp_path / "history")
    for text in ("one", "two\n\n# lines\n+", "drei é 模型"):
        kept.store_string(text)
    assert entries(tmp_path / "history") == ["drei é 模型", "two\n\n# lines\n+", "one"]


def test_it_does_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_MOST_BYTES", 4000)
    path = tmp_path / "history"
    for start in range(5):
        kept = KeptHistory(path)
        for i in range(20):
            kept.store_string(f"message {start}.{i}\nof two lines")
        kept.store_string("x" * 20000)
    found = entries(path)
    assert path.stat().st_size < 4000 and found[0] == "message 4.19\nof two lines" and len(found) > 20
    assert all(text.startswith("message") and text.endswith("\nof two lines") for text in found)


def test_a_folder_that_cannot_be_written_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = KeptHistory(tmp_path / "file" / "history")
    kept.store_string("x")
    assert list(kept.load_history_strings()) == []


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_dir() == tmp_path / "indexmem-edge"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_dir() == Path.home() / ".local" / "state" / "indexmem-edge"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert state_dir() == tmp_path / "indexmem-edge"
