"""`python -m indexmem_edge.server`: llama-cpp-python's server, with the options of the cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("fastapi", "uvicorn", "pydantic_settings", "sse_starlette", "starlette_context", "yaml"):
    pytest.importorskip(needed)

from indexmem_edge.options import OPTIONS
from indexmem_edge.server.__main__ import require_packages
from support.serving import Server, free_port, listening

BUDGET = 256
TEXT = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
QUESTION = {"role": "user", "content": "Name a river."}


COMMAND = [sys.executable, "-m", "indexmem_edge.server", "--verbose", "false"]


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    with listening(*COMMAND, "--model", demo_model, "--kv_budget", BUDGET, path="/v1/models") as started:
        yield started


def said(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_a_conversation_longer_than_its_window(server: Server) -> None:
    """Without a budget the server has 2048 tokens, and refuses what is longer."""
    long = [{"role": "user", "content": TEXT[:10000] + "\nWhat was this about?"}]
    answer = server.chat(long)
    assert answer["usage"]["prompt_tokens"] > 2048 and said(answer)
    assert said(server.chat(long)) == said(answer)


def test_a_stream_says_the_same(server: Server) -> None:
    whole = said(server.chat([QUESTION]))
    body = {"messages": [QUESTION], "temperature": 0, "max_tokens": 12, "stream": True}
    status, text = server.ask("/v1/chat/completions", body)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200 and lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1]) == whole


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_mistake_of_the_request_is_told(server: Server, stream: bool) -> None:
    """As one that would fail again; a stream, whose status has been sent, ends with it."""
    system = {"role": "system", "content": TEXT[:4000]}
    status, text = server.ask("/v1/chat/completions", {"messages": [system, QUESTION], "max_tokens": 4, "stream": stream})
    if stream:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        text = events[-1]
    assert status == (200 if stream else 400)
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error" and f"kv_budget {BUDGET} is too small" in error["message"]
    assert said(server.chat([QUESTION])), "it goes on"


def test_who_leaves_in_the_middle_of_a_stream_keeps_nobody_waiting(server: Server) -> None:
    expected = said(server.chat([QUESTION]))
    body = {"messages": [{"role": "user", "content": "Count to a thousand."}], "max_tokens": 4000, "stream": True}
    with server.stream("/v1/chat/completions", body) as lines:
        for _ in range(6):
            next(lines)
    assert said(server.chat([QUESTION])) == expected


def test_models_of_a_config_file_have_each_their_own_cache(demo_model: Path, tmp_path: Path) -> None:
    models = [
        {"model": str(demo_model), "model_alias": "small", "kv_budget": BUDGET, "kv_pin": 0, "kv_policy": "keydiff", "verbose": False},
        {"model": str(demo_model), "model_alias": "plain", "verbose": False},
    ]
    port = free_port()
    (tmp_path / "config.json").write_text(json.dumps({"port": port, "models": models}), encoding="utf-8")
    with listening(*COMMAND, "--config_file", tmp_path / "config.json", port=port, path="/v1/models") as both:
        long = {"messages": [{"role": "user", "content": TEXT[:10000]}], "max_tokens": 4}
        assert both.ask("/v1/chat/completions", {**long, "model": "small"})[0] == 200
        status, text = both.ask("/v1/chat/completions", {**long, "model": "plain"})
        assert status == 400 and "2048" in text


def test_every_option_of_the_cache_is_a_flag() -> None:
    shown = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    for option in OPTIONS.values():
        assert f"--{option.keyword} " in shown.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--kv_budget", "20"), ("kv_budget 20 is too small",)),
        (("--kv_budget", "512", "--kv_policy", "nonsense"), ("nonsense",)),
        (("--kv_policy", "keydiff"), ("kv_policy needs a bounded KV cache",)),
        (("--kv_budget", "512", "--flash_attn", "false"), ("flash_attn=False",)),
    ],
)
def test_impossible_options_are_refused_in_one_line(demo_model: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    command = [*COMMAND, "--port", "1", "--model", str(demo_model), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: ")
    for word in words:
        assert word in ended.stderr


def test_what_it_is_made_with_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from indexmem_edge.errors import LibraryError

    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(LibraryError, match=r"not installed: pip install fastapi\. `indexmem serve` needs nothing"):
        require_packages()
