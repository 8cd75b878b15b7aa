"""What should not pass unnoticed is said: to the owner's function, or as a warning of Python's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import BudgetError, CacheWarning
from indexmem_edge._vendor.llama_cpp.llama_chat_format import Jinja2ChatFormatter
from indexmem_edge.errors import ModelFileError
from indexmem_edge.native import find
from tiny.gguf_copy import copy_model
from tiny.models import FIRST_FILLER

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

BUDGET, WINDOW = 96, 16
TOKENS = [FIRST_FILLER + i % 50 for i in range(400)]
SYSTEM = {"role": "system", "content": "You are a terse pirate. The code is 7781."}
HELLO = {"role": "user", "content": "Hello."}
LLAMA2 = (  # as the files of Llama-2-chat have it: the system prompt is part of the first message
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LAST = (  # as some of Mistral have it: it is part of the last message
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}{% if loop.last and messages[0]['role'] == 'system' %}"
    "[INST]{{ messages[0]['content'] }} {{ m['content'] }}[/INST]{% else %}[INST]{{ m['content'] }}[/INST]{% endif %}{% endfor %}"
)
DEAF = "{% for m in messages if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% endfor %}"


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    return tiny("llama", n_ctx_train=256)[0]


def load(model: Path, **options: Any) -> Any:
    defaults = {"kv_budget": BUDGET, "kv_window": WINDOW, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}
    return indexmem_edge.Llama(model, verbose=False, **{**defaults, **options})


def listening(model: Path, **options: Any) -> tuple[Any, list[CacheWarning]]:
    heard: list[CacheWarning] = []
    return load(model, kv_warn=heard.append, **options), heard


def kinds(heard: list[CacheWarning]) -> list[str]:
    found = [warning.kind for warning in heard]
    heard.clear()
    return found


def templated(llm: Any, template: str) -> None:
    llm.chat_handler = Jinja2ChatFormatter(template, "</s>", "<s>").to_chat_handler()


# the cache


def test_what_is_dropped_renewed_and_evaluated_again_is_said(model: Path) -> None:
    llm, heard = listening(model, kv_checkpoints=0)
    llm.prefill(TOKENS[:BUDGET])
    assert kinds(heard) == []
    llm.prefill(TOKENS[:200])
    assert "the KV budget of 96 is reached: from now on the policy `streaming` drops entries" in str(heard[0])
    assert kinds(heard) == ["dropped"]
    llm.prefill(TOKENS[:250])
    assert kinds(heard) == []
    llm.prefill(TOKENS)
    assert "position 256 has been reached" in str(heard[0]) and kinds(heard) == ["renewed"]
    llm.prefill([*TOKENS[:50], 100])
    assert str(heard[0]).startswith("50 cached tokens had to be evaluated again: the prompt departs") and kinds(heard) == ["evaluated again"]
    llm.prefill(TOKENS)
    llm.prefill([*TOKENS[:50], 100])
    assert kinds(heard) == ["evaluated again"]  # each time
    llm.reset()
    llm.prefill(TOKENS[:200])
    assert kinds(heard) == ["dropped"]  # in another conversation


def test_positions_beyond_the_trained_length_are_said_once_with_and_without_a_budget(model: Path) -> None:
    for options in ({"kv_span": 0}, {"kv_budget": None, "kv_window": None, "n_ctx": 1024}):
        llm, heard = listening(model, **options)
        llm.prefill(TOKENS[:256])
        heard.clear()
        llm.prefill(TOKENS[:300])
        llm.prefill(TOKENS[:310])
        assert "beyond the 256 tokens" in str(heard[0]) and kinds(heard) == ["beyond trained length"]


def test_a_loaded_conversation_is_not_said_to_begin_anew(model: Path, tmp_path: Path) -> None:
    first, _ = listening(model)
    first.prefill(TOKENS)
    first.save_session(tmp_path / "s")
    llm, heard = listening(model)
    llm.load_session(tmp_path / "s")
    llm.prefill([*TOKENS, 100])
    assert kinds(heard) == ["dropped"]


def test_without_a_function_it_is_a_warning_once_an_object(model: Path) -> None:
    for _ in range(2):
        llm = load(model)
        with pytest.warns(CacheWarning, match="budget of 96 is reached") as caught:
            llm.prefill(TOKENS[:200])
            llm.reset()
            llm.prefill(TOKENS[:200])
        assert len(caught) == 1 and issubclass(CacheWarning, UserWarning)


def test_a_warning_that_is_an_error_leaves_everything_in_order(model: Path) -> None:
    llm = load(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        with pytest.raises(CacheWarning):
            llm.prefill(TOKENS[:200])
    seen = llm.n_tokens
    assert seen == llm.kv_stats().tokens_seen > BUDGET
    assert llm.prefill(TOKENS[:200]) == 200 - seen

    def fail(warning: CacheWarning) -> None:
        raise RuntimeError(str(warning))

    llm.kv_warn = fail
    with pytest.raises(RuntimeError, match="evaluated again"):
        llm.prefill([*TOKENS[:50], 100])
    assert llm.prefill([*TOKENS[:50], 100]) == 0 and llm.kv_stats().tokens_seen == 51


# chat formats


@pytest.mark.parametrize("template", [None, LLAMA2])
def test_a_system_prompt_is_pinned_wherever_the_template_puts_it(model: Path, template: str | None) -> None:
    llm, heard = listening(model, kv_budget=256)
    if template:
        templated(llm, template)
    for question in (HELLO, {"role": "user", "content": "A" + "nd the tide? " * 30}):
        llm.create_chat_completion([SYSTEM, question], max_tokens=1)
        pin = llm.kv_stats().pin
        pinned = llm.detokenize(llm._input_ids[:pin].tolist(), special=True).decode()
        assert SYSTEM["content"] in pinned and "tide" not in pinned and "Hello" not in pinned
    assert llm.kv_stats().evicted > 0 and "system prompt" not in kinds(heard)
    held = [head for layer in llm.kv_snapshot().values() for head in layer]
    assert all(head[:pin].tolist() == list(range(pin)) for head in held)


def test_a_system_prompt_that_cannot_be_pinned_is_said(model: Path) -> None:
    llm, heard = listening(model, kv_budget=256)
    templated(llm, LAST)
    llm.create_chat_completion([SYSTEM, HELLO], max_tokens=1)
    assert "system prompt" not in kinds(heard)
    talk = [SYSTEM, HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Why?"}]
    llm.create_chat_completion(talk, max_tokens=1)
    assert "cannot be pinned" in str(next(w for w in heard if w.kind == "system prompt"))


@pytest.mark.parametrize("options", [{}, {"kv_budget": None, "kv_window": None, "n_ctx": 1024}])
def test_a_system_prompt_that_the_format_leaves_out_is_said(model: Path, options: dict[str, Any]) -> None:
    llm, heard = listening(model, **options)
    for format_name in ("mistral-instruct", "template"):
        if format_name == "template":
            templated(llm, DEAF)
        else:
            llm.chat_format = format_name
        llm.reset()
        llm.create_chat_completion([HELLO], max_tokens=1)
        assert kinds(heard) == []
        llm.create_chat_completion([SYSTEM, HELLO], max_tokens=1)
        assert "leaves the system prompt out" in str(heard[0]) and kinds(heard)[0] == "system prompt"
    llm.chat_handler, llm.chat_format = None, "chatml"
    llm.reset()
    llm.create_chat_completion([SYSTEM, HELLO], max_tokens=1)
    assert "system prompt" not in kinds(heard)


def test_a_model_without_a_template_is_said_to_have_none(model: Path, tmp_path: Path) -> None:
    bare = copy_model(model, tmp_path / "bare.gguf", metadata={"tokenizer.chat_template": None})
    llm, heard = listening(bare)
    llm.create_completion("Hello", max_tokens=1)
    assert kinds(heard) == []
    llm.create_chat_completion([HELLO], max_tokens=1)
    assert "the model file has no chat template" in str(heard[0]) and "llama-2" in str(heard[0])
    assert kinds(heard) == ["chat template"]
    named, heard = listening(bare, chat_format="chatml")
    named.create_chat_completion([HELLO], max_tokens=1)
    assert kinds(heard) == []
    llm.use_chat_format("chatml")
    llm.reset()
    assert llm._prompts.tokens([HELLO]) == named._prompts.tokens([HELLO])


def test_another_format_by_name_or_file(model: Path, tmp_path: Path) -> None:
    llm, _ = listening(model)
    (tmp_path / "own.jinja").write_text("{{ bos_token }}{% for m in messages %}Q: {{ m.content }}{% endfor %}{{ eos_token }}")
    llm.use_chat_format(str(tmp_path / "own.jinja"))
    assert llm._prompts.tokens([HELLO]) == llm.tokenize(b"<s>Q: Hello.</s>", add_bos=False, special=True)
    llm.use_chat_format("chatml")
    assert llm.chat_handler is None and llm.chat_format == "chatml"
    with pytest.raises(ModelFileError, match="neither a file with a Jinja template nor a chat format: .*chatml.*zephyr"):
        llm.use_chat_format("no such")
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(ModelFileError, match="not a Jinja template"):
        llm.use_chat_format(str(tmp_path / "bad.jinja"))


def test_a_chat_is_rehearsed_before_it_begins(model: Path) -> None:
    llm, heard = listening(model)
    llm.rehearse(None)
    llm.rehearse("Be brief.")
    assert kinds(heard) == [] and llm.n_tokens == 0
    with pytest.raises(BudgetError, match="the system prompt of"):
        llm.rehearse("Be brief. " * 30)
    templated(llm, DEAF)
    llm.rehearse("Be brief.")
    assert kinds(heard) == ["system prompt"]


def test_a_turn_renders_its_conversation_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = listening(model, kv_budget=256)
    rendered: list[int] = []
    tokenize = llm.tokenize
    monkeypatch.setattr(llm, "tokenize", lambda text, *a, **k: (rendered.append(len(text)), tokenize(text, *a, **k))[1])
    talk = [SYSTEM, {"role": "user", "content": "The tide. " * 20}]
    for _ in range(3):
        llm.create_chat_completion(talk, max_tokens=1)
        talk += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And? " * 10}]
        assert sum(n > 200 for n in rendered) == 1  # the others are of the system prompt alone
        rendered.clear()
    assert llm.kv_stats().pin > 0
