"""How many processors this process may use: those it may run on, and what a container grants it of them."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path, PurePosixPath
from typing import Iterator, Optional

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_processors(cgroups: Path = _CGROUPS, own: Path = _OWN) -> int:
    """Processors in the affinity mask of this process, but no more than the quota of its control groups rounds up to.

    `os.cpu_count()` counts those of the machine: a container of two on a machine of sixty-four would start sixty-four
    threads, which wait for one another.

    Args:
        cgroups, own: where the system keeps its control groups, and the names of those of this process.
    """
    try:
        allowed = len(os.sched_getaffinity(0))  # type: ignore[attr-defined, unused-ignore]
    except (AttributeError, OSError):  # not on macOS and Windows
        allowed = os.cpu_count() or 1
    quota = _quota(cgroups, own)
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def default_threads(processors: Optional[int] = None) -> tuple[int, int]:
    """Threads for single tokens, and for batches of them.

    Single tokens wait for memory, where a second thread on the same core helps little: half of the processors, as in
    llama-cpp-python, but both where there are only two.
    """
    n = processors or usable_processors()
    return (n if n <= 2 else n // 2), n


def _quota(cgroups: Path, own: Path) -> Optional[float]:
    """Processors' worth of time that the control groups of this process grant, or None if they do not limit it."""
    found: list[float] = []
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers:  # version 2
                found += (_share(folder / "cpu.max") for folder in _upwards(cgroups, name))
            elif "cpu" in controllers.split(","):
                found += (_share_v1(folder) for folder in _upwards(cgroups / controllers, name))
                found += (_share_v1(folder) for folder in _upwards(cgroups / "cpu", name))
    limits = [share for share in found if share > 0]
    return min(limits) if limits else None


def _upwards(root: Path, name: str) -> Iterator[Path]:
    """The folders of a group and of all that it is part of. In a container, which sees its own as the root, there are fewer."""
    inside = PurePosixPath(name.lstrip("/"))
    yield root / inside
    yield from (root / parent for parent in inside.parents if parent != inside)


def _share(file: Path) -> float:
    """Of `cpu.max`: "max 100000" or "150000 100000"; 0 for no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = file.read_text(encoding="utf-8").split()[:2]
        return int(quota) / int(period) if quota != "max" and int(period) > 0 else 0.0
    return 0.0


def _share_v1(folder: Path) -> float:
    """The same of version 1, where -1 is no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{what}_us").read_text(encoding="utf-8")) for what in ("quota", "period"))
        return quota / period if quota > 0 and period > 0 else 0.0
    return 0.0
