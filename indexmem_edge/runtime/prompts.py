"""What a chat format makes of messages: prompts in which contents are text, and the part of them that is the system's.

Chat formats are functions that render messages, tokenize the text with a `Llama` and have that generate. They are given a
`_View` of it in its place, which tokenizes what people wrote as text, and either passes the prompt on or catches it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional

from .._vendor.llama_cpp import llama_chat_format as chat_format
from .._vendor.llama_cpp.llama_tokenizer import LlamaTokenizer
from ..options import CacheOptions
from .align import common_prefix
from .control import VISIBLE, ControlTokens, came_back, count, marker_for
from .inside import Inside
from .notices import SYSTEM, TEMPLATE, Notices
from .retokenized import Retokenizer

Messages = list[dict[str, Any]]
_SYSTEM_ROLES = ("system", "developer")
_FALLBACK = "llama-2"  # what llama-cpp-python writes for a model without a template
_OF_IMAGES = (chat_format.Llava15ChatHandler, chat_format.MTMDChatHandler)


@dataclass(frozen=True)
class _System:
    """Renderings that begin as every prompt with a certain system prompt does, and what it adds to a prompt."""

    key: str  # what they were rendered from
    renderings: tuple[list[int], ...] = ()
    added: Optional[int] = 0  # tokens; None if the template leaves it out


class _Caught(Exception):
    def __init__(self, prompt: Any) -> None:
        super().__init__()
        self.prompt = prompt


class _CaughtText(Exception):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class _Unmarked(Exception):
    """The markers in the messages did not come back."""


@dataclass
class _Marked:
    """Messages in which control tokens are broken up by a marker, and what to make of their rendering."""

    control: ControlTokens
    marker: str
    expected: int  # markers in the messages
    plain: Optional[str]  # the rendering of the messages without markers, if it is known
    seen: bool = False  # the rendering has been tokenized


class _View:
    """A `Llama` as a chat format sees it."""

    def __init__(self, llm: Inside, finish: Callable[..., Any], again: Retokenizer, marked: Optional[_Marked] = None) -> None:
        self.__dict__.update(_inside=llm, _llm=llm.public, _finish=finish, _again=again, _marked=marked)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._llm, name, value)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """See `llama_cpp.Llama.tokenize`."""
        marked: Optional[_Marked] = self._marked
        rendered = text.decode("utf-8", "replace") if marked is not None else ""
        if marked is None or marked.marker not in rendered:
            if marked is not None and rendered == marked.plain:
                marked.seen = True  # what was broken up is not in the prompt
            return self._plain(text, add_bos, special)
        if not came_back(rendered, marked.marker, marked.expected, marked.plain):
            raise _Unmarked
        marked.seen = True
        return marked.control.tokens(
            rendered,
            marked.marker,
            add_bos,
            lambda part, control: list(self._llm.tokenize(part, add_bos=False, special=control)),
            self._inside.vocab,
        )

    def _plain(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        if not special or type(self._llm.tokenizer_) is not LlamaTokenizer:
            return list(self._llm.tokenize(text, add_bos=add_bos, special=special))
        return self._again.tokens(text, add_bos, lambda part, begins: self._llm.tokenize(part, add_bos=begins, special=True))

    def create_completion(self, prompt: Any, **arguments: Any) -> Any:
        """See `llama_cpp.Llama.create_completion`."""
        marked: Optional[_Marked] = self._marked
        if marked is not None and isinstance(prompt, str) and marked.marker in prompt:
            prompt = self.tokenize(prompt.encode(), add_bos=True, special=True)
        if marked is not None and not marked.seen:
            raise _Unmarked
        return self._finish(prompt, **arguments)


class _TextCatcher(_View):
    """Stops a chat format where it tokenizes what it has rendered."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        raise _CaughtText(text.decode("utf-8", "replace"))


def _catch(prompt: Any, **_: Any) -> Any:
    raise _Caught(prompt)


def _lead(content: Any) -> str:
    """A character that the content does not begin with."""
    return "A" if not (isinstance(content, str) and content.lstrip()[:1] == "A") else "0"


def _leading_system(messages: Messages) -> Messages:
    n = 0
    while n < len(messages) and messages[n].get("role") in _SYSTEM_ROLES:
        n += 1
    return messages[:n]


