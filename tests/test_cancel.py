"""`Llama.cancel()`: the call in progress stops, and the conversation is bit for bit what it was before."""

from __future__ import annotations

import copy
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tiny
from indexers import random_indexer, write_sidecar

import indexmem_edge
from indexmem_edge import Cancelled, _native
from indexmem_edge._interrupt import ctrl_c_cancels
from indexmem_edge._terminal import ProgressBar, Terminal
from indexmem_edge.cli_options import RunOptions

import llama_cpp  # isort: skip

pytestmark = pytest.mark.skipif(_native.library_file() is None, reason="the native library has not been built")

BUDGET, WINDOW, BATCH = 96, 33, 48
TOKENS = [3 + (7 * i * i + 5 * i) % 250 for i in range(900)]
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the sea? " * 12}]
KINDS: dict[str, dict[str, Any]] = {
    "streaming": {},
    "keydiff": {"kv_policy": "keydiff"},
    "snapkv": {"kv_policy": "snapkv"},  # keeps a ring of queries
    "ratio": {"kv_policy": "tova", "kv_budget_ratio": 0.5},
    "centroid": {"memory": "centroid", "memory_slots": 16},
    "full": {"kv_policy": "full", "kv_budget": 1000},
    "retention-mlp": {"indexmem": "retention-mlp"},  # tokens wait to be scored
    "pairwise-mean": {"indexmem": "pairwise-mean"},  # and a ring of queries
    "unbounded": {"kv_budget": None, "n_ctx": 1024},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """load(kind, **options) -> Llama"""
    model, config = tiny("llama")
    folder = tmp_path_factory.mktemp("sidecars")

    def make(kind: str, **options: Any) -> Any:
        given = {"kv_budget": BUDGET, "kv_window": WINDOW, "kv_pin": "auto", **KINDS[kind], **options}
        if given["kv_budget"] is None:
            del given["kv_window"], given["kv_pin"]
        if "indexmem" in given:
            path = folder / f"{kind}.gguf"
            write_sidecar(path, random_indexer(kind, config.n_layer, config.n_embd, config.n_head_kv, 0))
            given["indexmem"] = path
        threads = {"n_threads": 1, "n_threads_batch": 1}
        return indexmem_edge.Llama(model, n_batch=BATCH, n_ubatch=BATCH // 2, seed=5, verbose=False, **threads, **given)

    return make


class Nodes:
    """Counts the nodes that a `Llama` computes, and cancels after one of them, before anything else can happen."""

    def __init__(self, llm: Any, stop_after: int = 0) -> None:
        self.count, self.heard = 0, False
        self._llm = llm

        @llama_cpp.ggml_abort_callback
        def after_node(_: Any) -> bool:
            self.count += 1
            if self.count == stop_after:
                self.heard = llm.cancel()
            return 0 < stop_after <= self.count

        self._callback = after_node

    def __enter__(self) -> Nodes:
        llama_cpp.llama_set_abort_callback(self._llm.ctx, self._callback, None)
        return self

    def __exit__(self, *_: object) -> None:
        self._llm._calls.attach()


def condition(llm: Any) -> dict[str, Any]:
    """All that a person can find out about a conversation, but not what it cost."""
    stats = llm.kv_stats().to_dict()
    for cost in ("evict_seconds", "cancel_bytes"):
        del stats[cost]
    stats["fresh"] = llm.n_tokens > 0 and not llm._requires_eval
    found = {"tokens": llm._input_ids.tolist(), "stats": stats, "turn": copy.copy(llm._turn), "seed": llm._seed}
    if llm._cache is not None:
        heads = {layer: [head.tolist() for head in heads] for layer, heads in llm.kv_snapshot().items()}
        found |= {"positions": heads, "wanted": llm._cache.wanted_pin, "native": llm._cache.length()}
    return found


def logits(llm: Any) -> np.ndarray:
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def same_from_here(llm: Any, twin: Any, n: int = 300) -> None:
    """Both go on in the same way, through many evictions: same logits, same entries."""
    for start in range(llm.n_tokens, llm.n_tokens + n, 30):
        more = TOKENS[start + 1 : start + 31]
        for other in (llm, twin):
            other.eval(more[:29])
            other.eval(more[29:])
        assert np.array_equal(logits(llm), logits(twin))
    assert condition(llm)["tokens"] == condition(twin)["tokens"]
    if llm._cache is not None:
        assert condition(llm)["positions"] == condition(twin)["positions"]


@each_kind
@pytest.mark.parametrize("options", [{"temp": 0.0}, {"temp": 0.9, "repeat_penalty": 1.3, "top_k": 20}], ids=["greedy", "drawn"])
def test_a_prompt_that_has_been_read_is_not_read_again(load: Load, kind: str, options: dict[str, Any]) -> None:
    """The logits after its last token are gone with the cancelled answer, and have been kept."""
    llm, twin = load(kind), load(kind)
    for other in (llm, twin):
        other.prefill(TOKENS[:300])
    for nodes in (1, 900):
        with Nodes(llm, stop_after=nodes), pytest.raises(Cancelled):
            list(zip(range(200), llm.generate(TOKENS[:300], **options)))
    answers = [[token for token, _ in zip(other.generate(TOKENS[:300], **options), range(30))] for other in (llm, twin)]
    assert answers[0] == answers[1] and len(set(answers[0])) > 3
    stats = llm.kv_stats()
    assert (stats.reevaluated, stats.turn_evaluated) == (0, twin.kv_stats().turn_evaluated)


def prefill(llm: Any) -> None:
    llm.prefill([*llm._input_ids.tolist(), *TOKENS[400 : 400 + 5 * BATCH]])


def evaluate(llm: Any) -> None:
    llm.eval(TOKENS[400 : 400 + BATCH])


def generate(llm: Any) -> None:
    for _, _ in zip(range(90), llm.generate([*llm._input_ids.tolist(), *TOKENS[400:410]], temp=0.9)):
        pass


def complete(llm: Any) -> None:
    llm.create_completion([*llm._input_ids.tolist(), *TOKENS[400:410]], max_tokens=60, logit_bias={2: -100.0})


def chat(llm: Any) -> None:
    """Another conversation: the cached text is replaced, and the pin set anew."""
    llm.create_chat_completion(QUESTION, max_tokens=40, temperature=0.8, logit_bias={2: -100.0})


def chat_stream(llm: Any) -> None:
    for _ in llm.create_chat_completion(QUESTION, max_tokens=40, temperature=0.8, stream=True):
        pass


def read(llm: Any) -> None:
    llm.prefill_chat(QUESTION)


APPENDING = [evaluate, prefill, generate, complete]
REPLACING = [chat, chat_stream, read]


@each_kind
@pytest.mark.parametrize("n_before", [0, 40, 300], ids=lambda n: f"after{n}")
@pytest.mark.parametrize("work", APPENDING, ids=lambda work: work.__name__)
def test_whatever_is_stopped_anywhere_has_not_happened(load: Load, kind: str, work: Any, n_before: int) -> None:
    llm, twin, uncancelled = load(kind), load(kind), load(kind)
    for other in (llm, twin, uncancelled):
        other.prefill(TOKENS[:n_before])
    before = condition(llm)
    with Nodes(uncancelled) as whole:
        work(uncancelled)
    for share in (0.0, 0.35, 0.7, 1.0):
        with Nodes(llm, stop_after=max(1, int(share * whole.count))) as nodes, pytest.raises(Cancelled) as caught:
            work(llm)
        assert nodes.heard and "as it was before" in str(caught.value)
        assert nodes.count == max(1, int(share * whole.count))  # not one node more
        assert condition(llm) == before
    same_from_here(llm, twin)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unbounded"])
@pytest.mark.parametrize("n_before", [0, 40, 300], ids=lambda n: f"after{n}")
@pytest.mark.parametrize("work", REPLACING, ids=lambda work: work.__name__)
def test_a_stopped_call_gives_back_the_text_that_it_replaced(load: Load, kind: str, work: Any, n_before: int) -> None:
    test_whatever_is_stopped_anywhere_has_not_happened(load, kind, work, n_before)


def test_the_demo_model_with_its_indexer(demo_model: Path) -> None:
    """An answer that was cancelled after evictions, and asked for again, is the answer of a program that never cancelled."""
    from indexmem_edge.demo import demo_sidecar

    options = dict(kv_budget=256, kv_window=32, kv_pin="auto", indexmem=demo_sidecar(), n_threads=1, n_threads_batch=1, seed=3)
    llm, twin = (indexmem_edge.Llama(demo_model, verbose=False, **options) for _ in range(2))
    messages = [{"role": "system", "content": "You are a sailor."}, {"role": "user", "content": "The tide comes in. " * 60}]
    for other in (llm, twin):
        answer = other.create_chat_completion(messages, max_tokens=4, temperature=0.0)["choices"][0]["message"]
    messages += [answer, {"role": "user", "content": "And what does the wind do, when the tide has gone out again?"}]
    before = condition(llm)
    assert before["stats"]["evicted"] > 0
    for chunks in (1, 6):
        stream = llm.create_chat_completion(messages, max_tokens=40, temperature=0.7, stream=True)
        assert [next(stream) for _ in range(chunks)] and llm.cancel()
        with pytest.raises(Cancelled):
            next(stream)
        assert condition(llm) == before
    said = [o.create_chat_completion(messages, max_tokens=40, temperature=0.7)["choices"][0]["message"] for o in (llm, twin)]
    assert said[0] == said[1] and condition(llm)["positions"] == condition(twin)["positions"]


# what counts as a call


def test_without_a_call_nothing_is_cancelled(load: Load) -> None:
    llm = load("streaming")
    assert llm.cancel() is False
    llm.prefill(TOKENS[:300])
    assert llm.cancel() is False
    llm.prefill(TOKENS[:400])
    assert llm.n_tokens == 400


def test_the_library_reads_the_flag_after_every_node(load: Load) -> None:
    llm = load("streaming")
    llm.eval(TOKENS[:10])
    llm._calls._flag.value = 1
    llm._batch.set_batch(batch=TOKENS[10:20], n_past=10, logits_all=False)
    assert llama_cpp.llama_decode(llm.ctx, llm._batch.batch) == 2
    llm._calls._flag.value = 0
    assert llama_cpp.llama_decode(llm.ctx, llm._batch.batch) == 0


@pytest.mark.parametrize("kind", ["keydiff", "unbounded"])
def test_from_another_thread(load: Load, kind: str) -> None:
    """It cancels as soon as there is a call, wherever that is by then."""
    llm = load(kind)
    llm.prefill(TOKENS[:60])
    before = condition(llm)

    def until_heard() -> None:
        while not llm.cancel():
            pass

    thread = threading.Thread(target=until_heard)
    thread.start()
    with pytest.raises(Cancelled):
        llm.prefill(TOKENS)
    thread.join()
    assert condition(llm) == before
    llm.prefill(TOKENS)
    assert llm.n_tokens == len(TOKENS)


@pytest.mark.parametrize("kind", ["snapkv", "unbounded"])
@pytest.mark.parametrize("batches", [1, 3, 5])
def test_from_a_progress_callback_the_last_one_included(load: Load, kind: str, batches: int) -> None:
    llm = load(kind)
    llm.prefill(TOKENS[:100])
    before, calls = condition(llm), []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == batches:
            assert llm.cancel()

    with pytest.raises(Cancelled):
        llm.prefill(TOKENS[: 100 + 5 * BATCH], progress)
    assert len(calls) == batches and condition(llm) == before


@pytest.mark.parametrize("kind", ["snapkv", "unbounded"])
def test_between_two_chunks_of_a_stream(load: Load, kind: str) -> None:
    llm = load(kind)
    before = condition(llm)
    stream = llm.create_completion(TOKENS[:50], max_tokens=80, stream=True, logit_bias={2: -100.0})
    assert [next(stream) for _ in range(3)] and llm.cancel()
    with pytest.raises(Cancelled):
        next(stream)
    assert condition(llm) == before
    assert llm.cancel() is False and list(stream) == []


def test_a_stream_that_was_closed_keeps_what_it_did(load: Load) -> None:
    llm = load("streaming")
    stream = llm.create_completion(TOKENS[:150], max_tokens=80, stream=True, logit_bias={2: -100.0})
    next(stream)
    assert llm.cancel()
    stream.close()
    assert llm.n_tokens >= 150 and llm.cancel() is False
    llm.prefill([*llm._input_ids.tolist(), *TOKENS[:20]])
    assert llm.kv_stats().turn_evaluated == 20


def test_a_call_overtakes_a_stream_that_was_left(load: Load) -> None:
    llm = load("streaming")
    stream = llm.generate(TOKENS[:50], temp=0.0)
    token = next(stream)
    llm.eval([token])
    assert llm.cancel() is False
    before = condition(llm)
    assert isinstance(next(stream), int) and llm.cancel()  # it goes on as a call of its own
    with pytest.raises(Cancelled):
        next(stream)
    assert condition(llm) == before


def test_tokens_can_still_be_sent_to_generate(load: Load) -> None:
    llm, twin = (load("streaming", logits_all=True, n_ctx=512) for _ in range(2))
    stream, plain = llm.generate(TOKENS[:50], temp=0.0), llama_cpp.Llama.generate(twin, TOKENS[:50], temp=0.0)
    assert next(stream) == next(plain)
    assert stream.send([7, 8]) == plain.send([7, 8])
    assert llm._input_ids.tolist() == twin._input_ids.tolist()


def test_an_interrupt_without_a_cancel_keeps_what_was_read(load: Load) -> None:
    llm = load("streaming")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.prefill(TOKENS, stop)
    assert llm.n_tokens == BATCH and llm.cancel() is False


def test_an_interrupt_with_a_cancel_takes_it_back(load: Load) -> None:
    llm = load("streaming")

    def stop(done: int, total: int) -> None:
        if done > 3 * BATCH:
            llm.cancel()
            raise KeyboardInterrupt

    before = condition(llm)
    with pytest.raises(KeyboardInterrupt):
        llm.prefill(TOKENS, stop)
    assert condition(llm) == before


# what the way back costs


def test_the_copy_is_made_when_something_is_evicted_and_counted(load: Load) -> None:
    llm = load("keydiff")
    llm.prefill(TOKENS[:60])
    assert llm.kv_stats().cancel_bytes == 0
    llm.prefill(TOKENS[:200])
    stats = llm.kv_stats()
    assert stats.cancel_bytes == len(llm._calls._copy._buffer) > 0 and "way back" in str(stats)
    assert stats.cancel_bytes < 1.2 * (stats.kv_bytes + stats.meta_bytes)
    for token in TOKENS[:60]:
        llm.eval([token])
        llm.prefill([*llm._input_ids.tolist(), *TOKENS[:20]])
    assert llm.kv_stats().cancel_bytes < 1.2 * (stats.kv_bytes + stats.meta_bytes)  # one buffer


@pytest.mark.parametrize("work", [prefill, chat], ids=lambda work: work.__name__)
@pytest.mark.parametrize("n_before", [0, 40, 300], ids=lambda n: f"after{n}")
def test_without_a_copy_the_history_is_evaluated_again(load: Load, work: Any, n_before: int) -> None:
    llm, twin = load("keydiff", kv_cancel=False), load("keydiff", kv_cancel=False)
    for other in (llm, twin):
        other.prefill(TOKENS[:n_before])
    with Nodes(llm, stop_after=250), pytest.raises(Cancelled) as caught:
        work(llm)
    assert llm._input_ids.tolist() == TOKENS[:n_before] and llm.kv_stats().cancel_bytes == 0
    if n_before:
        assert f"{n_before} tokens of which have to be evaluated again" in str(caught.value)
        assert llm.kv_stats().reevaluated == n_before and "cancelled" in llm.kv_stats().reevaluated_reason
    llm.prefill(TOKENS[:400])
    twin.reset()
    twin.prefill(TOKENS[:400])
    assert condition(llm)["positions"] == condition(twin)["positions"]
    assert np.array_equal(logits(llm), logits(twin))


def test_the_choice_is_pickled(load: Load) -> None:
    for chosen in (True, False):
        assert pickle.loads(pickle.dumps(load("streaming", kv_cancel=chosen)))._calls.keep is chosen


def test_a_layer_with_a_window_is_not_trusted_with_a_tail(tiny: Tiny) -> None:
    """Without a budget. What the window has dropped cannot be brought back, so everything is evaluated again."""
    model, _ = tiny("gemma2", n_ctx_train=1024)
    threads = {"n_threads": 1, "n_threads_batch": 1}
    llm = indexmem_edge.Llama(model, n_ctx=512, n_batch=64, n_ubatch=16, verbose=False, **threads)
    llm.prefill(TOKENS[:50])
    with Nodes(llm, stop_after=400), pytest.raises(Cancelled):
        llm.prefill(TOKENS[:300])
    expected = [token for token, _ in zip(llm.generate(TOKENS[:60], temp=0.0), range(8))]
    llm.reset()
    assert [token for token, _ in zip(llm.generate(TOKENS[:60], temp=0.0), range(8))] == expected


# Ctrl-C in the chat


class Deaf:
    """Stands for a `Llama` that computes: only another thread can be heard."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.heard = threading.Event()

    def cancel(self) -> bool:
        self.threads.append(threading.get_ident())
        if threading.get_ident() != threading.main_thread().ident:
            self.heard.set()
        return True


def test_ctrl_c_reaches_a_library_that_computes() -> None:
    before = signal.getsignal(signal.SIGINT)
    llm = Deaf()
    with ctrl_c_cancels(llm):
        signal.raise_signal(signal.SIGINT)
        assert llm.heard.wait(60)
    assert signal.getsignal(signal.SIGINT) is before and signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_without_a_call_is_an_interrupt(load: Load) -> None:
    with pytest.raises(KeyboardInterrupt), ctrl_c_cancels(load("streaming")):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def talk(load: Load) -> Any:
    from indexmem_edge.chat import Chat

    return Chat(load("keydiff", kv_budget=160), RunOptions(predict=60, temp=0.0))


def test_a_document_whose_reading_was_stopped_has_not_been_read(talk: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "book.txt").write_text("The tide comes in. " * 60)
    talk._handle("Hello")
    before, messages = condition(talk._llm), list(talk._messages)

    def ctrl_c(bar: ProgressBar, done: int, total: int) -> None:
        if done > 200:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProgressBar, "update", ctrl_c)
    talk._handle(f"/read {tmp_path}/book.txt")
    assert talk._failed and talk._document == "" and talk._messages == messages
    assert condition(talk._llm) == before


def test_ctrl_c_before_the_first_word_takes_the_question_back(talk: Any, capsys: Any) -> None:
    talk._handle("Hello")
    before, messages = condition(talk._llm), list(talk._messages)
    with Nodes(talk._llm, stop_after=150):
        talk._handle("The tide comes in. " * 30)
    assert "stopped" in capsys.readouterr().err
    assert talk._messages == messages and condition(talk._llm) == before


def test_ctrl_c_in_an_answer_keeps_what_has_been_said(talk: Any, monkeypatch: Any) -> None:
    pieces: list[str] = []

    def ctrl_c(terminal: Terminal, piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Terminal, "stream", ctrl_c)
    talk._handle("Hello")
    assert talk._messages[-1] == {"role": "assistant", "content": "".join(pieces)} and len(pieces) == 4
