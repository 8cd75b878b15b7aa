"""Tries the library out once per build, before it is first used, so that the chat never just dies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from .. import __version__
from ..errors import DemoModelMissing, LibraryError
from ..files.folders import cache_dir
from ..models.demo import demo_model
from ..native import find
from . import trial
from .machine import cpu

SKIP_VARIABLE = "INDEXMEM_CHECK"  # 0: start without it
PATIENCE = 60.0  # seconds, then the chat starts all the same
_SILENT_FOR = 2.0  # seconds before a person is told what it is that takes so long


def build_key() -> str:
    """What the result of a trial depends on: the files of the library, the CPU, and how one is chosen for the other."""
    folder = find.library_dir()
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
    variant = os.environ.get("INDEXMEM_CPU_VARIANT", "")
    return hashlib.sha256(repr((__version__, str(folder), files, cpu(), variant)).encode()).hexdigest()


def require_trial(model: Optional[Path]) -> None:
    """Runs the demo model, or `model` where there is none, unless this build has done so on this CPU before.

    Only what cannot be waited for stops the start: a crash, or wrong results. All else is for the real start to say.

    Raises:
        LibraryError: what `indexmem doctor` would say.
    """
    if os.environ.get(SKIP_VARIABLE) == "0":
        return
    tried = _model_to_try(model)
    if tried is None:
        return
    try:
        key = build_key()
    except OSError:
        return  # no library: the real start says so
    if _remembered(key):
        return
    with _telling_a_person():
        outcome = trial.try_out(tried, PATIENCE)
    if outcome.kind in ("died", "wrong"):
        raise LibraryError(f"the library does not run here: {outcome.text}. {SKIP_VARIABLE}=0 starts all the same")
    if outcome.kind == "ok":
        _remember(key)


def _model_to_try(model: Optional[Path]) -> Optional[Path]:
    with contextlib.suppress(DemoModelMissing):
        return demo_model()
    return model if model is not None and model.is_file() else None


def _stamp(key: str) -> Path:
    return cache_dir() / f"tried-{key[:16]}"


def _remembered(key: str) -> bool:
    try:
        return _stamp(key).read_text(encoding="ascii").strip() == key
    except (OSError, ValueError, RuntimeError):  # not there, not readable, damaged, no home
        return False


def _remember(key: str) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # then it is tried again next time
        stamp = _stamp(key)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(key + "\n", encoding="ascii")  # half of it is not the key, so that it may be cut short


@contextlib.contextmanager
def _telling_a_person() -> Iterator[None]:
    """A line on a person's terminal, once it takes long."""
    timer = threading.Timer(_SILENT_FOR, print, ["trying the library out on this CPU, once ..."], {"file": sys.stderr})
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
