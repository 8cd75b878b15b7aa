"""What an application gets back where llama_cpp would give something else: characters that are cut, biases beside processors, errors."""

from __future__ import annotations

import gc
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import Llama
from indexmem_edge._vendor.llama_cpp import LlamaGrammar, LlamaRAMCache, LogitsProcessorList
from indexmem_edge._vendor.llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from indexmem_edge._vendor.llama_cpp.llama_tokenizer import LlamaTokenizer
from indexmem_edge.errors import BudgetError, IndexMemError, RequestError, SessionError
from indexmem_edge.files.modelfile import fingerprint

N_CTX = 256  # as llama.cpp rounds it
QUIET: dict[str, Any] = {"verbose": False, "n_threads": 1}


@pytest.fixture(scope="module", params=[64, None], ids=["bounded", "unbounded"])
def llm(request: pytest.FixtureRequest, demo_model: Path) -> Iterator[Llama]:
    with Llama(str(demo_model), kv_budget=request.param, **({"kv_window": 16} if request.param else {}), n_ctx=N_CTX, n_batch=64, seed=1, **QUIET) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("left", range(4, 8))
def test_an_answer_that_ends_in_a_character(llm: Llama, left: int, stream: bool) -> None:
    """At the end of the context, and at `max_tokens`."""
    grammar = LlamaGrammar.from_string('root ::= "日本語😀"+', verbose=False)
    prompt = [llm.token_bos()] + [400] * (N_CTX - left - 1)
    for asked in (None, left - 3):
        answer: Any = llm.create_completion(prompt, max_tokens=asked, temperature=0, grammar=grammar, stream=stream)
        if stream:
            parts = list(answer)
            assert parts[-1]["choices"][0]["finish_reason"] == "length"
        else:
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == (left if asked is None else asked)


def test_a_bias_and_a_processor(llm: Llama) -> None:
    seen = []
    processors = LogitsProcessorList([lambda tokens, logits: (seen.append(1), logits)[1]])
    token = llm.tokenize(b"!", add_bos=False)[0]
    answer = llm.create_completion("The", max_tokens=3, temperature=0, logit_bias={token: 100.0}, logits_processor=processors)
    assert answer["choices"][0]["text"] == "!!!" and len(seen) >= 3 and len(processors) == 1


