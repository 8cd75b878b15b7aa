"""Threads follow the affinity mask and the quota of a container, whose files are imitated here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from indexmem_edge.native.processors import default_threads, usable_processors


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def place(tmp_path: Path, own: str, **files: str) -> int:
    """Usable processors with these files; `__` in their names is a slash, `_dot_` a dot."""
    for name, text in files.items():
        path = tmp_path / "cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    return usable_processors(tmp_path / "cgroup", tmp_path / "own")


def test_the_mask_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 7}, raising=False)
    assert usable_processors(tmp_path, tmp_path / "none") == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_processors(tmp_path, tmp_path / "none") == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_processors(tmp_path, tmp_path / "none") == 1


@pytest.mark.parametrize("quota, n", [("max 100000", 16), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("rubbish", 16), ("", 16), ("100000 0", 16), ("9900000 100000", 16)])
def test_version_two(sixteen: None, tmp_path: Path, quota: str, n: int) -> None:
    assert place(tmp_path, "0::/\n", cpu_dot_max=quota) == n


def test_the_smallest_of_all_groups_above(sixteen: None, tmp_path: Path) -> None:
    own = "0::/system.slice/docker.scope/inner\n"
    files = {"system.slice__cpu_dot_max": "400000 100000", "system.slice__docker.scope__cpu_dot_max": "300000 100000"}
    assert place(tmp_path, own, **files, **{"system.slice__docker.scope__inner__cpu_dot_max": "max 100000"}) == 3


def test_a_container_that_sees_itself_as_the_root(sixteen: None, tmp_path: Path) -> None:
    assert place(tmp_path, "0::/../../not/here\n", cpu_dot_max="250000 100000") == 3


@pytest.mark.parametrize("quota, n", [("-1", 16), ("400000", 4), ("50000", 1), ("x", 16)])
@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_version_one(sixteen: None, tmp_path: Path, folder: str, quota: str, n: int) -> None:
    own = "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n"
    files = {f"{folder}__docker__abc__cpu.cfs_quota_us": quota, f"{folder}__docker__abc__cpu.cfs_period_us": "100000"}
    assert place(tmp_path, own, **files) == n


def test_two_of_two_and_half_of_more() -> None:
    assert [default_threads(n) for n in (1, 2, 3, 8)] == [(1, 1), (2, 2), (1, 3), (4, 8)]
    one, many = default_threads()
    assert 1 <= one <= many <= (os.cpu_count() or 1)
