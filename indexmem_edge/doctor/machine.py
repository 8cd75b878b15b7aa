"""What this machine's CPU is, for people who are to find out why the library does not run on it. Never fails."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

# What code is compiled for. The rest of what /proc/cpuinfo lists says nothing about a library that dies.
_FEATURES = re.compile(
    r"sse3|ssse3|sse4_?[12]|avx\w*|fma|f16c|bmi[12]|amx\w*|gfni"  # x86
    r"|neon|asimd\w*|fphp|i8mm|bf16|sve\w*|sme[12]?|fcma|dotprod"  # ARM
)


@functools.cache
def cpu() -> tuple[str, tuple[str, ...]]:
    """Name of the CPU, and those of its features that code is compiled for."""
    found = {"linux": _linux, "darwin": _darwin}.get(sys.platform, _other)
    name, features = "", ""
    with contextlib.suppress(Exception):  # in a container, a sandbox, ...: then it stays unknown
        name, features = found()
    known = sorted({word for word in features.lower().replace(".", "_").split() if _FEATURES.fullmatch(word)})
    return " ".join(name.split()) or platform.processor() or platform.machine() or "unknown CPU", tuple(known)


def describe_cpu() -> str:
    """Both in one line."""
    name, features = cpu()
    return f"{name} ({' '.join(features) or 'features unknown'})"


def _linux() -> tuple[str, str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or " ".join(
        f"{key} {fields[key]}" for key in ("cpu implementer", "cpu part") if key in fields
    )
    return name, fields.get("flags") or fields.get("features", "")


def _darwin() -> tuple[str, str]:
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=5, check=False)
    name = run(["sysctl", "-n", "machdep.cpu.brand_string"]).stdout
    x86 = run(["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"]).stdout
    arm = run(["sysctl", "hw.optional.arm"]).stdout
    short = {"dotprod": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "advsimd": "neon", "sme": "sme", "sme2": "sme2"}
    has = [short.get(m[1].lower(), "") for m in re.finditer(r"(?:FEAT_)?(\w+): 1", arm)]
    return name, " ".join([x86.replace("AVX1.0", "AVX"), *has])


def _other() -> tuple[str, str]:
    return os.environ.get("PROCESSOR_IDENTIFIER", ""), ""
