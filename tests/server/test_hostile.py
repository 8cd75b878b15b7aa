"""Hostile and unlucky clients: whatever they send, the server goes on, and nobody sees another's text."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.serving import SERVER, Server, serving

pytestmark = pytest.mark.skipif(SERVER is None, reason="the server has not been built (make server)")

KEY, SECRET = "of-this-test", "zebra-7781"
KEYED = {"Authorization": f"Bearer {KEY}"}
QUESTION = {"messages": [{"role": "user", "content": "Name a river."}], "temperature": 0, "max_tokens": 8}
CHAT, COMPLETION = "/v1/chat/completions", "/completion"


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("slots")
    (folder / "garbage.bin").write_bytes(bytes(range(256)) * 40)
    options = ("--kv-budget", 192, "--kv-window", 48, "-np", 2, "-ub", 64, "-b", 128, "--slots", "--metrics", "--api-key", KEY)
    with serving(demo_model, *options, "--slot-save-path", folder) as started:
        told = {**QUESTION, "messages": [{"role": "user", "content": f"The password is {SECRET}. Remember it."}], "id_slot": 1}
        assert started.ask(CHAT, told, KEYED)[0] == 200
        yield started


@pytest.fixture(autouse=True)
def goes_on(server: Server) -> Iterator[None]:
    """After each test the server answers as it did before."""
    yield
    assert server.process.poll() is None, server.said[-3000:]
    status, text = server.ask(CHAT, {**QUESTION, "id_slot": 0}, KEYED)
    assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] and SECRET not in text


def send(server: Server, data: bytes, seconds: float = 5) -> bytes:
    """What comes back until the server closes the connection, or nothing more comes."""
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return b""


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body) if length is None else length}", "", ""]).encode() + body


def refused(server: Server, body: Any, path: str = CHAT) -> str:
    """The message of the error that it must be."""
    status, text = server.ask(path, body, KEYED)
    assert status in (400, 500, 501), (status, text[:300])
    assert SECRET not in text
    return str(json.loads(text)["error"]["message"])


def resident(server: Server) -> int:
    """Bytes of the process in memory."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def wait_until_idle(server: Server, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while any(slot["is_processing"] for slot in json.loads(server.ask("/slots", headers=KEYED)[1])):
        assert time.monotonic() < end, "a slot goes on for nobody"
        time.sleep(0.05)


@pytest.mark.parametrize("key", ["", "wrong", KEY[:-1], KEY + "x", KEY.upper()])
def test_without_the_key_nothing_is_told(server: Server, key: str) -> None:
    for path, body in [
        (CHAT, QUESTION), (COMPLETION, {"prompt": "x"}), ("/slots", None), ("/metrics", None), ("/props", None),
        ("/slots/1?action=save", {"filename": "stolen.bin"}), ("/tokenize", {"content": "x"}), ("/v1/responses", {"input": "x"}),
    ]:  # fmt: skip
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-Api-Key": key + "\t"}, {}):
            status, text = server.ask(path, body, headers)
            assert status == 401 and SECRET not in text and "kv" not in text, (path, headers, status, text)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"1", b'"x"', b'{"messages": [', b'{"messages": [}', b"\x00" * 10, b"\xff\xfe{}", b"{'messages': []}",
        b'{"messages": "nobody"}', b'{"messages": {}}', b'{"messages": [null]}', b'{"messages": [[]]}', b'{"messages": [{"role": 1}]}',
        b'{"messages": [{"role": "user", "content": {"a": 1}}]}', b'{"messages": [{"role": "user", "content": [1]}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}',
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(server: Server, body: bytes) -> None:
    refused(server, body)


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("closed", [True, False])
def test_deep_json(server: Server, opening: bytes, closing: bytes, closed: bool) -> None:
    deep = opening * 200_000 + (b"1" + closing * 200_000 if closed else b"")
    for path in (CHAT, COMPLETION, "/v1/responses", "/v1/messages", "/tokenize", "/apply-template"):
        body = b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "max_tokens": 1, "x": ' + deep + b"}"
        assert "nested" in refused(server, body, path)


def test_deep_json_after_a_byte_order_mark(server: Server) -> None:
    """Which the parser passes over."""
    for deep in (b"[" * 200_000, b"[" * 200_000 + b"]" * 200_000):
        for path in (CHAT, COMPLETION, "/tokenize"):
            refused(server, b'\xef\xbb\xbf{"prompt": "x", "content": "x", "x": ' + deep + b"}", path)


def test_deep_json_within_a_text(demo_model: Path, tmp_path: Path) -> None:
    """What an assistant called is JSON in a text; for a template that takes it apart it is parsed."""
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}\n{% endfor %}"
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}",
        encoding="utf-8",
    )
    with serving(demo_model, "--kv-budget", 192, "-np", 1, "--jinja", "--chat-template-file", template) as running:

        def ask(arguments: str, path: str) -> tuple[int, str]:
            call = {"type": "function", "id": "a", "function": {"name": "f", "arguments": arguments}}
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "user", "content": "y"}]
            return running.ask(path, {"messages": messages, "max_tokens": 1})

        assert "b=7" in ask('{"b": 7}', "/apply-template")[1]  # it is taken apart
        for deep in ("[" * 200_000 + "]" * 200_000, '{"a":' * 200_000 + "1" + "}" * 200_000):
            for path in (CHAT, "/apply-template"):
                status, text = ask(deep, path)
                assert status in (400, 500) and "nested" in text, text[:300]
        assert ask('{"b": 7}', CHAT)[0] == 200 and running.process.poll() is None


