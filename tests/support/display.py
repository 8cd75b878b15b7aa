"""A display of its own for tests that open windows: nobody sees them, and no display has to be there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

_PATIENCE = 30  # seconds


@contextlib.contextmanager
def virtual_display(width: int = 1000, height: int = 800) -> Iterator[str]:
    """The name of a display that lasts as long as the `with`. Skips the test where there is no Xvfb."""
    if shutil.which("Xvfb") is None:
        pytest.skip("there is no Xvfb: apt install xvfb (Debian)")
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", f"{width}x{height}x24", "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(write)
    try:
        with open(read) as line:
            number = line.readline().strip()
        assert number, f"Xvfb ended with {server.wait(_PATIENCE)}"
        yield f":{number}"
    finally:
        server.terminate()
        server.wait(_PATIENCE)
