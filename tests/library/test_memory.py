"""How much memory is free: what systems and containers say of it, imitated here, and what this one says."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.native import memory
from indexmem_edge.native.memory import free_memory, of_vm_stat, of_windows, resident_memory

MIB = 1 << 20
MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8388608 kB\n"


def place(tmp_path: Path, own: str, **files: str) -> int | None:
    """Free bytes with these files of control groups; `__` in their names is a slash, `_dot_` a dot."""
    for name, text in files.items():
        path = tmp_path / "cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    (tmp_path / "meminfo").write_text(MEMINFO)
    return free_memory("linux", tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "own")


def test_what_the_system_has(tmp_path: Path) -> None:
    assert place(tmp_path, "") == 8192 * MIB
    assert free_memory("linux", tmp_path / "none", tmp_path / "none", tmp_path / "none") is None
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\n")  # of an old kernel
    assert free_memory("linux", tmp_path / "meminfo", tmp_path / "none", tmp_path / "none") is None


@pytest.mark.parametrize("limit, left", [(str(1000 * MIB), 500), ("max", 8192), (str(500 * MIB), 0), ("rubbish", 8192), (str(1 << 50), 8192)])
def test_what_a_container_grants(tmp_path: Path, limit: str, left: int) -> None:
    files = {"memory_dot_max": limit, "memory_dot_current": str(600 * MIB), "memory_dot_stat": f"anon 5\ninactive_file {100 * MIB}\n"}
    assert place(tmp_path, "0::/\n", **files) == left * MIB


def test_the_least_of_all_groups_above(tmp_path: Path) -> None:
    def group(folder: str, limit: int) -> dict[str, str]:
        return {f"{folder}memory_dot_max": str(limit * MIB), f"{folder}memory_dot_current": "0", f"{folder}memory_dot_stat": "inactive_file 0\n"}

    assert place(tmp_path, "0::/user/me\n", **group("user__", 300), **group("user__me__", 4000)) == 300 * MIB


@pytest.mark.parametrize("limit, left", [(str(700 * MIB), 200), ("9223372036854771712", 8192)])
def test_version_one(tmp_path: Path, limit: str, left: int) -> None:
    folder = "memory__docker__abc__memory"
    files = {f"{folder}.limit_in_bytes": limit, f"{folder}.usage_in_bytes": str(600 * MIB), f"{folder}_dot_stat": f"total_inactive_file {100 * MIB}\n"}
    assert place(tmp_path, "12:memory:/docker/abc\n0::/\n", **files) == left * MIB


def test_macos() -> None:
    said = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:                               1000.\n"
        "Pages active:                           90000.\nPages inactive:                          2000.\n"
        "Pages speculative:                        500.\nPages throttled:                            0.\n"
    )
    assert of_vm_stat(said) == 3500 * 16384
    with pytest.raises(ValueError):
        of_vm_stat("no such tool")


def test_windows() -> None:
    class Kernel:
        works = 1

        def GlobalMemoryStatusEx(self, pointer: Any) -> int:
            status = ctypes.cast(pointer, ctypes.POINTER(memory._MemoryStatus)).contents
            assert status.length == 64
            status.free, status.free_page = 3000 * MIB, 2000 * MIB
            return self.works

    kernel = Kernel()
    assert of_windows(kernel) == 2000 * MIB
    kernel.works = 0
    assert of_windows(kernel) is None


def test_here() -> None:
    free, before = free_memory(), resident_memory()
    assert free is not None and 0 < before and free > MIB
    held = bytearray(64 * MIB)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    assert resident_memory() >= before + 60 * MIB or before > 60 * MIB  # the most it had, where that is all that is known
    del held
