"""The end of a `Llama`: closed, deleted, or left to the process that another was forked from."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import ModelClosed, llama_cpp
from indexmem_edge.native import find
from support.cancelling import BATCH, QUESTION, TOKENS, Load, load

__all__ = ["load"]  # a fixture

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

both = pytest.mark.parametrize("kind", ["keydiff", "unbounded"])
NO_END = {"logit_bias": {2: -100.0}}

# what each public method is called with; those that need no model are named instead
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "eval": ([5, 6],), "generate": ([5, 6],), "prefill": ([5, 6],), "prefill_chat": (QUESTION,), "set_pin": (3,),
    "create_completion": ("The sea",), "__call__": ("The sea",), "create_chat_completion": (QUESTION,), "embed": ("The sea",),
    "create_chat_completion_openai_v1": (QUESTION,), "create_embedding": ("The sea",), "tokenize": (b"The sea",),
    "use_chat_format": ("chatml",), "detokenize": ([5, 6],), "save_session": ("none",), "load_session": ("none",), "load_state": (None,),
}  # fmt: skip
WITHOUT_A_MODEL = {
    "cancel", "close", "set_cache", "set_seed", "tokenizer", "logits_to_logprobs", "longest_token_prefix", "from_pretrained",
    "watch",
}  # fmt: skip


def public_methods() -> list[str]:
    names = [name for name in dir(indexmem_edge.Llama) if name == "__call__" or not name.startswith("_")]
    return [name for name in names if callable(getattr(indexmem_edge.Llama, name)) and name not in WITHOUT_A_MODEL]


@both
def test_every_method_says_that_it_is_closed(load: Load, kind: str) -> None:
    llm = load(kind)
    llm.prefill(TOKENS[:60])
    state, tokenizer = llm.save_state(), llm.tokenizer()
    llm.close()
    llm.close()
    assert len(public_methods()) > 25
    for name in public_methods():
        arguments = (state,) if name == "load_state" else ARGUMENTS.get(name, ())
        with pytest.raises((ModelClosed, ImportError)) as caught:  # of openai, where that is not installed
            getattr(llm, name)(*arguments)
        assert isinstance(caught.value, ModelClosed) or name == "create_chat_completion_openai_v1", name
    for name in ("ctx", "model"):
        with pytest.raises(ModelClosed):
            getattr(llm, name)
    with pytest.raises(ModelClosed), llm.watch(print):
        pass
    for ask in (llm.tokenizer(), tokenizer):  # the second was made before: an ArgumentError of ctypes with these words
        with pytest.raises(Exception, match="closed"):
            ask.encode("The sea")
    assert llm.cancel() is False and llm.n_tokens == 60


@both
def test_with_closes(load: Load, kind: str) -> None:
    with load(kind) as llm:
        assert llm.create_completion("The sea", max_tokens=2)["choices"]
    with pytest.raises(ModelClosed, match="has been closed: make another one"):
        llm.create_completion("The sea", max_tokens=2)
    with pytest.raises(ZeroDivisionError), load(kind) as llm:
        raise ZeroDivisionError
    with pytest.raises(ModelClosed):
        llm.kv_stats()


@both
@pytest.mark.parametrize("items", [0, 3])
def test_a_stream_of_a_closed_one_raises(load: Load, kind: str, items: int) -> None:
    llm = load(kind)
    stream = llm.create_completion(TOKENS[:80], max_tokens=30, stream=True, **NO_END)
    for _ in range(items):
        next(stream)
    llm.close()
    with pytest.raises(ModelClosed):
        next(stream)
    assert list(stream) == []


@both
def test_closing_inside_of_a_call_ends_that_first(load: Load, kind: str) -> None:
    llm, batches = load(kind), []

    def progress(done: int, total: int) -> None:
        batches.append(done)
        llm.close()
        assert llm.n_ctx() > 0  # still there

    with pytest.raises(ModelClosed, match="closed by the call in progress"):
        llm.prefill(TOKENS[: 5 * BATCH], progress)
    assert batches == [BATCH]
    with pytest.raises(ModelClosed):
        llm.n_ctx()


@both
def test_a_processor_of_logits_may_close(load: Load, kind: str) -> None:
    """It is called by the library, in the middle of drawing a token."""
    llm = load(kind)

    def process(tokens: Any, scores: Any) -> Any:
        llm.close()
        return scores

    with pytest.raises(ModelClosed):
        llm.create_completion(TOKENS[:50], max_tokens=30, logits_processor=llama_cpp.LogitsProcessorList([process]))


@both
def test_closing_from_another_thread_waits_for_the_call(load: Load, kind: str) -> None:
    llm = load(kind)
    closing = threading.Thread(target=llm.close)

    def progress(done: int, total: int) -> None:
        if done == BATCH:
            closing.start()

    assert llm.prefill(TOKENS[: 4 * BATCH], progress) == 4 * BATCH
    closing.join()
    with pytest.raises(ModelClosed):
        llm.prefill(TOKENS)


@pytest.mark.parametrize("ask", ["n_ctx", "n_vocab", "token_eos", "tokenize", "detokenize", "kv_stats"])
def test_closing_while_another_thread_asks(load: Load, ask: str) -> None:
    arguments: tuple[Any, ...] = {"tokenize": (b"The sea" * 50,), "detokenize": (TOKENS,)}.get(ask, ())
    for _ in range(5):
        llm, asked, told = load("keydiff"), threading.Event(), []

        def go_on(llm: Any, asked: threading.Event, told: list[Exception]) -> None:
            try:
                while True:
                    getattr(llm, ask)(*arguments)
                    asked.set()
            except Exception as error:
                told.append(error)

        thread = threading.Thread(target=go_on, args=(llm, asked, told))
        thread.start()
        assert asked.wait(60)
        llm.close()
        thread.join()
        assert [type(error) for error in told] == [ModelClosed]


def test_one_that_could_not_be_made_can_be_closed(load: Load) -> None:
    llm = indexmem_edge.Llama.__new__(indexmem_edge.Llama)
    with pytest.raises(indexmem_edge.ModelFileError):
        llm.__init__("no/such.gguf")
    llm.close()


def test_one_that_was_pickled_and_closed_is_made_again(load: Load) -> None:
    with load("keydiff") as llm:
        kept = pickle.dumps(llm)
    with pickle.loads(kept) as again:
        assert again.prefill(TOKENS[:20]) == 20


# references


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is freed while nothing collects garbage."""
    from indexmem_edge._vendor.llama_cpp import _internals as internals

    calls: list[str] = []
    for name in ("llama_free", "llama_model_free"):
        free = getattr(internals.llama_cpp, name)
        monkeypatch.setattr(internals.llama_cpp, name, lambda *a, name=name, free=free: (calls.append(name), free(*a))[1])
    gc.collect()
    gc.disable()
    calls.clear()
    yield calls
    gc.enable()


