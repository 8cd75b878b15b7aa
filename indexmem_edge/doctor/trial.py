"""Tries the library out on a model in another process (`selfcheck`), and says what became of that."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..native import find
from .machine import describe_cpu

PATIENCE = 300.0  # seconds; a large model on a slow disk takes a while to load

_WINDOWS = {
    0xC000001D: "illegal instruction",
    0xC0000005: "access violation",
    0xC00000FD: "stack overflow",
    0xC0000409: "abort",
    0xC0000135: "a DLL is missing",
}
_ADVICE = (
    "Build the library anew on this machine (`make clean && make`, or `pip install --force-reinstall "
    "--no-cache-dir .`), with a newer compiler if that does not help; a library with several CPU variants takes the one named by "
    "INDEXMEM_CPU_VARIANT. If it stays, please report this line"
)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: "ok", "died", "wrong" (it computes nonsense), "late", or "failed" (with an ordinary error)."""

    kind: str
    text: str  # for people, on one line


def command(model: Path) -> list[str]:
    """The process that tries the model out."""
    return [sys.executable, "-m", "indexmem_edge.doctor.selfcheck", str(model)]


def try_out(model: Path, patience: float = PATIENCE) -> Outcome:
    """Decodes a few tokens of a model without and with a budget, where a crash does no harm."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    model = model.absolute()  # and not where it leads: other parts of a model lie beside the name
    with subprocess.Popen(
        command(model),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=find.PACKAGE_DIR.parent,  # where `-m` finds this very package
        env=environment,
    ) as process:
        try:
            output, errors = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            return Outcome("late", _unhappy(f"{_part(_lines(output))} did not end within {patience:.0f} s", model))
        except BaseException:  # Ctrl-C: nothing is left behind
            process.kill()
            raise
    return _judge(process.returncode, _lines(output), errors.decode("utf-8", "replace"), model)


def _judge(status: int, said: list[dict[str, Any]], errors: str, model: Path) -> Outcome:
    last = said[-1] if said else {}
    if status == 0 and "done" in last:
        return Outcome("ok", _happy(last["done"], model))
    if "error" in last:
        what = f"{_part(said)}: {last['error']}"
        if last.get("wrong"):
            return Outcome("wrong", _unhappy(what, model))
        return Outcome("failed", f"{model.name}, {what}")
    words = death(status)
    if words is not None:
        reason = _last_line(errors) if "SIGABRT" in words or words == "abort" else ""
        return Outcome("died", _unhappy(f"{_part(said)} ended with {words}" + (reason and f", {reason}"), model))
    return Outcome("failed", f"{model.name}, {_part(said)}: exit status {status}, {_last_line(errors) or 'no message'}")


def death(status: int) -> Optional[str]:
    """What killed a process that ended with this status, or None if nothing did."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"{signal.Signals(-status).name} ({signal.strsignal(-status) or 'signal'})"
        return f"signal {-status}"
    return _WINDOWS.get(status, f"exception 0x{status:08X}" if status >= 0xC0000000 else None)


def _happy(done: dict[str, Any], model: Path) -> str:
    if done.get("unsupported"):
        return f"{model.name} decodes; it cannot have a budget: {done['unsupported']}"
    text = f"{model.name} decodes {done['tokens']} tokens, the same without and with a budget, evicts {done['evicted']}"
    if done["span"]:
        return f"{text}, renews positions; with a budget they stay below {done['span']:,}"
    return f"{text}; positions grow with the text, because {done['span_reason']}"


def _unhappy(what: str, model: Path) -> str:
    return f"{model.name}, {what}, on {describe_cpu()}. {_ADVICE}"


def _part(said: list[dict[str, Any]]) -> str:
    """What was going on at the end."""
    return next((str(line["part"]) for line in reversed(said) if "part" in line), "starting Python")


def _lines(output: bytes) -> list[dict[str, Any]]:
    found = []
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    asserted = [line for line in lines if "GGML_ASSERT" in line or "Error" in line]
    return (asserted or lines or [""])[-1]
