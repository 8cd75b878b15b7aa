"""What applications send: the right answer, or one clear error, with a budget and without."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import BudgetError, CacheWarning, GrammarError, ModelFileError, RequestError, SessionError, llama_cpp
from indexmem_edge._vendor.llama_cpp import LlamaGrammar
from indexmem_edge.native import find
from support.cancelling import TOKENS, Load, load

__all__ = ["load"]  # a fixture

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

both = pytest.mark.parametrize("kind", ["keydiff", "unbounded"])
budgets = pytest.mark.parametrize("budget", [None, 512])
GREEDY = {"temperature": 0.0, "max_tokens": 6}
UNENDING = {2: -1000.0, 261: -1000.0}  # </s> and <|im_end|>
HELLO = {"role": "user", "content": "Hello, who are you?"}
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> Any:
    made: dict[Any, Any] = {}

    def of(budget: int | None, **options: Any) -> Any:
        key = (budget, *options.items())
        if key not in made:
            if budget is not None:
                options |= {"kv_budget": budget, "kv_window": 32}
            threads = {"n_threads": 1, "n_threads_batch": 1}
            made[key] = indexmem_edge.Llama(demo_model, verbose=False, **{"n_ctx": 1024, **threads, **options})
        return made[key]

    return of


# grammars


BAD_GRAMMARS = {
    "unfinished": ("root ::= [", "unexpected end of input"),
    "no such rule": ("root ::= nothing", "nothing"),
    "no root": ('leaf ::= "a"', "root"),
    "left recursion": ('root ::= root "a"', "left recursion"),
    "no rule": ("Hello", "expecting ::="),
    "empty": ("  \n", "must be text"),
    "NUL": ('root ::= "a"\0', "NUL character at 12"),
    "half a character": ('root ::= "\ud83d"', "lone surrogate"),
    "too deep": ("root ::= " + "(" * 200_000 + '"a"' + ")" * 200_000, "200,000 groups"),
    "too many": ('root ::= "a"{100000000}', "repetitions"),
}


@both
@pytest.mark.parametrize("name", BAD_GRAMMARS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_with_a_mistake(load: Load, kind: str, name: str, stream: bool, capfd: Any) -> None:
    text, words = BAD_GRAMMARS[name]
    llm, grammar = load(kind), LlamaGrammar.from_string(text)
    capfd.readouterr()
    for ask in (
        lambda: llm.create_completion("A", max_tokens=3, grammar=grammar, stream=stream),
        lambda: llm.create_chat_completion([HELLO], max_tokens=3, grammar=grammar, stream=stream),
        lambda: next(llm.generate(TOKENS[:5], grammar=grammar)),
    ):
        with pytest.raises(GrammarError, match=words) as caught:
            ask()
        assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    llm.eval(TOKENS[:5])
    with pytest.raises(GrammarError, match=words):
        llm.sample(grammar=grammar)
    assert capfd.readouterr() == ("", "")
    assert llm.create_completion("A", max_tokens=3)["choices"]


@both
def test_what_is_no_grammar_at_all(load: Load, kind: str) -> None:
    with pytest.raises(RequestError, match="LlamaGrammar.from_string"):
        load(kind).create_completion("A", grammar='root ::= "a"')


@budgets
def test_brackets_in_literals_are_no_groups(demo: Any, budget: int | None) -> None:
    grammar = LlamaGrammar.from_string('root ::= "' + "(" * 5000 + '" [(] | "yes"')
    assert demo(budget).create_completion("Say yes:", grammar=grammar, **GREEDY)["choices"]


BAD_SCHEMAS: dict[str, Any] = {
    "no such type": {"type": "nonsense"},
    "no such reference": {"$ref": "#/$defs/missing"},
    "not an object": [1, 2],
    "text": "object",
    "properties of numbers": {"type": "object", "properties": {"a": 3}},
    "a pattern with a mistake": {"type": "string", "pattern": "a+"},
    "elsewhere": {"$ref": "https://example.org/schema.json"},
    "without end": None,
}
deep: dict[str, Any] = {"type": "string"}
for _ in range(3000):
    deep = {"type": "array", "items": deep}
BAD_SCHEMAS["without end"] = deep


@both
@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_a_schema_with_a_mistake(load: Load, kind: str, name: str) -> None:
    llm, schema = load(kind), BAD_SCHEMAS[name]
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    for options in (
        {"response_format": {"type": "json_object", "schema": schema}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "look"}}},
    ):
        with pytest.raises(GrammarError) as caught:
            llm.create_chat_completion([HELLO], max_tokens=3, **options)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# response_format


@budgets
@pytest.mark.parametrize("stream", [False, True])
def test_json_schema_is_json_object_with_a_schema(demo: Any, budget: int | None, stream: bool) -> None:
    llm, said = demo(budget), []
    for wanted in (
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "person", "description": "one", "strict": True, "schema": SCHEMA}},
    ):
        llm.reset()
        answer = llm.create_chat_completion([HELLO], response_format=wanted, temperature=0.0, max_tokens=30, stream=stream)
        if stream:
            said.append("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in answer))
        else:
            said.append(answer["choices"][0]["message"]["content"])
    assert said[0] == said[1] and isinstance(json.loads(said[0])["age"], int)
    assert llm.create_chat_completion([HELLO], response_format={"type": "text"}, **GREEDY)["choices"]


@both
@pytest.mark.parametrize("wanted", [{"type": "yaml"}, "json", {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x"}}])
def test_other_formats_are_refused(load: Load, kind: str, wanted: Any) -> None:
    with pytest.raises(RequestError, match=r"response_format .*(text, json_object or json_schema|json_schema\.schema)"):
        load(kind).create_chat_completion([HELLO], response_format=wanted)


# prompts


@both
def test_texts_and_tokens_of_all_kinds(load: Load, kind: str) -> None:
    llm = load(kind)
    expected = llm.create_completion(TOKENS[:30], **GREEDY)["choices"]
    for tokens in (np.array(TOKENS[:30]), tuple(TOKENS[:30]), [np.int64(token) for token in TOKENS[:30]], iter(TOKENS[:30])):
        llm.reset()
        answer = llm.create_completion(tokens, **GREEDY)
        assert answer["choices"] == expected and json.loads(json.dumps(answer)) == answer
    assert [*zip(range(3), llm.generate(np.array(TOKENS[:30]), temp=0.0))]
    assert llm.prefill(np.array(TOKENS[:40])) > 0
    text = "The sea\0 and the \0 wind"
    answer = llm.create_completion(text, echo=True, **GREEDY)
    assert answer["choices"][0]["text"].startswith(text) and answer["usage"]["prompt_tokens"] == 1 + len(text)


@both
@pytest.mark.parametrize("prompt", [b"The sea", 5, None, [1.5], ["The"], [[3, 4]]])
def test_what_is_no_prompt(load: Load, kind: str, prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt|tokens"):
        load(kind).create_completion(prompt)


@both
def test_half_a_character_is_named(load: Load, kind: str) -> None:
    llm = load(kind)
    for ask in (
        lambda: llm.create_completion("The \ud83d sea"),
        lambda: llm.create_chat_completion([{"role": "user", "content": "The \ud83d sea"}]),
        lambda: llm.prefill_chat([{"role": "user", "content": "The \ud83d sea"}]),
    ):
        with pytest.raises(RequestError, match=r"half a character \(the lone surrogate '\\ud83d'\) at 4"):
            ask()


@budgets
def test_an_empty_prompt(demo: Any, load: Load, budget: int | None) -> None:
    """Some models begin with a token of their own, and then it is a prompt."""
    for prompt in ("", []):
        with pytest.raises(RequestError, match="the prompt is empty"):
            demo(budget).create_completion(prompt, max_tokens=3)
    with pytest.raises(RequestError, match="the prompt is empty"):
        demo(budget).generate([])
    llm = load("unbounded" if budget is None else "keydiff")
    with pytest.raises(RequestError, match="nothing to sample"):
        llm.sample()
    assert llm.create_completion("", max_tokens=3)["usage"]["prompt_tokens"] == 1
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.create_completion([])


def test_paths_with_a_nul(load: Load) -> None:
    with pytest.raises(ModelFileError, match="null"):
        indexmem_edge.Llama("a\0b.gguf")
    llm = load("keydiff")
    for use in (llm.save_session, llm.load_session):
        with pytest.raises(SessionError, match="NUL"):
            use("a\0b")


# messages


@budgets
def test_contents_of_all_kinds(demo: Any, budget: int | None) -> None:
    llm = demo(budget)

    def ask(*contents: Any) -> Any:
        llm.reset()
        messages = [{"role": "user", "content": contents[0]}] if contents else [{"role": "user"}]
        return llm.create_chat_completion(messages, **GREEDY)["choices"]

    text = {"type": "text", "text": "Say hi."}
    assert ask([text]) == ask(({"type": "text", "text": "Say hi."},)) == ask(["Say hi."]) == ask("Say hi.")
    assert ask([text, {"type": "text", "text": "Now."}]) == ask("Say hi.\nNow.")
    assert ask(None) == ask() == ask([]) == ask("")
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": [text]}]
    assert llm.create_chat_completion(messages, **GREEDY)["choices"]
    assert llm.create_chat_completion([], **GREEDY)["choices"]
    assert llm.create_chat_completion(iter([HELLO]), **GREEDY)["choices"]
    assert llm.prefill_chat([{"role": "user", "content": [text]}]) > 0
    with pytest.raises(RequestError, match="no messages"):
        llm.prefill_chat([])


@both
@pytest.mark.parametrize(
    "messages, words",
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "message 1 has a part 'image_url'.*chat_handler"),
        ([HELLO, {"role": "user", "content": 5}], "content of message 2 must be text"),
        ([HELLO, {"content": "Hello"}], "message 2 must be like"),
        ([HELLO, "Hello"], "message 2 must be like"),
        ("Hello", "messages are a list"),
        (HELLO, "messages are a list"),
        (None, "messages are a list"),
    ],
)
def test_messages_that_cannot_be_read(load: Load, kind: str, messages: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        load(kind).create_chat_completion(messages)


def test_a_handler_of_ones_own_gets_the_parts(load: Load) -> None:
    llm, seen = load("unbounded"), []
    llm.chat_handler = lambda messages, **_: seen.append(messages)
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    llm.create_chat_completion([{"role": "user", "content": image}])
    assert seen == [[{"role": "user", "content": image}]]


# tools

TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("look", "listen")]
NAMED = {"type": "function", "function": {"name": "look"}}


@budgets
def test_tools_that_a_template_does_not_know(demo: Any, budget: int | None) -> None:
    llm = demo(budget, seed=1)
    with pytest.warns(RuntimeWarning, match="knows no tools") as caught:
        llm.create_chat_completion([HELLO], tools=TOOLS, tool_choice="auto", **GREEDY)
    assert caught[0].filename == __file__  # the application's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.create_chat_completion([HELLO], tools=TOOLS, **GREEDY)  # once
        llm.create_chat_completion([HELLO], tools=TOOLS, tool_choice="none", **GREEDY)
        for choice, tools in ((NAMED, TOOLS), ("required", TOOLS[:1])):
            options = {"temperature": 0.0, "max_tokens": 30}
            message = llm.create_chat_completion([HELLO], tools=tools, tool_choice=choice, **options)["choices"][0]["message"]
            assert isinstance(json.loads(message["tool_calls"][0]["function"]["arguments"])["age"], int)


@both
def test_a_template_that_knows_tools_needs_no_warning(load: Load, kind: str) -> None:
    """This one tells of them in the system message."""
    llm = load(kind)
    llm.chat_format = "chatml-function-calling"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CacheWarning)  # its system message is longer than the budget
        llm.create_chat_completion([{"role": "system", "content": "Help."}, HELLO], tools=TOOLS, tool_choice="auto", **GREEDY)


@both
@pytest.mark.parametrize(
    "options, words",
    [
        ({"tools": TOOLS, "tool_choice": "required"}, "name the tool"),
        ({"tool_choice": "required"}, "name the tool"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "smell"}}}, "'smell'.*'look', 'listen'"),
        ({"tools": TOOLS, "tool_choice": "look"}, "a tool is like"),
        ({"tools": [{"name": "look"}]}, "a tool is like"),
    ],
)
def test_choices_that_nobody_could_make(load: Load, kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        load(kind).create_chat_completion([HELLO], **options)


# how many tokens, and with which numbers


@both
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_no_tokens_are_no_tokens(load: Load, kind: str, stream: bool, chat: bool) -> None:
    llm = load(kind)
    if chat:
        answer = llm.create_chat_completion([HELLO], max_tokens=0, stream=stream)
    else:
        answer = llm.create_completion(TOKENS[:150], max_tokens=0, stream=stream)
    choice = (list(answer)[-1] if stream else answer)["choices"][0]
    assert choice["finish_reason"] == "length"
    read = llm.n_tokens
    if not stream:
        assert (choice["message"]["content"] if chat else choice["text"]) == ""
        assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}
    assert read > 30 and llm.kv_stats().tokens_seen == read
    prompt = llm._input_ids.tolist()
    assert prompt[:150] == TOKENS[:150] or chat
    assert llm.prefill([*prompt, 7]) == 1  # it has been evaluated


@both
@pytest.mark.parametrize("limit", [None, -1])
def test_no_limit_is_no_limit(load: Load, kind: str, limit: int | None) -> None:
    llm = load(kind, n_ctx=512)
    answer = llm.create_completion(TOKENS[:480], max_tokens=limit, logit_bias=UNENDING, temperature=0.0)
    assert answer["usage"]["completion_tokens"] == 512 - 480


@both
def test_a_prompt_can_be_watched_whatever_reads_it(load: Load, kind: str) -> None:
    llm, seen = load(kind), []
    with llm.watch(lambda done, total: seen.append((done, total))):
        list(llm.create_completion(TOKENS[:150], max_tokens=4, stream=True))
        assert seen == [(48, 150), (96, 150), (144, 150), (150, 150)]  # and none of the answer
        with llm.watch(lambda done, total: llm.cancel()), pytest.raises(indexmem_edge.Cancelled):
            llm.create_completion(TOKENS[200:350], max_tokens=4)
    llm.prefill(TOKENS[:300])
    assert len(seen) == 4


@pytest.mark.parametrize("logits_all", [False, True])
def test_a_length_that_the_library_rounds_up(load: Load, logits_all: bool) -> None:
    llm = load("unbounded", n_ctx=100, logits_all=logits_all)
    assert llm.n_ctx() == 256
    answer = llm.create_completion(TOKENS[:150], max_tokens=None, logit_bias=UNENDING, temperature=0.0)
    assert answer["usage"]["completion_tokens"] == 256 - 150


@budgets
def test_log_probabilities_of_a_prompt(demo: Any, budget: int | None) -> None:
    """Each is that of a token after those before it."""
    llm, text = demo(budget, logits_all=True), "The capital of France is Paris"
    tokens = llm.tokenize(text.encode(), add_bos=False)
    expected: list[Any] = [None]
    for i in range(1, len(tokens)):
        llm.reset()
        llm.eval(tokens[:i])
        row = llm.scores[i - 1].astype(np.float64)
        expected.append(row[tokens[i]] - row.max() - np.log(np.exp(row - row.max()).sum()))
    llm.reset()
    ask = {"logprobs": 2, "echo": True, "temperature": 0.0}
    for prompt, n in ((text, 0), (text, 2), (tokens, 2)):
        answer = llm.create_completion(prompt, max_tokens=n, **ask)
        assert json.loads(json.dumps(answer)) == answer
        choice = answer["choices"][0]
        found = choice["logprobs"]
        assert choice["text"].startswith(text) and "".join(found["tokens"]) == choice["text"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        np.testing.assert_allclose(found["token_logprobs"][1 : len(tokens)], expected[1:], atol=0.05)
        assert found["tokens"] == [llm.detokenize([token]).decode() for token in llm._input_ids[: len(tokens)]] + found["tokens"][len(tokens) :]
        assert [choice["text"][at:].startswith(name) for at, name in zip(found["text_offset"], found["tokens"])] == [True] * len(found["tokens"])
        for own, name, top in list(zip(found["token_logprobs"], found["tokens"], found["top_logprobs"]))[1:]:
            assert top[name] == own and max(top.values()) >= own and 2 <= len(top) <= 3
    chunks = list(llm.create_completion(text, max_tokens=2, logprobs=2, temperature=0.0, stream=True))
    assert json.loads(json.dumps(chunks)) == chunks
    alone = llm.create_completion(text, max_tokens=2, logprobs=2, temperature=0.0)
    assert json.dumps(alone) and len(alone["choices"][0]["logprobs"]["tokens"]) == 2
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(found["token_logprobs"][-2:], abs=0.05)


@both
def test_a_token_that_a_text_begins_with_is_not_part_of_the_echo(load: Load, kind: str) -> None:
    llm = load(kind, logits_all=True, n_ctx=512)
    choice = llm.create_completion("The sea", max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert choice["text"] == "The sea" and "".join(choice["logprobs"]["tokens"]) == "The sea"
    assert choice["logprobs"]["token_logprobs"][0] is None and None not in choice["logprobs"]["token_logprobs"][1:]


@both
def test_every_one_has_a_seed_of_its_own(load: Load, kind: str, tiny: Tiny) -> None:
    model, _ = tiny("llama")
    options = {"n_threads": 1, "n_threads_batch": 1, "verbose": False, "n_ctx": 512}
    if kind != "unbounded":
        options |= {"kv_budget": 96, "kv_window": 16}

    def answers(**seed: Any) -> list[str]:
        with indexmem_edge.Llama(model, **options, **seed) as llm:
            ask = {"max_tokens": 12, "temperature": 1.0, "logit_bias": {2: -100.0}}
            return [llm.create_completion(TOKENS[:20], **ask)["choices"][0]["text"] for _ in range(2)]

    for drawn in ({}, {"seed": None}, {"seed": -1}, {"seed": 0xFFFFFFFF}):
        found = [answers(**drawn) for _ in range(2)]
        assert found[0] != found[1] and found[0][0] != found[0][1]
    for given in (0, 1, 5):
        assert answers(seed=given) == answers(seed=given)
    assert answers(seed=0) != answers(seed=1)


def test_another_process_gives_another_answer(tiny: Tiny) -> None:
    model, _ = tiny("llama")
    program = (
        "import sys, indexmem_edge; llm = indexmem_edge.Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False); "
        "print(llm.create_completion([5, 6, 7], max_tokens=16, temperature=1.0, logit_bias={2: -100.0})['choices'][0]['text'].encode())"
    )
    said = [subprocess.run([sys.executable, "-c", program, model], check=True, capture_output=True).stdout for _ in range(2)]
    assert said[0] != said[1] and said[0]


def test_a_snapshot_needs_a_budget(load: Load) -> None:
    with pytest.raises(BudgetError, match="kv_snapshot needs a bounded KV cache"):
        load("unbounded").kv_snapshot()


def test_the_library_reads_grammars_of_llama_cpp(load: Load) -> None:
    """None that comes with it is refused."""
    llm = load("keydiff")
    from indexmem_edge._vendor.llama_cpp import llama_grammar

    texts = [value for name, value in vars(llama_grammar).items() if name.endswith("_GBNF")]
    assert len(texts) > 5
    for text in texts:
        assert llm.create_completion("A", max_tokens=1, grammar=llama_cpp.LlamaGrammar.from_string(text))["choices"]


# embeddings


def test_a_text_is_embedded_whole_or_not_at_all(tiny: Tiny) -> None:
    llm = indexmem_edge.Llama(tiny("llama")[0], embedding=True, n_ctx=512, n_batch=64, n_ubatch=64, n_threads=1, verbose=False)
    text = "abc " * 10
    assert llm.create_embedding(text)["usage"]["prompt_tokens"] == len(llm.tokenize(text.encode())) <= 64
    for input in (text * 20, ["abc", text * 20]):
        with pytest.raises(RequestError, match="n_batch 64"):
            llm.create_embedding(input)
    assert llm.embed(text * 20, truncate=True, return_count=True)[1] == 64
    llm.close()
