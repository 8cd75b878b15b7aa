"""`Llama.cancel()`: what counts as a call, what the way back costs, and Ctrl-C in the chat."""

from __future__ import annotations

import pickle
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import Cancelled, GenerationSuperseded, llama_cpp
from indexmem_edge.cli.console import Bar
from indexmem_edge.cli.interrupt import ctrl_c_cancels
from indexmem_edge.cli.options import RunOptions
from indexmem_edge.cli.terminal import Terminal
from indexmem_edge.native import find
from support.cancelling import BATCH, TOKENS, Load, Nodes, chat, condition, load, logits, prefill

__all__ = ["load"]  # a fixture

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

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
    with pytest.raises(GenerationSuperseded):
        next(stream)
    assert condition(llm) == before and list(stream) == []


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
    assert stats.cancel_bytes == llm._calls.nbytes > 0 and "way back" in str(stats)
    assert stats.cancel_device_bytes == 0 and "on the device" not in str(stats)
    assert stats.cancel_bytes < 1.2 * (stats.kv_bytes + stats.meta_bytes)
    for token in TOKENS[:60]:
        llm.eval([token])
        llm.prefill([*llm._input_ids.tolist(), *TOKENS[:20]])
    assert llm.kv_stats().cancel_bytes < 2.4 * (stats.kv_bytes + stats.meta_bytes)  # two buffers: of calls, of the last prompt


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
    from indexmem_edge.cli.chat import Chat

    return Chat(load("keydiff", kv_budget=160), RunOptions(predict=60, temp=0.0))


def test_a_document_whose_reading_was_stopped_has_not_been_read(talk: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "book.txt").write_text("The tide comes in. " * 60)
    talk._handle("Hello")
    before, conversation = condition(talk._llm), talk._conversation

    def ctrl_c(bar: Bar, done: int, total: int) -> None:
        if done > 200:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bar, "update", ctrl_c)
    talk._handle(f"/read {tmp_path}/book.txt")
    assert talk._failed and talk._conversation == conversation
    assert condition(talk._llm) == before


def test_ctrl_c_before_the_first_word_takes_the_question_back(talk: Any, capsys: Any) -> None:
    talk._handle("Hello")
    before, conversation = condition(talk._llm), talk._conversation
    with Nodes(talk._llm, stop_after=150):
        talk._handle("The tide comes in. " * 30)
    assert "stopped" in capsys.readouterr().err
    assert talk._conversation == conversation and condition(talk._llm) == before


def test_ctrl_c_in_an_answer_keeps_what_has_been_said(talk: Any, monkeypatch: Any) -> None:
    pieces: list[str] = []

    def ctrl_c(terminal: Terminal, piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Terminal, "stream", ctrl_c)
    talk._handle("Hello")
    assert talk._conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces)} and len(pieces) == 4
