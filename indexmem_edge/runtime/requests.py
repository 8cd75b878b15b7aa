"""What applications send, in the form that llama_cpp and chat templates take, or refused with what to send instead."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, Optional, Union

import numpy as np

from .._vendor.llama_cpp import llama
from ..errors import RequestError
from .grammar import schema_grammar

Prompt = Union[str, list[int]]


def check_text(text: str, what: str) -> None:
    """Raises RequestError where the text has half a character, which no encoding has bytes for."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} has half a character (the lone surrogate {text[error.start]!a}) at {error.start:,}: replace it, with "
            'text.encode("utf-8", "replace").decode() for example'
        ) from None


def plain_prompt(prompt: Any) -> Prompt:
    """Text, or a list of token ids, whatever sequence they come in."""
    if isinstance(prompt, str):
        check_text(prompt, "the prompt")
        return prompt
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
        raise RequestError(f"a prompt is text or a list of token ids, found {prompt!r:.80}")
    return plain_tokens(prompt)


def plain_tokens(tokens: Iterable[Any]) -> list[int]:
    """Token ids as a list of numbers of Python."""
    if isinstance(tokens, np.ndarray):
        tokens = tokens.tolist()
    if isinstance(tokens, list) and (numbers := _plain_numbers(tokens)) is not None:
        return numbers
    try:
        found = [operator.index(token) for token in tokens]
    except TypeError:
        raise RequestError("a list of tokens has something in it that is no whole number: tokenize() makes one") from None
    if strange := [token for token in found if not -(1 << 31) <= token < 1 << 31]:
        raise RequestError(f"{strange[0]} is no token: those of a model are small numbers, as tokenize() makes them")
    return found


def _plain_numbers(tokens: list[Any]) -> Optional[list[int]]:
    """A copy of a list of nothing but numbers that tokens can have, None for any other: a conversation has many."""
    if not all(type(token) is int for token in tokens[:1]):
        return None
    try:
        found = np.array(tokens)
    except (ValueError, OverflowError):
        return None
    if found.ndim != 1 or found.dtype != np.int64 or found.min() < -(1 << 31) or found.max() >= 1 << 31:
        return None
    return found.tolist()  # type: ignore[no-any-return, unused-ignore]


def plain_messages(messages: Any, parts: bool) -> list[dict[str, Any]]:
    """Messages as chat templates know them: each has a role, and text as its content.

    Args:
        messages: a list of mappings. Content that is a list of text parts, as clients of OpenAI send it, becomes their lines.
        parts: whether the chat format reads parts itself; then they stay.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise RequestError(f'messages are a list such as [{{"role": "user", "content": "Hello"}}], found {messages!r:.80}')
    return [_plain_message(message, f"message {i}", parts) for i, message in enumerate(messages, 1)]


def _plain_message(message: Any, what: str, parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f'{what} must be like {{"role": "user", "content": "Hello"}}, found {message!r:.80}')
    content = message.get("content")
    if content is None:  # clients leave it out where a tool is called
        content = ""
    elif isinstance(content, (list, tuple)) and not parts:
        content = "\n".join(_text_of(part, what) for part in content)
    elif not isinstance(content, (str, list, tuple)):
        raise RequestError(f"the content of {what} must be text or a list of text parts, found {content!r:.80}")
    if isinstance(content, str):
        check_text(content, what)
    return {**message, "content": content}


def _text_of(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in ("text", "input_text", None) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise RequestError(
        f"{what} has a part {kind!r:.60}, and this chat format reads text alone: leave the part out, or give Llama a "
        "chat_handler that reads it"
    )


def check_completion(given: dict[str, Any], adds_bos: bool) -> None:
    """Raises RequestError if there is nothing to go on from: some models begin with a token of their own."""
    prompt = given["prompt"]
    if len(prompt) == 0 and given.get("suffix") is None and (isinstance(prompt, list) or not adds_bos):
        raise RequestError("the prompt is empty, and this model needs at least one token to go on from: give it some text")


def make_stop_plain(given: dict[str, Any]) -> None:
    """What ends an answer is a text or a list of them, where llama_cpp is told."""
    if given.get("stop") is not None and not isinstance(given["stop"], str):
        given["stop"] = list(given["stop"])


def make_chat_plain(given: dict[str, Any], parts: bool) -> None:
    """Brings the arguments of a chat completion into the form that chat formats take; `parts` as in `plain_messages`.

    Raises:
        RequestError, GrammarError: one of them cannot be.
    """
    given["messages"] = plain_messages(given["messages"], parts)
    make_stop_plain(given)
    if given.get("response_format") is not None:
        given["response_format"] = plain_response_format(given["response_format"])
    if given.get("tools") or given.get("tool_choice"):
        given["tool_choice"] = plain_tool_choice(given.get("tool_choice"), given.get("tools"))


def plain_response_format(wanted: Any) -> Optional[dict[str, Any]]:
    """`json_schema`, as OpenAI has it, becomes what llama_cpp calls a `json_object` with a schema.

    Raises:
        RequestError: there is no such format. GrammarError: there is a mistake in the schema.
    """
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = wanted.get("schema")
    elif kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, Mapping) else None
        if schema is None:
            raise RequestError(
                f"a response_format of type json_schema has the schema in json_schema.schema, found {wanted!r:.80}"
            )
    else:
        raise RequestError(f"the type of response_format must be text, json_object or json_schema, found {wanted!r:.80}")
    if schema is None:
        return {"type": "json_object"}
    schema_grammar(schema, "the schema of response_format")
    return {"type": "json_object", "schema": schema}


def plain_tool_choice(choice: Any, tools: Optional[list[Any]]) -> Any:
    """What to do about tools: "auto", "none" or the one to be called.

    Raises:
        RequestError: one has to be called, and it cannot be told which. GrammarError: its parameters are no schema.
    """
    names = [_tool_name(tool) for tool in tools or []]
    if choice == "required":
        if len(names) != 1:
            raise RequestError(
                'tool_choice "required" leaves the choice to the model, which cannot be held to it: name the tool, with '
                '{"type": "function", "function": {"name": ...}}'
            )
        choice = {"type": "function", "function": {"name": names[0]}}
    if choice is None or choice in ("auto", "none"):
        return choice
    name = _tool_name(choice)
    if name not in names:
        known = ", ".join(map(repr, names)) or "there are none"
        raise RequestError(f"tool_choice names {name!r}, which is none of the tools: {known}")
    tool = (tools or [])[names.index(name)]
    schema_grammar(tool["function"].get("parameters"), f"the parameters of the tool {name!r}")
    return choice


def _tool_name(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        form = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        raise RequestError(f"a tool is like {form}, found {tool!r:.80}")
    return function["name"]


class ReadOnly(llama.StoppingCriteriaList):
    """Ends a completion before its first token: after the prompt has been evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = False

    def __call__(self, input_ids: Any, logits: Any) -> bool:
        first, self._asked = not self._asked, True
        return first  # asked again at the end, it is not what the completion was stopped by
