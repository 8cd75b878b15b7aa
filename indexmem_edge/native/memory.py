"""How much memory this process takes, and how much more it may take: what the system has, and what a container grants of it."""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from .processors import CGROUPS, OWN, upwards

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_NO_LIMIT = 1 << 60  # version 1 of control groups writes a number where there is none


def free_memory(
    system: str = sys.platform, meminfo: Path = _MEMINFO, cgroups: Path = CGROUPS, own: Path = OWN
) -> Optional[int]:
    """Bytes that programs can still take without others being pushed out, or None if the system does not say.

    Files that are kept in memory do not count as taken, neither the system's nor those of a container.
    """
    found: Optional[int] = None
    with contextlib.suppress(OSError, ValueError, AttributeError, subprocess.SubprocessError):
        if system == "darwin":
            found = of_vm_stat(subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=5, check=True).stdout)
        elif system == "win32":
            found = of_windows(ctypes.windll.kernel32)  # type: ignore[attr-defined, unused-ignore]
        else:
            found = _in_text(meminfo.read_text(encoding="utf-8"), r"MemAvailable:\s+(\d+) kB") * 1024
    left = [found] if found is not None else []
    return min([*left, *_granted(cgroups, own)], default=None)


def of_vm_stat(text: str) -> int:
    """Of what macOS says: pages that are free, or hold what can be read again."""
    size = _in_text(text, r"page size of (\d+) bytes")
    return size * sum(_in_text(text, rf"Pages {kind}:\s+(\d+)\.") for kind in ("free", "inactive", "speculative"))


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX"""

    _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
        (name, ctypes.c_uint64)
        for name in ("total", "free", "total_page", "free_page", "total_virtual", "free_virtual", "free_extended")
    ]


def of_windows(kernel32: Any) -> Optional[int]:
    """Of what Windows says: physical memory that is free, and may be committed."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(min(status.free, status.free_page))


class _MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS"""

    _fields_ = [
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 6),
    ]


def _memory_counters(kernel32: Any) -> _MemoryCounters:
    """What Windows tells of the memory of this process; zeros if it does not."""
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    found = _MemoryCounters(cb=ctypes.sizeof(_MemoryCounters))
    kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(kernel32.GetCurrentProcess()), ctypes.byref(found), found.cb)
    return found


def resident_memory() -> int:
    """Bytes that this process has in memory, code and mapped files included; on macOS the most it had, and 0 where the system does
    not say.
    """
    with contextlib.suppress(OSError, ValueError):
        if sys.platform == "win32":
            return int(_memory_counters(ctypes.windll.kernel32).WorkingSetSize)
        import resource

        return int(_STATM.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    return peak_memory()


def peak_memory() -> int:
    """The most bytes that this process had in memory so far, as `resident_memory`; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        if sys.platform == "win32":
            return int(_memory_counters(ctypes.windll.kernel32).PeakWorkingSetSize)
        return _in_text(_STATUS.read_text(encoding="utf-8", errors="replace"), r"(?m)^VmHWM:\s+(\d+) kB") * 1024
    with contextlib.suppress(OSError, ImportError):
        import resource  # what it says may be of the program that started this one

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def _granted(cgroups: Path, own: Path) -> Iterator[int]:
    """Bytes that each control group of this process leaves it."""
    names = {  # limit, use, and files among that, by version
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for folder, version in upwards("memory", cgroups, own):
        limit, use, files = names[version]
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text(encoding="utf-8"))  # "max": no number
            if most < _NO_LIMIT:
                kept = _in_text((folder / "memory.stat").read_text(encoding="utf-8"), rf"(?m)^{files} (\d+)$")
                yield max(most - int((folder / use).read_text(encoding="utf-8")) + kept, 0)


def _in_text(text: str, pattern: str) -> int:
    """The number that a pattern finds.

    Raises:
        ValueError: it finds none.
    """
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"there is no {pattern}")
    return int(found[1])