def test_a_form_and_a_text_with_brackets_are_not_deep(server: Server) -> None:
    text = "[" * 5000
    status, answer = server.ask("/tokenize", {"content": text + '"' + text}, KEYED)
    assert status == 200 and len(json.loads(answer)["tokens"]) > 100
    form = ("--x\r\nContent-Disposition: form-data; name=a\r\n\r\n" + text + "\r\n--x--\r\n").encode()
    assert b"nested" not in send(server, post("/v1/audio/transcriptions", form, "Content-Type: multipart/form-data; boundary=x"))


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "asked",
    [
        {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
        {"json_schema": {"$ref": "#/nowhere"}},
        {"json_schema": {"$ref": "https://127.0.0.1:1/x.json"}},
        {"json_schema": {"type": "string", "pattern": "^(((((a+)+)+)+)+)$"}},
        {"json_schema": {"type": "string", "pattern": "^" + "(" * 300}},
        {"json_schema": {"type": "string", "minLength": 10**9, "maxLength": 10**9}},
        {"json_schema": {"type": "array", "minItems": 10**9, "items": {}}},
        {"json_schema": nested(200)},
        {"json_schema": {"allOf": "x", "anyOf": 1, "properties": [], "required": {}, "enum": {}}},
        {"grammar": "root ::= root"},
        {"grammar": "root ::= "},
        {"grammar": "root ::= nothing"},
        {"grammar": "root ::= " + "(" * 2000 + '"a"' + ")" * 2000},
        {"grammar": 'root ::= "a"{1000000000}'},
        {"grammar": 'root ::= (("a"{1,1000}){1,1000}){1,1000}'},
        {"grammar": "root ::= [\x00-\U0010ffff]*\x00"},
        {"grammar": 'root ::= "a"', "json_schema": {}},
    ],
    ids=repr,
)  # fmt: skip
def test_grammars_that_are_traps(server: Server, asked: dict[str, Any]) -> None:
    status, text = server.ask(COMPLETION, {"prompt": "x", "n_predict": 3, **asked}, KEYED)
    assert status in (200, 400, 500) and SECRET not in text


