"""Tokens of a text that goes on from another are those that the tokenizer makes of it from its beginning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from conftest import Tiny
from indexmem_edge import Llama
from indexmem_edge.native import find
from indexmem_edge.runtime import retokenized
from indexmem_edge.runtime.control import ControlTokens
from indexmem_edge.runtime.retokenized import Retokenizer

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

PIECES = [
    "<|im_start|>", "<|im_end|>", "<|im_start|>user\n", "<|im_end|>\n", "<s>", "</s>", "<unk>", "<|im_", "start|>", "|>", "<", "<<s>", "<|endoftext|>",
    " ", "  \n", "\n\n\n", "\t", "a", "word", " word", "words", "é", "日本", "😀", "0123456789" * 3,
]  # fmt: skip


@pytest.fixture(scope="module", params=["bpe", "spm"])
def llm(request: pytest.FixtureRequest, demo_model: Path, tiny: Tiny) -> Iterator[Any]:
    model = demo_model if request.param == "bpe" else tiny("llama")[0]
    with Llama(str(model), vocab_only=True, verbose=False) as made:
        yield made


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 40), st.lists(st.sampled_from(PIECES), max_size=30)), min_size=2, max_size=5),
    begins=st.booleans(),
)
def test_tokens_of_texts_that_go_on(llm: Any, steps: list[tuple[int, list[str]]], begins: bool) -> None:
    """Each text is the one before without its last pieces, and with others."""
    before, retokenized._SHORT = retokenized._SHORT, 1
    try:
        control = ControlTokens.of(llm._model.vocab)
        again = Retokenizer(llm._model.vocab, lambda: control)
        pieces: list[str] = []
        for dropped, more in steps:
            pieces = [*pieces[: max(len(pieces) - dropped, 0)], *more]
            text = "".join(pieces).encode()
            assert again.tokens(text, begins, lambda part, first: llm.tokenize(part, first, True)) == llm.tokenize(text, begins, True)
    finally:
        retokenized._SHORT = before


def test_a_turn_tokenizes_what_is_new(llm: Any) -> None:
    """However long the conversation is, and for other conversations all of it."""
    control = ControlTokens.of(llm._model.vocab)
    again, seen = Retokenizer(llm._model.vocab, lambda: control), []

    def tokenize(part: bytes, first: bool) -> list[int]:
        seen.append(len(part))
        return llm.tokenize(part, first, True)  # type: ignore[no-any-return]

    turn = "<|im_start|>user\nHow do you do?<|im_end|>\n<|im_start|>assistant\n"
    text = turn * 200
    for n in range(6):
        text += f"Fine {n}.<|im_end|>\n" + turn
        assert again.tokens(text.encode(), False, tokenize) == llm.tokenize(text.encode(), False, True)
    assert seen[0] > 12_000 and max(seen[1:]) < 200
    again.tokens(b"x" + text.encode(), False, tokenize)
    assert seen[-1] == len(text) + 1


def test_a_chat_tokenizes_what_is_new(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Llama(str(demo_model), kv_budget=96, kv_window=16, n_ctx=4096, verbose=False, n_threads=1) as llm, \
            Llama(str(demo_model), vocab_only=True, verbose=False) as other:  # fmt: skip
        seen: list[int] = []
        tokenize = type(llm).tokenize

        def counted(text: bytes, *args: Any, **kwargs: Any) -> Any:
            seen.append(len(text))
            return tokenize(llm, text, *args, **kwargs)

        monkeypatch.setattr(llm, "tokenize", counted)
        messages: list[Any] = [{"role": "user", "content": "One of many words. " * 400}]
        for _ in range(3):
            seen.clear()
            answer: Any = llm.create_chat_completion(messages, max_tokens=2, temperature=0)
            rendered = llm._prompts.tokens(messages)
            assert rendered == other._prompts.tokens(messages)
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "And?"}]
        assert max(seen) < 1000
