"""The server's web page, and how a person uses it."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest

from support.browser import Page, browsing, find_browser
from support.serving import SERVER, Server

__all__ = ["Page", "answers", "ask", "browsing", "press", "require_page", "why_not", "written"]

_ANSWERS = "[...document.querySelectorAll('[aria-label=\"Assistant message with actions\"]')]"
_WRITING = "document.querySelector('[aria-label=\"Stop generation\"]')"
_INPUT = "document.querySelector('textarea')"


def require_page(server: Server) -> None:
    """Skips the test where the server has been built without it."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/", headers={"Accept-Encoding": "gzip"})
    try:
        urllib.request.urlopen(request, timeout=60).close()
    except urllib.error.HTTPError:
        pytest.skip("the server has been built without its web page: install npm and build it again")


def why_not() -> str:
    """What is missing for tests of the page, as far as that is known without a server; "" if nothing is."""
    if SERVER is None:
        return "the server has not been built (make server)"
    return "" if find_browser() else "there is no Chromium: apt install chromium (Debian)"


def answers(page: Page) -> list[str]:
    """The text of all answers that are there, finished or not."""
    return list(page.value(f"{_ANSWERS}.map(e => e.innerText)"))


def ask(page: Page, question: str) -> str:
    """Types a question, presses Enter, and waits until the answer has been written."""
    page.until(f"{_INPUT} !== null && !{_INPUT}.disabled")
    before = len(answers(page))
    page.value(f"{_INPUT}.focus()")
    page.type(question)
    page.press_enter()
    page.until(f"{_ANSWERS}.length > {before}")
    return written(page)


def written(page: Page) -> str:
    """Waits until the answer in progress has been written."""
    page.until(f"{_WRITING} === null")
    return answers(page)[-1]


def press(page: Page, button: str) -> None:
    """The last button of that name, which belongs to the last message; the model has begun to write when this returns."""
    page.value(f"[...document.querySelectorAll('[aria-label=\"{button}\"]')].at(-1).click()")
    page.until(f"{_WRITING} !== null")