def nothing(llm: Any) -> None:
    pass


def completion(llm: Any) -> None:
    llm.create_completion(TOKENS[:150], max_tokens=20, **NO_END)


def chat(llm: Any) -> None:
    llm.create_chat_completion(QUESTION, max_tokens=20, response_format={"type": "json_object"})


def whole_stream(llm: Any) -> None:
    assert list(llm.create_completion(TOKENS[:150], max_tokens=20, stream=True, **NO_END))


def left_stream(llm: Any) -> None:
    stream = llm.create_chat_completion(QUESTION, max_tokens=20, stream=True, **NO_END)
    next(stream), next(stream)


def overtaken_stream(llm: Any) -> None:
    stream = llm.generate(TOKENS[:150], temp=0.5)
    next(stream)
    llm.prefill(TOKENS[:30])
    with pytest.raises(indexmem_edge.GenerationSuperseded):
        next(stream)


def cancelled(llm: Any) -> None:
    with pytest.raises(indexmem_edge.Cancelled):
        llm.prefill(TOKENS, lambda done, total: llm.cancel())


def refused(llm: Any) -> None:
    with pytest.raises(indexmem_edge.GrammarError):
        llm.create_completion("A", grammar=llama_cpp.LlamaGrammar.from_string("root ::= ["))


