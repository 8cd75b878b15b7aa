"""docs/examples/chat_api.py behind a real server: several users, and some who go away."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge import Llama
from indexmem_edge.native import find
from support.examples import example
from support.serving import free_port

uvicorn = pytest.importorskip("uvicorn", reason="there is no uvicorn: pip install fastapi uvicorn")
pytest.importorskip("fastapi", reason="there is no fastapi: pip install fastapi uvicorn")
if find.library_file() is None:
    pytest.skip("the native library has not been built", allow_module_level=True)

PATIENCE = 60.0  # seconds, until a test that waits for something gives up
RIVERS = [{"role": "user", "content": "Name a river in Africa."}]
COLOURS = [{"role": "user", "content": "Which colours has a rainbow?"}]


class Service:
    """Asks the endpoint, which runs in another thread."""

    def __init__(self, llm: Llama, port: int) -> None:
        self.llm, self.port = llm, port

    def lines(self, messages: list[dict[str, str]], **options: Any) -> list[dict[str, str]]:
        body = json.dumps({"messages": messages, "max_tokens": 12, "temperature": 0, **options}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/chat", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return [json.loads(line) for line in answer]

    def text(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(line["text"] for line in self.lines(messages, **options))

    def ask_and_leave(self, messages: list[dict[str, str]], when: Any, **options: Any) -> None:
        """Goes away as soon as `when(what has come)` is true."""
        body = json.dumps({"messages": messages, "temperature": 0, **options}).encode()
        head = f"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            connection.sendall(head.encode() + body)
            connection.settimeout(0.01)
            come, end = b"", time.monotonic() + PATIENCE
            while not when(come):
                assert time.monotonic() < end, come
                try:
                    come += connection.recv(65536)
                except TimeoutError:
                    pass


@pytest.fixture(scope="module")
def service(demo_model: Path) -> Iterator[Service]:
    with Llama(demo_model, kv_budget=256, n_ubatch=64, verbose=False, seed=1) as llm:
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(example("chat_api").create_app(llm), port=port, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Service(llm, port)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def test_an_answer_comes_in_pieces(service: Service) -> None:
    assert len(service.lines(RIVERS)) > 3
    alone = service.llm.create_chat_completion(RIVERS, max_tokens=12, temperature=0)
    assert service.text(RIVERS) == alone["choices"][0]["message"]["content"]


def test_users_who_ask_at_once_get_their_own_answers(service: Service) -> None:
    expected = [service.text(messages, max_tokens=8) for messages in (RIVERS, COLOURS)]
    got: dict[int, str] = {}

    def ask(user: int) -> None:
        got[user] = service.text((RIVERS, COLOURS)[user % 2], max_tokens=8)

    users = [threading.Thread(target=ask, args=(user,)) for user in range(6)]
    for user in users:
        user.start()
    for user in users:
        user.join(PATIENCE)
    assert [got[user] for user in range(6)] == expected * 3


def test_users_do_not_pay_for_each_other(service: Service) -> None:
    conversations = [[*RIVERS], [*COLOURS]]
    for _ in range(3):
        for messages in conversations:
            messages.append({"role": "assistant", "content": service.text(messages)})
            messages.append({"role": "user", "content": "Go on."})
    assert service.llm.kv_stats().turn_evaluated < 40


def test_an_answer_that_nobody_waits_for_ends(service: Service) -> None:
    before = service.text(RIVERS)
    service.ask_and_leave(COLOURS, lambda come: b'"text"' in come, max_tokens=1_000_000)
    assert service.text(RIVERS) == before  # its turn comes only when the other one has ended


def test_a_prompt_that_nobody_waits_for_is_not_read_to_its_end(service: Service) -> None:
    long = [{"role": "user", "content": "A sentence about nothing at all. " * 4000}]
    read: list[tuple[int, int]] = []
    with service.llm.watch(lambda done, total: read.append((done, total))):
        service.ask_and_leave(long, lambda come: len(read) > 0)
        assert service.text(RIVERS)
    assert max(total for _, total in read) > 20_000
    assert all(done < total for done, total in read if total > 20_000)


def test_one_who_leaves_while_waiting_is_forgotten(service: Service) -> None:
    started = threading.Event()
    first = threading.Thread(target=lambda: (started.set(), service.text(COLOURS, max_tokens=60)))
    first.start()
    started.wait(PATIENCE)
    service.ask_and_leave(RIVERS, lambda come: True, max_tokens=1_000_000)
    first.join(PATIENCE)
    assert not first.is_alive() and service.text(RIVERS)


def test_what_is_wrong_with_a_request_is_said(service: Service) -> None:
    (line,) = service.lines([{"role": "system", "content": "Be brief. " * 300}, *RIVERS])
    assert "system prompt" in line["error"] and "budget" in line["error"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        service.lines([{"role": "user"}])
    assert refused.value.code == 422
    assert service.text(RIVERS)