def test_a_stream_copies_a_prompt_only_for_tokenizers_that_read_it(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a token, a copy of a long conversation costs as much as an eighth of a decode step."""
    prompt, seen = [llm.token_bos(), 400, 401], []
    detokenize = type(llm).detokenize

    def recorded(tokens: list[int], prev_tokens: Any = None, special: bool = False) -> bytes:
        seen.append(prev_tokens)
        return detokenize(llm, tokens, prev_tokens, special)

    def streamed() -> str:
        seen.clear()
        return "".join(part["choices"][0]["text"] for part in llm.create_completion(prompt, max_tokens=12, temperature=0, stream=True))

    monkeypatch.setattr(llm, "detokenize", recorded)
    text = streamed()
    copies = [tokens for tokens in seen if tokens is not None and len(tokens) > len(prompt)]
    assert len(copies) <= 2 and seen.count(None) > 12, "but for the last part of the answer"

    class Other(LlamaTokenizer):
        pass

    monkeypatch.setattr(llm, "tokenizer_", Other(llm))
    assert streamed() == text
    longest = max(seen, key=len)
    assert longest[: len(prompt)] == prompt and len(longest) > len(prompt) + 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_processor_that_fails(llm: Llama, stream: bool) -> None:
    calls = []

    def fail(tokens: Any, logits: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise LookupError("the third time")
        return logits

    with pytest.raises(LookupError, match="the third time"):
        answer: Any = llm.create_completion("The", max_tokens=8, temperature=0, logits_processor=LogitsProcessorList([fail]), stream=stream)
        list(answer)
    assert len(calls) == 3
    assert llm.create_completion("The", max_tokens=2, temperature=0)["usage"]["completion_tokens"] == 2


def test_a_processor_that_returns_nothing(llm: Llama) -> None:
    for wrong in (lambda tokens, logits: None, lambda tokens, logits: logits[:5]):
        with pytest.raises(RequestError, match="as many as it gets"):
            llm.create_completion("The", max_tokens=2, temperature=0, logits_processor=LogitsProcessorList([wrong]))


def test_a_failing_processor_keeps_no_model(demo_model: Path) -> None:
    def fail(tokens: Any, logits: Any) -> Any:
        raise LookupError

    gc.collect()
    gc.disable()
    try:
        llm = Llama(str(demo_model), kv_budget=64, kv_window=16, n_ctx=N_CTX, **QUIET)
        kept = weakref.ref(llm)
        try:
            llm.create_completion("The", max_tokens=2, logits_processor=LogitsProcessorList([fail]))
        except LookupError:
            pass
        del llm
        assert kept() is None
    finally:
        gc.enable()


def test_without_a_seed_draws_differ(demo_model: Path) -> None:
    with Llama(str(demo_model), kv_budget=64, kv_window=16, n_ctx=N_CTX, **QUIET) as llm:
        prompt = llm.tokenize(b"The")
        llm.eval(prompt)
        assert len({llm.sample(temp=3.0, top_k=0, top_p=1.0, min_p=0.0) for _ in range(12)}) > 3

        def text() -> list[int]:
            stream = llm.generate(prompt, temp=3.0, top_k=0, top_p=1.0, min_p=0.0)
            return [next(stream) for _ in range(6)]

        assert text() != text()
        completions = [llm.create_completion("The", max_tokens=6, temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=5)["choices"][0]["text"] for _ in range(2)]
        assert completions[0] == completions[1]
        others = [llm.create_completion("The", max_tokens=6, temperature=3.0, top_k=0, top_p=1.0, min_p=0.0)["choices"][0]["text"] for _ in range(2)]
        assert others[0] != others[1]  # whoever asked with a seed before
        for seed in (5, None):  # a stream that begins after another completion
            stream: Any = llm.create_completion("The", max_tokens=4, stream=True, seed=seed)
            llm.create_completion("A", max_tokens=2)
            assert len(list(stream)) > 1
            assert text() != text()
        with pytest.raises(ValueError, match="exceed"):
            llm.create_completion([400] * (N_CTX + 1), max_tokens=2, seed=5)
        copy = pickle.loads(pickle.dumps(llm))
        copy.eval(prompt)
        assert len({copy.sample(temp=3.0, top_k=0, top_p=1.0, min_p=0.0) for _ in range(12)}) > 3
        copy.close()

        def seeded(tokens: Any, logits: Any) -> Any:
            llm.set_seed(7)  # while a call goes on
            return logits

        llm.create_completion("The", max_tokens=1, logits_processor=LogitsProcessorList([seeded]))
        assert text() == text()  # as in llama_cpp


def test_states_where_there_are_drafts(demo_model: Path) -> None:
    """The state has no row of logits for each token, and goes back where it came from."""
    with Llama(str(demo_model), kv_budget=96, kv_window=16, n_ctx=N_CTX, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4), **QUIET) as llm:
        prompt = llm.tokenize(b"One two three one two three one two three")
        llm.create_completion(prompt, max_tokens=4, temperature=0)
        state = llm.save_state()
        assert state.scores.shape[0] <= 1
        expected = llm.create_completion(prompt, max_tokens=8, temperature=0)["choices"][0]["text"]
        llm.load_state(state)
        assert llm.create_completion(prompt, max_tokens=8, temperature=0)["choices"][0]["text"] == expected
        llm.set_cache(LlamaRAMCache())
        texts = [llm.create_completion(p, max_tokens=4, temperature=0)["choices"][0]["text"] for p in ("A b c d", "E f g h", "A b c d")]
        assert texts[0] == texts[2]


def test_embeddings_of_nothing(tmp_path: Path, tiny: Tiny) -> None:
    """In a process of its own, as the heap was what suffered."""
    model = tiny("llama")[0]
    code = (
        "import sys; from indexmem_edge import Llama; from indexmem_edge.errors import RequestError\n"
        "llm = Llama(sys.argv[1], embedding=True, verbose=False, n_threads=1, n_ctx=64)\n"
        "llm._model.add_bos_token = lambda: False\n"
        "tokenize = llm.tokenize; llm.tokenize = lambda text, add_bos=True, special=False: tokenize(text, False, special)\n"
        "assert llm.embed([]) == [] and llm.embed([], return_count=True) == ([], 0)\n"
        "for wrong in ('', ['', 'a'], ['a', '']):\n"
        "    for truncate in (False, True):\n"
        "        try: llm.embed(wrong, truncate=truncate)\n"
        "        except RequestError as error: print(error)\n"
        "print(len(llm.embed('abc'))); llm.close()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0 and ended.stdout.count("no text to embed") == 6, ended.stderr


def test_a_failed_embedding_leaves_no_history(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Llama(str(demo_model), embedding=True, n_ctx=N_CTX, **QUIET) as llm:
        tokens = llm.tokenize(b"The capital of France is")
        llm.eval(tokens)
        with monkeypatch.context() as patched:
            patched.setattr(llm._ctx, "decode", lambda batch: (_ for _ in ()).throw(RuntimeError("llama_decode returned 1")))
            with pytest.raises(RuntimeError):
                llm.embed("text")
        assert llm.n_tokens == 0


def test_a_session_is_of_the_model_that_was_loaded(tiny: Tiny, tmp_path: Path) -> None:
    """Which another file may have taken the place of, or nothing."""
    path, other = tmp_path / "m.gguf", tiny("llama", n_layer=3)[0]
    shutil.copy(tiny("llama")[0], path)
    right = fingerprint(path)
    with Llama(str(path), kv_budget=48, kv_window=16, n_ctx=64, **QUIET) as llm:
        llm.eval([5, 6, 7])
        shutil.copy(other, tmp_path / "new.gguf")
        (tmp_path / "new.gguf").replace(path)
        llm.save_session(tmp_path / "a.imsess")
    with Llama(str(path), kv_budget=48, kv_window=16, n_ctx=64, **QUIET) as llm, pytest.raises(SessionError, match="model"):
        llm.load_session(tmp_path / "a.imsess")
    shutil.copy(tiny("llama")[0], path)
    assert fingerprint(path) == right
    with Llama(str(path), kv_budget=48, kv_window=16, n_ctx=64, **QUIET) as llm:
        llm.load_session(tmp_path / "a.imsess")
        path.unlink()
        llm.save_session(tmp_path / "b.imsess")
        assert llm.n_tokens == 3


@pytest.mark.parametrize("again", [False, True])
def test_logits_of_all_tokens_and_a_background_in_a_file(tiny: Tiny, tmp_path: Path, again: bool) -> None:
    path = tiny("llama")[0]
    with Llama(str(path), kv_budget=48, kv_window=16, n_ctx=64, **QUIET) as llm:
        llm.eval([5, 6, 7, 8])
        llm.save_session(tmp_path / "a.imsess")
        llm.load_session(tmp_path / "a.imsess", as_background=True)
        llm.create_completion([9, 10], max_tokens=1)
        llm.save_session(tmp_path / "b.imsess")
    with Llama(str(path), kv_budget=48, kv_window=16, n_ctx=64, logits_all=True, **QUIET) as llm:
        llm.eval([11, 12])
        with pytest.raises(SessionError, match="logits_all"):
            llm.load_session(tmp_path / "b.imsess", again=again)
        assert llm.n_tokens == 2


def test_watchers_of_two_threads(llm: Llama) -> None:
    told: list[str] = []
    first, second = llm.watch(lambda *_: told.append("a")), llm.watch(lambda *_: told.append("b"))
    with first:
        thread = threading.Thread(target=second.__enter__)
        thread.start()
        thread.join()
    llm.reset()
    llm.prefill(list(range(300, 340)))
    assert set(told) == {"b"}
    second.__exit__(None, None, None)
    told.clear()
    llm.reset()
    llm.prefill(list(range(300, 340)))
    assert not told


def test_small_mistakes(llm: Llama, demo_model: Path) -> None:
    with pytest.raises(RequestError, match="1099511627776 is no token"):
        llm.create_completion([1 << 40], max_tokens=1)
    expected = llm.create_completion("One, two, three, four", max_tokens=12, temperature=0)["choices"][0]["text"]
    stop = expected[4]
    assert llm.create_completion("One, two, three, four", max_tokens=12, temperature=0, stop=(stop,))["choices"][0]["text"] == expected[: expected.index(stop)]
    asked: Any = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "temperature": 0}
    assert llm.create_chat_completion(**asked, stop=("zzz",)) is not None
    for budget, value in ((64, "256M"), (64, -1), (64, True), (None, 100)):
        with pytest.raises(BudgetError, match="kv_checkpoints"):
            Llama(str(demo_model), kv_budget=budget, **({"kv_window": 16} if budget else {}), kv_checkpoints=value, **QUIET)
    assert issubclass(RequestError, IndexMemError)


def test_an_echo_of_nothing_but_the_beginning(demo_model: Path) -> None:
    with Llama(str(demo_model), kv_budget=64, kv_window=16, n_ctx=64, logits_all=True, **QUIET) as llm:
        answer = llm.create_completion([llm.token_bos()], echo=True, logprobs=1, max_tokens=3, temperature=0)
        found = answer["choices"][0]["logprobs"]
        assert len({len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
        assert np.isfinite([x for x in found["token_logprobs"] if x is not None]).all()
