"""How many processors this process may use: those it may run on, and what a container grants it of them."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path, PurePosixPath
from typing import Iterator, Optional

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_processors(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
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
    shares = [_share(folder / "cpu.max") if version == 2 else _share_v1(folder) for folder, version in upwards("cpu", cgroups, own)]
    return min((share for share in shares if share > 0), default=None)


def upwards(controller: str, cgroups: Path = CGROUPS, own: Path = OWN) -> Iterator[tuple[Path, int]]:
    """The folders of the control groups that limit this process in something, from its own up to the root, each with the
    version of control groups. In a container, which sees its own as the root, there are fewer.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            inside = PurePosixPath(name.lstrip("/"))
            groups = [inside, *(parent for parent in inside.parents if parent != inside)]
            if not controllers:
                yield from ((cgroups / group, 2) for group in groups)
            elif controller in controllers.split(","):
                for root in dict.fromkeys((cgroups / controllers, cgroups / controller)):
                    yield from ((root / group, 1) for group in groups)


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
