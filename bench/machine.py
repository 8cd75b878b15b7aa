"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def rss_of(process: int | str) -> int | None:
    """Resident memory of a process, by its number, or None where there is no /proc, or no such process."""
    try:
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


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