class ChatPrompts:
    """The prompts of one `Llama`'s chats. What is known of its chat format is kept, so that a turn renders its conversation once.

    Args:
        fallback: the model's file has no chat template, and none was named.
    """

    def __init__(self, llm: Inside, options: CacheOptions, notices: Notices, fallback: bool) -> None:
        self._llm, self._options, self._notices, self._fallback = llm, options, notices, fallback
        self._system = _System("")
        self._again = Retokenizer(llm.vocab, lambda: self.control)

    @cached_property
    def control(self) -> ControlTokens:
        """The control tokens of the model."""
        return ControlTokens.of(self._llm.vocab)

    def run(self, messages: Any, finish: Callable[..., Any], **arguments: Any) -> Any:
        """Has the chat format answer messages, whose contents are text whatever is in them.

        Args:
            finish: called with the prompt and the arguments of `create_completion`, in place of that.
            arguments: others of `create_chat_completion`.
        """
        llm, handler = self._llm, self._llm.chat_function
        if isinstance(handler, _OF_IMAGES):
            return handler(llama=llm.public, messages=messages, **arguments)
        marker = marker_for(messages)
        broken = self.control.broken(messages, marker)
        if not (expected := count(broken, marker)):
            return handler(llama=_View(llm, finish, self._again), messages=messages, **arguments)
        if type(llm.public.tokenizer_) is LlamaTokenizer:  # another one knows of no plain text
            marked = _Marked(self.control, marker, expected, self._rendered(messages, arguments))
            try:
                return handler(llama=_View(llm, finish, self._again, marked), messages=broken, **arguments)
            except _Unmarked:
                pass
        visible = self.control.broken(messages, VISIBLE)
        return handler(llama=_View(llm, finish, self._again), messages=visible, **arguments)

    def _rendered(self, messages: Any, arguments: dict[str, Any]) -> Optional[str]:
        """The prompt as text, or None if the chat format does not make one."""
        try:
            self._llm.chat_function(llama=_TextCatcher(self._llm, _catch, self._again), messages=messages, **arguments)
        except _CaughtText as caught:
            return caught.text
        except _Caught as caught:
            return caught.prompt if isinstance(caught.prompt, str) else None
        return None

    def prompt_of(self, messages: Messages, **template: Any) -> Any:
        """The prompt for the next answer, for any format: it is caught on its way to the model. None if there is no such way."""
        if isinstance(self._llm.chat_function, _OF_IMAGES):
            return None
        try:
            self.run(messages, _catch, **template)
        except _Caught as caught:
            return caught.prompt
        return None

    def tokens(self, messages: Messages, **template: Any) -> Optional[list[int]]:
        """Its tokens, or None if the chat format does not work in tokens."""
        prompt = self.prompt_of(messages, **template)
        return prompt if isinstance(prompt, list) else None

    def open_prefix(self, messages: Messages, **template: Any) -> Optional[list[int]]:
        """Tokens that stay the same when a new paragraph is added to the last message."""
        ends = []
        for lead in ("A", "0"):
            last = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{lead}"}
            ends.append(self.tokens([*messages[:-1], last], **template))
        if ends[0] is None or ends[1] is None:
            return None
        return ends[0][: common_prefix(ends[0], ends[1])]

    # the system prompt, and whether the format is right

    def system_prefix(self, messages: Messages, prompt: list[int], **template: Any) -> int:
        """Number of leading tokens of `prompt` that the template makes of the leading system messages.

        Includes a system prompt that the template adds by itself. May include the first tokens of the next message's
        header, which are the same whatever follows. Says so if the system prompt is not at the beginning of the prompt.
        """
        system = _leading_system(messages)
        if len(system) == len(messages):
            return 0  # nothing but system messages: no telling where they end
        known = self._known(system, _lead(messages[len(system)].get("content")), template)
        prefix = max((common_prefix(rendered, prompt) for rendered in known.renderings), default=0)
        if known.added is not None and prefix < known.added:
            self._notices.tell_once(
                SYSTEM,
                "the chat format does not put the system prompt at the beginning of the conversation, so it cannot be pinned and "
                "is evicted like other text",
            )
        return prefix

    def check(self, messages: Messages, **template: Any) -> None:
        """Says it if the chat format is not the model's own, or leaves the system prompt out."""
        public = self._llm.public
        if isinstance(self._llm.chat_function, _OF_IMAGES):
            return
        if self._fallback and public.chat_handler is None and public.chat_format == _FALLBACK:
            self._notices.tell_once(
                TEMPLATE,
                f"the model file has no chat template, so messages are written in the format {_FALLBACK}, which may not be the one "
                "it was trained with: name another with --chat-template NAME|FILE (chat_format= or chat_handler= in Python)",
            )
        system = _leading_system(messages)
        if not system or len(system) == len(messages):
            return
        if self._known(system, _lead(messages[len(system)].get("content")), template).added is None:
            name = "" if public.chat_handler else f" {public.chat_format}"
            self._notices.tell_once(
                SYSTEM,
                f"the chat format{name} leaves the system prompt out: write it into the first message, or name another format with "
                "--chat-template NAME|FILE (chat_format= in Python)",
            )

    def rehearse(self, system: Optional[str]) -> None:
        """Looks at the format of a chat that has not begun, and at its system prompt.

        Raises:
            BudgetError: the system prompt is to be pinned, and there is no room for it.
        """
        messages: Messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": "Hello"})
        self.check(messages)
        if self._options.bounded and self._options.auto_pin:
            prompt = self._attempt(messages, {})
            pin = self.system_prefix(messages, prompt) if prompt is not None else 0
            self._options.require_room(pin, "the system prompt of")

    def _known(self, system: Messages, lead: str, template: dict[str, Any]) -> _System:
        """Rendered alone and before a user's message, since templates may want one, or put the system prompt into it."""
        public = self._llm.public
        key = json.dumps([system, lead, template, public.chat_format, id(public.chat_handler)], default=str)
        if self._system.key != key:
            probe = {"role": "user", "content": lead}
            alone = self._attempt(system, template) if system else None
            before = self._attempt([*system, probe], template)
            without = self._attempt([probe], template) if system else None
            added: Optional[int] = 0
            if before is not None and without is not None:
                added = None if before == without else max(len(before) - len(without), 0)
            self._system = _System(key, tuple(tokens for tokens in (alone, before) if tokens is not None), added)
        return self._system

    def _attempt(self, messages: Messages, template: dict[str, Any]) -> Optional[list[int]]:
        try:
            return self.tokens(messages, **template)
        except Exception:  # templates may refuse a conversation without a user's message
            return None