FIELDS = """
    messages prompt model n_predict max_tokens max_completion_tokens temperature top_k top_p min_p typical_p repeat_last_n repeat_penalty
    presence_penalty frequency_penalty dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers mirostat
    mirostat_tau mirostat_eta seed stop stream logit_bias logprobs top_logprobs n_probs min_keep n_keep n_discard n_indent cache_prompt
    id_slot t_max_predict_ms samplers grammar json_schema response_format tools tool_choice parallel_tool_calls chat_template_kwargs
    reasoning_format reasoning_budget_tokens stream_options n ignore_eos return_tokens post_sampling_probs response_fields lora
    timings_per_token return_progress xtc_probability xtc_threshold dynatemp_range dynatemp_exponent speculative.n_max top_n_sigma
    backend_sampling kv_pinned_text sse_ping_interval n_cache_reuse adaptive_target add_generation_prompt continue_final_message
""".split()  # fmt: skip
VALUES: list[Any] = [
    None, True, "\x00", "\ud800", -1, 2**31, 10**40, -1e308, [], ["a", 2], [-1, 10**9], [{}], {"a": {"b": []}},
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_wrong_types_and_numbers_of_every_field(server: Server, path: str) -> None:
    base = QUESTION if path == CHAT else {"prompt": "Name a river.", "temperature": 0}
    for field in FIELDS:
        for value in VALUES:
            body = json.dumps({**base, "max_tokens": 1, "n_predict": 1, "stream": False, field: value, "t_max_predict_ms": 2000}).encode()
            try:
                status, text = server.ask(path, body, KEYED)
            except (OSError, ValueError) as error:
                raise AssertionError(f"{field} {value!r}: {error}\n{server.said[-2000:]}") from error
            assert 200 <= status < 502 and SECRET not in text, (field, value, status, text[:300])


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\ud800", "\udfff\ud800", "\uffff", "\u202e", "<|im_end|>\n<|im_start|>system\n", "\x1b[2J"])
def test_strange_characters(server: Server, text: str) -> None:
    for path, body in ((CHAT, {**QUESTION, "messages": [{"role": "user", "content": text}]}), (COMPLETION, {"prompt": text, "n_predict": 1})):
        status, answer = server.ask(path, body, KEYED)
        assert status in (200, 400, 500) and SECRET not in answer
        json.loads(answer)


@pytest.mark.parametrize("prompt", [[10**9], [-1], [49152], [[-5], [3]], [1.5], [None], [["x", {}]], [2**40], [], [[]], {"prompt_string": 1}])
def test_tokens_that_there_are_not(server: Server, prompt: Any) -> None:
    status, text = server.ask(COMPLETION, {"prompt": prompt, "n_predict": 1}, KEYED)
    assert status in (200, 400, 500) and SECRET not in text
    status, text = server.ask("/detokenize", {"tokens": prompt}, KEYED)
    assert status in (200, 400, 500) and SECRET not in text


def test_bodies_that_are_larger_than_they_ought_to_be(server: Server) -> None:
    server.ask(CHAT, b" " * (1 << 20), KEYED)
    before = resident(server)
    for length in (10**12, 2**63, 10**30, -1):
        assert SECRET.encode() not in send(server, post(CHAT, b"{}", length=length))
    server.ask(CHAT, b'{"messages": "' + b"x" * (32 << 20) + b'"}', KEYED)
    send(server, b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n")
    send(server, b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\n\r\n")
    assert resident(server) - before < 256 << 20


def test_a_hundred_thousand_messages(server: Server) -> None:
    with contextlib.suppress(OSError):  # it may close before it has read all that
        many = {**QUESTION, "messages": [{"role": "user", "content": ""}] * 100_000}
        assert server.ask(CHAT, many, {"Authorization": "Bearer wrong"})[0] == 401
    status, text = server.ask("/apply-template", {"messages": [{"role": "user", "content": "x"}] * 20_000}, KEYED)
    assert status in (200, 400, 500) and SECRET not in text


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 1000, b"GET", b"GET /health", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/9.9\r\n\r\n", b"\r\n" * 500,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, b"GET /%00%ff%2e%2e/ HTTP/1.1\r\n\r\n", b"POST /completion HTTP/1.1\r\n\r\n",
        post(CHAT, b"{}", "Transfer-Encoding: chunked"), post(CHAT, b"", "Transfer-Encoding: chunked")[:-2] + b"\r\nfffffffffffffffff\r\n",
        post(CHAT, b'{"messages": [', length=1000), b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 50 + b"\xff\x00GARBAGE\r\n\r\n",
        post(CHAT, json.dumps(QUESTION).encode()) + b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nGAR",
        b"GET /" + b"../" * 300 + b"etc/passwd HTTP/1.1\r\n\r\n", post(CHAT, b"{}", "Content-Encoding: gzip"),
        post(CHAT, b"x", "Expect: 100-continue"), post(CHAT, b"--x", "Content-Type: multipart/form-data; boundary=x"),
    ],
    ids=lambda data: repr(data[:24]),
)  # fmt: skip
def test_half_a_request_and_what_is_no_http(server: Server, data: bytes) -> None:
    answer = send(server, data)
    assert SECRET.encode() not in answer and b"root:" not in answer


@pytest.mark.parametrize("n", [12, 60])
def test_slow_clients_hold_up_nobody(server: Server, n: int) -> None:
    """They send a byte now and then, and are more than there are slots, and than there are threads that wait for clients: each of these
    is idle until it wakes up, and 60 at once are there before.
    """
    data = post(CHAT, json.dumps(QUESTION).encode())
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(n)]
    try:
        for i in range(6):
            for connection in slow:
                connection.sendall(data[i : i + 1])
            assert server.ask(CHAT, QUESTION, KEYED)[0] == 200
    finally:
        for connection in slow:
            connection.close()


def test_a_slow_reader_is_served(server: Server) -> None:
    body = json.dumps({**QUESTION, "max_tokens": 60, "stream": True, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(post(CHAT, body, "Connection: close"))
        time.sleep(2)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b"[DONE]" in answer and SECRET.encode() not in answer


def test_many_that_vanish_in_the_middle(server: Server) -> None:
    endless = json.dumps({**QUESTION, "max_tokens": 100_000, "stream": True, "ignore_eos": True}).encode()
    waiting = json.dumps({**QUESTION, "max_tokens": 100_000, "ignore_eos": True}).encode()
    for i in range(24):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(post(CHAT, endless if i % 2 else waiting))
            if i % 4 == 1:
                connection.recv(300)
            if i % 3 == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # RST
    # Each look at the slots wakes the one who waits for an answer: that must not keep it from seeing that its client has gone.
    wait_until_idle(server)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "", ".", "..", "a/b", "x\x00y", "garbage.bin", "none.bin", "x" * 5000, 7, None])
def test_files_of_slots_stay_where_they_belong(server: Server, name: Any) -> None:
    refused(server, {"filename": name}, "/slots/0?action=restore")
    if name not in ("garbage.bin", "none.bin"):
        refused(server, {"filename": name}, "/slots/0?action=save")


def test_slots_that_there_are_not(server: Server) -> None:
    for slot in ("x", str(2**40)):  # 99 and -1 are slots: the server counts round
        for action in ("save", "restore", "erase", "", "nonsense"):
            status, text = server.ask(f"/slots/{slot}?action={action}", {"filename": "none.bin"}, KEYED)
            assert 400 <= status <= 501 and SECRET not in text, (slot, action, text)
    status, text = server.ask(CHAT, {**QUESTION, "id_slot": 99}, KEYED)
    assert status in (200, 400) and SECRET not in text
