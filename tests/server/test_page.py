"""The server's web page in a browser: a person types, the model answers, and the cache stays as large as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server_page import Page, answers, ask, browsing, press, require_page, why_not, written
from support.serving import Server, serving

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

BUDGET = 256
LONG = "The lighthouse of Port Elden is painted green. Its keeper is called Maren Holt. " * 30


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    options = ("--kv-budget", BUDGET, "-np", 1, "-ub", 64, "-n", 24, "--temp", 0, "--metrics", "--slots", "--webui")
    with serving(demo_model, *options) as running:
        require_page(running)
        yield running


@pytest.fixture()
def page(server: Server) -> Iterator[Page]:
    with browsing() as one:
        one.open(f"http://127.0.0.1:{server.port}/")
        yield one
        assert one.complaints == []


def read(server: Server) -> int:
    """Tokens of prompts that the model has evaluated so far."""
    found = re.search(r"^llamacpp:prompt_tokens_total (\d+)", server.ask("/metrics")[1], flags=re.M)
    assert found is not None
    return int(found[1])


def test_a_conversation(server: Server, page: Page) -> None:
    first = ask(page, LONG + "Who is the keeper?")
    assert len(first.split()) > 3
    before = read(server)
    assert before > 2 * BUDGET
    second = ask(page, "And what colour is it?")
    assert len(answers(page)) == 2 and second != first
    assert read(server) - before < 100  # the second question, not the first one again
    kv = server.get("/slots")[0]["kv"]
    assert kv["kept"] <= BUDGET < kv["evicted"]


def test_another_answer(server: Server, page: Page) -> None:
    answer = ask(page, "Name a river in Africa.")
    before = read(server)
    press(page, "Regenerate")
    again = written(page)
    assert read(server) - before < 64
    page.until("/2 *\\/ *2/.test(document.body.innerText)")  # the first one is kept
    assert answer[:30] == again[:30]  # little is left to chance at temperature 0
