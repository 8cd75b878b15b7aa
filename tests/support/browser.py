"""A person at a web page: Chromium without a window, told what to do through a pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Optional

PATIENCE = 60.0  # seconds, until what is waited for is given up
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> Optional[str]:
    """The program, or None."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """One page of a browser, whose protocol is JSON between zero bytes (Chrome DevTools Protocol)."""

    def __init__(self, read: int, write: int, width: int, height: int) -> None:
        self._read, self._write = read, write
        self._number = 0
        self._rest = b""
        self._session: Optional[str] = None
        self.complaints: list[str] = []  # exceptions and errors of the page
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self._do(f"{domain}.enable")
        self._do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url: str) -> None:
        """Goes to an address."""
        self._do("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """What an expression of JavaScript is."""
        result = self._do("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script: str) -> Any:
        """Waits until an expression is true; returns what it is."""
        end = time.monotonic() + PATIENCE
        while not (value := self.value(script)):
            assert time.monotonic() < end, f"{script} is {value!r}: {self.complaints}\n{self.value('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        """Where the cursor is."""
        self._do("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self._do("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    def picture(self) -> bytes:
        """What is to be seen, as PNG."""
        return base64.b64decode(self._do("Page.captureScreenshot", format="png")["data"])

    def close_browser(self) -> None:
        """The answer may not come any more."""
        self._session = None
        self._send("Browser.close", {})

    def _do(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._send(method, parameters)
        while (answer := self._next()).get("id") != self._number:
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(answer["params"]["exceptionDetails"])[:500])
        assert "error" not in answer, (method, answer["error"])
        return dict(answer["result"])

    def _send(self, method: str, parameters: dict[str, Any]) -> None:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextlib.contextmanager
def browsing(width: int = 1000, height: int = 760) -> Iterator[Page]:
    """A page in a browser that lasts as long as the `with`, with settings and a memory of its own."""
    browser = find_browser()
    assert browser is not None
    browser_reads, we_write = _pipe()
    we_read, browser_writes = _pipe()
    with contextlib.ExitStack() as stack:
        for end in (we_read, we_write):
            stack.callback(os.close, end)
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        command = [
            browser, "--headless=new", "--remote-debugging-pipe", f"--window-size={width},{height}", f"--user-data-dir={folder}",
            "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-extensions",
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", _AS_3_AND_4, str(browser_reads), str(browser_writes), *command],
            pass_fds=(browser_reads, browser_writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (browser_reads, browser_writes):
            os.close(end)
        try:
            page = Page(we_read, we_write, width, height)
            yield page
            page.close_browser()
        finally:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# The browser reads commands from file 3 and writes answers to file 4.
_AS_3_AND_4 = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


def _pipe() -> tuple[int, int]:
    """Its ends, numbered so that neither is 3 or 4."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
