"""docs/examples/langchain_chat.py with a server that has the demo model and a budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.examples import example
from support.serving import SERVER, Server, serving

pytest.importorskip("langchain_openai", reason="there is no langchain-openai: pip install langchain-openai")
pytestmark = pytest.mark.skipif(SERVER is None, reason="the server is not part of this build: make server")


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    with serving(demo_model, "--kv-budget", 256, "--parallel", 1) as running:
        yield running


@pytest.fixture(scope="module")
def langchain() -> Any:
    return example("langchain_chat")


@pytest.fixture(scope="module")
def model(server: Server, langchain: Any) -> Any:
    return langchain.connect(f"http://127.0.0.1:{server.port}", max_tokens=64)


def test_a_chain_streams(langchain: Any, model: Any) -> None:
    pieces = list(langchain.summary(model, "The ferry to the islands leaves at seven in the morning."))
    assert len(pieces) > 3
    assert any(word in "".join(pieces) for word in ("ferry", "islands", "seven"))


def test_a_turn_of_a_conversation_costs_itself(langchain: Any, model: Any, server: Server) -> None:
    model = model.model_copy(update={"max_tokens": 8})
    questions = ["Name a river in Africa.", *["And another one?"] * 5]
    messages = langchain.talk(model, questions)
    assert [m.type for m in messages] == ["system", *["human", "ai"] * len(questions)]
    again = server.chat([{"role": {"human": "user", "ai": "assistant"}.get(m.type, m.type), "content": m.content} for m in messages[:-1]])
    assert again["timings"]["prompt_n"] < 32


def test_an_answer_has_the_form_of_a_class(langchain: Any, model: Any) -> None:
    city = langchain.city(model, "Tell me about the city of Lisbon.")
    assert isinstance(city, langchain.City) and city.name and isinstance(city.is_capital, bool)