def states(llm: Any) -> None:
    llm.prefill(TOKENS[:100])
    llm.set_cache(llama_cpp.LlamaRAMCache())
    llm.load_state(llm.save_state())
    llm.create_completion(TOKENS[:50], max_tokens=3)


@both
@pytest.mark.parametrize(
    "use", [nothing, completion, chat, whole_stream, left_stream, overtaken_stream, cancelled, refused, states]
)
def test_what_is_deleted_is_freed_at_once(load: Load, kind: str, use: Any, freed: list[str]) -> None:
    llm = load(kind)
    use(llm)
    parts = [weakref.ref(part) for part in (llm, llm._calls, llm._talk, llm._access)]
    parts += [weakref.ref(llm._cache)] if llm._cache is not None else []
    assert freed == []
    del llm
    assert freed == ["llama_free", "llama_model_free"]
    assert [part() for part in parts] == [None] * len(parts)


@both
def test_one_with_a_lora_is_freed_at_once(tiny: Tiny, kind: str, tmp_path: Path, freed: list[str]) -> None:
    path, config = tiny("llama")
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
    draw = np.random.default_rng(0)
    for name, n in (("a", (2, config.n_embd)), ("b", (config.n_head * config.head_dim, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{name}", draw.normal(size=n).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = {"kv_budget": 96, "kv_window": 16} if kind != "unbounded" else {"n_ctx": 512}
    answers = []
    for more in ({}, {"lora_path": str(tmp_path / "lora.gguf")}):
        llm = indexmem_edge.Llama(path, n_threads=1, verbose=False, **options, **more)
        answers.append(llm.create_completion(TOKENS[:50], max_tokens=10, temperature=0.0, **NO_END)["choices"])
        freed.clear()
        del llm
        assert freed == ["llama_free", "llama_model_free"]
    assert answers[0] != answers[1]


@both
def test_a_stream_keeps_what_it_is_of(load: Load, kind: str, freed: list[str]) -> None:
    stream = load(kind).create_completion(TOKENS[:150], max_tokens=5, stream=True, **NO_END)
    assert len(list(stream)) > 3
    del stream
    assert freed == ["llama_free", "llama_model_free"]


# forked processes


def in_a_fork(work: Any) -> int:
    """The exit status of a child that does it; 99 where it does not end."""
    child = os.fork()
    if child == 0:
        status = 98
        try:
            signal.alarm(30)
            status = work()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return 99 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are not forked here")
@both
def test_a_fork_is_told_that_the_model_is_its_parents(load: Load, kind: str) -> None:
    llm = load(kind)
    held, done = threading.Event(), threading.Event()
    stream = llm.generate(TOKENS[:40], temp=0.0)
    next(stream)

    def hold() -> None:
        with llm._access.alone():  # as a call in another thread, which the child does not have
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)

    def child() -> int:
        told = 0
        for use in (lambda: llm.create_completion("A"), llm.kv_stats, lambda: llm.tokenize(b"A"), llm.reset, lambda: next(stream)):
            try:
                use()
            except ModelClosed as error:
                told += "forked" in str(error) and "`spawn`" in str(error)
        llm.close()
        return told

    assert in_a_fork(child) == 5
    done.set()
    thread.join()
    assert llm.create_completion(TOKENS[:20], max_tokens=2)["choices"]  # the child has freed nothing


@pytest.mark.skipif(sys.platform == "win32", reason="processes are not forked here")
def test_a_fork_may_load_its_own(load: Load) -> None:
    llm = load("keydiff")
    llm.prefill(TOKENS[:50])
    assert in_a_fork(lambda: load("keydiff").prefill(TOKENS[:50])) == 50
