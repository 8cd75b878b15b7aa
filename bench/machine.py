"""What a measurement ran on."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def rss_of(process: int | str) -> int | None:
    """Resident memory of a process, by its number, or None where there is no /proc, or no such process."""
    return _status(process, "VmRSS")


def _status(process: int | str, name: str) -> int | None:
    """A number of bytes in what /proc tells of a process."""
    try:
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def rss_bytes() -> int:
    """Resident memory of this process; its peak where there is no /proc."""
    found = rss_of("self")
    if found is not None:
        return found
    if sys.platform == "win32":
        return int(_memory_counters().WorkingSetSize)
    return _most_resident()


def peak_bytes() -> int:
    """The most memory that this process has had resident so far."""
    found = _status("self", "VmHWM")
    if found is not None:
        return found
    return int(_memory_counters().PeakWorkingSetSize) if sys.platform == "win32" else _most_resident()


def _most_resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS"""

    _fields_ = [
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 6),
    ]


def _memory_counters() -> _MemoryCounters:
    """What Windows tells of the memory of this process."""
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined, unused-ignore]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    found = _MemoryCounters(cb=ctypes.sizeof(_MemoryCounters))
    if not kernel.K32GetProcessMemoryInfo(ctypes.c_void_p(kernel.GetCurrentProcess()), ctypes.byref(found), found.cb):
        raise OSError("Windows does not tell the memory of this process")
    return found


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(model: str, library: str, threads: int, **how: Any) -> dict[str, Any]:
    """The `meta` object of a report. Paths in the command line are cut to names."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "model": model,
        "library": library,
        "command": " ".join(Path(word).name if os.path.dirname(word) else word for word in sys.argv),
        **how,
    }
