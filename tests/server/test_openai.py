"""The `openai` package talks to the server: what programs do with it works with a budget, and errors are its exceptions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")

from support.serving import SERVER, Server, free_port, serving

pytestmark = pytest.mark.skipif(SERVER is None, reason="the server has not been built (make server)")

BUDGET, KEY = 192, "of-this-test"
README = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
LONG = [{"role": "user", "content": README[:2400] + "\nSummarise this in one sentence."}]
SHORT = [{"role": "user", "content": "Name a river."}]
OPTIONS: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 16}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "inhabitants": {"type": "integer", "minimum": 0, "maximum": 9999999}},
    "required": ["name", "inhabitants"],
    "additionalProperties": False,
}


# That of the demo model knows no tools. This one writes them as Hermes and Qwen do.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}
Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    options = ("--kv-budget", BUDGET, "--kv-window", 48, "-np", 2, "-ub", 64, "-b", 128, "--slots", "--api-key", KEY)
    with serving(demo_model, *options, "--chat-template-file", template) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0, timeout=60)


def slots(server: Server) -> list[dict[str, Any]]:
    status, text = server.ask("/slots", headers={"Authorization": f"Bearer {KEY}"})
    assert status == 200, text
    return list(json.loads(text))


def wait_until_idle(server: Server, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while any(slot["is_processing"] for slot in slots(server)):
        assert time.monotonic() < end, "a slot goes on for nobody"
        time.sleep(0.05)


def test_a_conversation_costs_its_turns(server: Server, client: Any) -> None:
    first = client.chat.completions.create(messages=LONG, **OPTIONS)
    assert first.usage.prompt_tokens > 3 * BUDGET and first.choices[0].message.content
    assert any(slot["kv"]["evicted"] > 0 for slot in slots(server))
    history = [*LONG, first.choices[0].message.model_dump(include={"role", "content"}), *SHORT]
    second = client.chat.completions.create(messages=history, **OPTIONS)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.prompt_tokens - second.usage.prompt_tokens_details.cached_tokens <= 64


def test_a_stream_says_the_same(client: Any) -> None:
    client.chat.completions.create(messages=SHORT, **OPTIONS)  # what is read of the prompt is the same then, to the last bit
    whole = client.chat.completions.create(messages=SHORT, **OPTIONS)
    parts = list(client.chat.completions.create(messages=SHORT, stream=True, stream_options={"include_usage": True}, **OPTIONS))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [part.choices[0].finish_reason for part in parts if part.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])


def test_a_tool_is_called_with_what_its_schema_wants(client: Any) -> None:
    def called(city: str) -> dict[str, Any]:
        function = {"name": "get_weather", "arguments": json.dumps({"city": city, "unit": "celsius"})}
        return {"role": "assistant", "content": "", "tool_calls": [{"id": city, "type": "function", "function": function}]}

    history: list[dict[str, Any]] = []
    for city in ("Paris", "Oslo"):  # how it is done, for a small model
        history += [{"role": "user", "content": f"What is the weather in {city}?"}, called(city)]
    history += [{"role": "user", "content": "What is the weather in Rome?"}]
    options = {**OPTIONS, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"}
    choice = client.chat.completions.create(messages=history, **options).choices[0]
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and choice.finish_reason == "tool_calls"
    assert arguments["city"] == "Rome" and arguments["unit"] in ("celsius", "fahrenheit")

    parts = client.chat.completions.create(messages=history, stream=True, **options)
    streamed = [part.choices[0].delta.tool_calls[0].function for part in parts if part.choices and part.choices[0].delta.tool_calls]
    assert "".join(part.arguments or "" for part in streamed) == call.function.arguments
    history += [choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}]
    assert client.chat.completions.create(messages=history, tools=[TOOL], tool_choice="none", **OPTIONS).choices[0].message


def test_a_schema_is_kept(client: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    options = {**OPTIONS, "max_tokens": 100}
    answer = client.chat.completions.create(messages=[{"role": "user", "content": "A city."}], response_format=schema, **options)
    city = json.loads(answer.choices[0].message.content)
    assert set(city) == {"name", "inhabitants"} and isinstance(city["inhabitants"], int)


def test_it_stops_where_it_is_told_to(client: Any) -> None:
    whole = client.completions.create(prompt="One, two, three, four,", **OPTIONS).choices[0].text
    word = whole.split()[2]
    cut = client.completions.create(prompt="One, two, three, four,", stop=[word], **OPTIONS).choices[0]
    assert cut.text == whole[: whole.index(word)] and cut.finish_reason == "stop"


def test_logprobs(client: Any) -> None:
    answer = client.chat.completions.create(messages=SHORT, logprobs=True, top_logprobs=3, **OPTIONS).choices[0]
    assert len(answer.logprobs.content) >= 3
    for token in answer.logprobs.content:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True) and values[0] <= 0
        assert token.token == token.top_logprobs[0].token and token.logprob == pytest.approx(values[0])


def test_who_leaves_in_the_middle_of_a_stream_frees_the_slot(server: Server, client: Any) -> None:
    expected = client.chat.completions.create(messages=SHORT, **OPTIONS).choices[0].message.content
    endless = {**OPTIONS, "max_tokens": 100_000, "extra_body": {"ignore_eos": True}}
    for _ in range(3):
        stream = client.chat.completions.create(messages=LONG, stream=True, **endless)
        for _ in range(4):
            next(stream)
        stream.close()
    wait_until_idle(server)
    assert client.chat.completions.create(messages=SHORT, **OPTIONS).choices[0].message.content == expected


def test_who_leaves_while_the_prompt_is_read_frees_the_slot(server: Server, client: Any) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(messages=[{"role": "user", "content": README}], **OPTIONS)
    wait_until_idle(server)
    assert client.chat.completions.create(messages=SHORT, **OPTIONS).choices[0].message.content


def test_other_interfaces_of_the_package(client: Any) -> None:
    assert len(client.models.list().data) == 1
    answer = client.responses.create(model="any", input="Name a river.", max_output_tokens=16, temperature=0)
    assert answer.output_text


def test_many_at_once_get_each_their_own_answer(server: Server) -> None:
    names = ["Rosa", "Emil", "Kim", "Ada", "Hugo", "Nora"]  # three times as many as there are slots

    async def ask(client: Any, name: str) -> str:
        messages = [{"role": "system", "content": f"Your name is {name}."}, {"role": "user", "content": "What is your name?"}]
        return str((await client.chat.completions.create(messages=messages, **OPTIONS)).choices[0].message.content)

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0) as client:
            return list(await asyncio.gather(*(ask(client, name) for name in names)))

    answers = asyncio.run(all_of_them())
    assert sum(name in text for name, text in zip(names, answers)) >= 2  # of a small model
    for name, text in zip(names, answers):
        assert not any(other in text for other in names if other != name)


def test_errors_are_its_exceptions(server: Server, client: Any) -> None:
    with pytest.raises(openai.AuthenticationError, match=r"(?i)key"):
        client.with_options(api_key="wrong").chat.completions.create(messages=SHORT, **OPTIONS)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(messages=SHORT, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}, **OPTIONS)
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(messages="nobody", **OPTIONS)
    with pytest.raises(openai.NotFoundError):
        client.get("/nowhere", cast_to=object)
    with pytest.raises(openai.APIStatusError, match="embedding"):
        client.embeddings.create(model="any", input="x")
    with pytest.raises(openai.APIConnectionError):
        client.with_options(base_url=f"http://127.0.0.1:{free_port()}/v1").models.list()
    assert client.chat.completions.create(messages=SHORT, **OPTIONS).choices[0].message.content
