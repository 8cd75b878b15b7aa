"""Threads that share a `Llama`: they wait for each other, streams that were overtaken say so, readers see what is right."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import Cancelled, GenerationSuperseded, ModelClosed
from indexmem_edge.native import api, find
from indexmem_edge.runtime.access import Access
from indexmem_edge.sessions import file as sessionfile
from support.cancelling import BATCH, QUESTION, TOKENS, Load, condition, load, logits

__all__ = ["load"]  # a fixture

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

both = pytest.mark.parametrize("kind", ["keydiff", "unbounded"])
NO_END = {"logit_bias": {2: -100.0}}
PATIENCE = 60  # seconds, for what takes none


def text_of(chunks: Any) -> str:
    return "".join(chunk["choices"][0].get("text", "") for chunk in chunks)


def complete(llm: Any, start: int, **options: Any) -> str:
    answer = llm.create_completion(TOKENS[start : start + 150], max_tokens=12, temperature=0.0, **NO_END, **options)
    return str(answer["choices"][0]["text"])


# calls


@both
def test_calls_of_several_threads_wait_for_each_other(load: Load, kind: str) -> None:
    alone = load(kind)
    expected = []
    for start in range(0, 80, 10):
        alone.reset()
        expected.append(complete(alone, start))
    llm = load(kind)

    def ask(start: int) -> str:
        return complete(llm, start)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(0, 80, 10)))
    assert found == expected and len(set(expected)) > 3


@both
def test_a_call_waits_while_another_computes(load: Load, kind: str) -> None:
    llm, order = load(kind), []
    reading, asked = threading.Event(), threading.Event()

    def progress(done: int, total: int) -> None:
        reading.set()
        assert asked.wait(PATIENCE)
        order.append("reads")

    def other() -> None:
        assert reading.wait(PATIENCE)
        asked.set()
        complete(llm, 300)
        order.append("completed")

    thread = threading.Thread(target=other)
    thread.start()
    llm.prefill(TOKENS[: 4 * BATCH], progress)
    order.append("read")
    thread.join()
    assert order.index("completed") > order.index("reads") and order[:4] == ["reads"] * 4


@both
def test_cancel_is_heard_while_others_wait(load: Load, kind: str) -> None:
    llm = load(kind)
    reading = threading.Event()
    found: list[str] = []

    def progress(done: int, total: int) -> None:
        reading.set()

    def other() -> None:
        found.append(complete(llm, 300))

    def stop() -> None:
        assert reading.wait(PATIENCE) and llm.cancel()

    threads = [threading.Thread(target=other), threading.Thread(target=stop)]

    def progress_and_start(done: int, total: int) -> None:
        if done == BATCH:
            threads[0].start()
        reading.set()
        threads[1].join(0.001)

    threads[1].start()
    with pytest.raises(Cancelled):
        while True:
            llm.prefill(TOKENS, progress_and_start if not threads[0].ident else progress)
            llm.reset()
    for thread in threads:
        thread.join()
    twin = load(kind)
    assert found == [complete(twin, 300)]  # who waited was not cancelled


# streams


@both
@pytest.mark.parametrize("chat", [False, True])
def test_of_two_streams_the_older_one_says_that_it_was_overtaken(load: Load, kind: str, chat: bool) -> None:
    def stream(llm: Any, start: int) -> Any:
        if chat:
            messages = [{"role": "user", "content": f"{start} times the sea? " * 5}]
            return llm.create_chat_completion(messages, max_tokens=12, temperature=0.0, stream=True, **NO_END)
        return llm.create_completion(TOKENS[start : start + 150], max_tokens=12, temperature=0.0, stream=True, **NO_END)

    llm, twin = load(kind), load(kind)
    a, b = stream(llm, 0), stream(llm, 50)  # neither has begun
    assert next(a)["choices"] and next(b)["choices"]
    with pytest.raises(GenerationSuperseded, match="another call has used this Llama"):
        next(a)
    assert list(a) == []
    for item, other in zip(list(b), list(stream(twin, 50))[1:], strict=True):
        assert item["choices"] == other["choices"]


@both
def test_streams_that_were_made_before_others_are_read_one_after_the_other(load: Load, kind: str) -> None:
    llm, twin = load(kind, kv_pin=4) if kind != "unbounded" else load(kind), load(kind)
    streams = [llm.generate(TOKENS[start : start + 100], temp=0.0) for start in (0, 40, 80)]
    found = [[token for token, _ in zip(stream, range(5))] for stream in streams]
    for start, tokens in zip((0, 40, 80), found):
        twin.reset()
        assert tokens == [token for token, _ in zip(twin.generate(TOKENS[start : start + 100], temp=0.0), range(5))]


@both
def test_a_stream_waits_only_for_items_and_lets_others_in_between(load: Load, kind: str) -> None:
    llm = load(kind)
    stream = llm.create_completion(TOKENS[:150], max_tokens=30, stream=True, temperature=0.0, **NO_END)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(complete, llm, 200).result(PATIENCE)
    with pytest.raises(GenerationSuperseded):
        next(stream)


@both
@pytest.mark.parametrize("change", ["reset", "load_state", "load_session", "eval", "prefill"])
def test_whatever_changes_the_conversation_overtakes_a_stream(load: Load, kind: str, change: str, tmp_path: Any) -> None:
    llm = load(kind)
    llm.prefill(TOKENS[:60])
    state = llm.save_state()
    llm.save_session(tmp_path / "talk")
    changes: dict[str, Callable[[], Any]] = {
        "reset": llm.reset,
        "load_state": lambda: llm.load_state(state),
        "load_session": lambda: llm.load_session(tmp_path / "talk"),
        "eval": lambda: llm.eval([7]),
        "prefill": lambda: llm.prefill(TOKENS[:70]),
    }
    stream = llm.generate(TOKENS[:150], temp=0.0)
    next(stream)
    changes[change]()
    before = condition(llm)
    with pytest.raises(GenerationSuperseded):
        next(stream)
    assert condition(llm) == before


@both
def test_whatever_only_reads_does_not(load: Load, kind: str, tmp_path: Any) -> None:
    llm, twin = load(kind), load(kind)
    streams = [other.generate(TOKENS[:150], temp=0.8, repeat_penalty=1.2) for other in (llm, twin)]
    for _ in range(20):
        assert next(streams[0]) == next(streams[1])
        llm.kv_stats(), llm.save_state(), llm.tokenize(b"A"), llm.detokenize([5])
        llm.save_session(tmp_path / "talk")
        llm.sample(temp=0.0)  # of its own: neither options nor random numbers are those of the stream
        if kind != "unbounded":
            llm.kv_snapshot(), llm.set_pin(4)


@both
def test_a_stream_that_is_never_taken_up_again_does_no_harm(load: Load, kind: str) -> None:
    llm, twin = load(kind), load(kind)
    left = [llm.create_completion(TOKENS[i:150], max_tokens=30, stream=True, **NO_END) for i in range(5)]
    for stream in left:
        next(stream)
    assert complete(llm, 200) == complete(twin, 200)
    del left
    assert complete(llm, 250) == complete(twin, 250)


@both
def test_another_stream_inside_of_a_call_is_a_part_of_it(load: Load, kind: str) -> None:
    llm = load(kind)
    left = llm.generate(TOKENS[:60], temp=0.0)
    next(left)
    errors: list[Exception] = []

    def progress(done: int, total: int) -> None:
        try:
            next(left)
        except GenerationSuperseded as error:
            errors.append(error)

    llm.prefill(TOKENS[:BATCH], progress)
    assert len(errors) == 1 and llm.n_tokens == BATCH


# readers


def test_what_is_held_can_be_read_at_any_time(load: Load) -> None:
    """Each layer and head of a snapshot taken while another thread reads and evicts is one that was there."""
    llm = load("keydiff")
    done, seen, failures = threading.Event(), [], []

    def look() -> None:
        try:
            while not done.is_set():
                stats, snapshot = llm.kv_stats(), llm.kv_snapshot()
                kept = {len(head) for heads in snapshot.values() for head in heads}
                assert len(kept) == 1 and stats.kept + stats.evicted == stats.tokens_seen
                seen.append(stats.tokens_seen)
                for heads in snapshot.values():
                    assert all(np.all(np.diff(head) > 0) for head in heads)
                assert llm.detokenize(llm.tokenize(b"The sea", add_bos=False)) == b"The sea"
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        llm.prefill(TOKENS)
        complete(llm, 100)
        llm.reset()
    done.set()
    for thread in threads:
        thread.join()
    assert not failures and len(set(seen)) > 3


def test_positions_are_copied_only_where_there_is_room(load: Load) -> None:
    """What is copied is counted after the context has finished: it may have grown since the caller asked."""
    llm = load("keydiff")
    llm.prefill(TOKENS[:50])
    found = np.full(50, -7, dtype=np.int32)
    pointer = found.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    for name in ("positions", "rotary"):
        get = getattr(api.library(), f"indexmem_get_{name}")
        for room in (49, 0, -1):
            assert get(llm.ctx, 0, 0, 0, pointer, room) == -1 and "50 are needed" in api.last_error()
        assert (found == -7).all()
        assert get(llm.ctx, 0, 0, 0, pointer, 50) == 50 and sorted(found) == list(range(50))
        found[:] = -7


@both
def test_readers_need_not_wait_for_the_end_of_a_call(load: Load, kind: str) -> None:
    llm, counts = load(kind), []
    looked = threading.Event()

    def look() -> None:
        counts.append(llm.kv_stats().tokens_seen)
        looked.set()

    thread = threading.Thread(target=look)

    def progress(done: int, total: int) -> None:
        if done == 2 * BATCH:
            thread.start()
            while not llm._access._wanting_to_read and not looked.is_set():
                pass
        if done > 3 * BATCH:
            assert looked.is_set()  # between two batches, and not after all of them

    llm.prefill(TOKENS[: 10 * BATCH], progress)
    thread.join()
    assert counts == [2 * BATCH]


@both
def test_who_looks_all_the_time_stops_nobody(load: Load, kind: str) -> None:
    llm, done = load(kind), threading.Event()

    def look() -> None:
        while not done.is_set():
            llm.kv_stats()

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            llm.reset()
            assert llm.create_completion(TOKENS[:300], max_tokens=20, **NO_END)["usage"]["completion_tokens"] >= 20
    finally:
        done.set()
        for thread in threads:
            thread.join()


# the lock by itself


def test_one_thread_may_enter_again_and_again() -> None:
    access = Access()
    with access.alone(), access.alone(), access.between(), access.beside():
        assert access.mine
        access.stand_aside()
    assert not access.mine


def test_who_waited_for_one_that_was_closed_is_told() -> None:
    access = Access()
    entered, waiting = threading.Event(), threading.Event()

    def other() -> None:
        entered.wait(PATIENCE)
        waiting.set()
        with access.alone():
            raise AssertionError("it was closed")

    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(other)
        with access.alone():
            entered.set()
            assert waiting.wait(PATIENCE)
            assert access.close() and not access.close()
        with pytest.raises(ModelClosed):
            outcome.result(PATIENCE)


# loads


def test_loads_in_threads_neither_crash_nor_swap_their_reasons(tiny: Tiny, tmp_path: Any) -> None:
    good, _ = tiny("llama")
    whole = good.read_bytes()
    broken = []
    for i, size in enumerate((100, len(whole) // 2, len(whole) - 40)):
        broken.append(tmp_path / f"broken{i}.gguf")
        broken[-1].write_bytes(whole[:size])
    threads = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}

    def attempt(path: Any) -> str:
        try:
            with indexmem_edge.Llama(path, kv_budget=96, kv_window=16, n_batch=32, **threads) as llm:
                llm.prefill(TOKENS[:200])
                return "loaded"
        except indexmem_edge.ModelFileError as error:
            return str(error)

    paths = [good, *broken]
    expected = [attempt(path) for path in paths]
    assert expected[0] == "loaded" and len(set(expected)) == 4
    with ThreadPoolExecutor(4) as pool:
        for _ in range(6):
            assert list(pool.map(attempt, paths)) == expected


def test_the_log_of_one_thread_is_not_that_of_another(capfd: pytest.CaptureFixture[str]) -> None:
    from indexmem_edge.native import logs

    level, first, second = 4, threading.Event(), threading.Event()

    def other() -> list[str]:
        with logs.collected_errors(False) as lines:
            first.set()
            assert second.wait(PATIENCE)
            logs._log(level, b"llama: the other's\n", None)
            return lines

    with ThreadPoolExecutor(1) as pool, logs.collected_errors(False) as mine:
        outcome = pool.submit(other)
        assert first.wait(PATIENCE)
        logs._log(level, b"llama: mine\n", None)
        logs._log(5, b" goes on\n", None)
        second.set()
        assert outcome.result(PATIENCE) == ["llama: the other's"]
        with logs.quiet(verbose=False):
            logs._log(level, b"llama: nobody's\n", None)
    assert mine == ["llama: mine", "goes on"] and logs.reason(mine) == "mine"
    assert capfd.readouterr() == ("", "")


def test_a_question_while_another_is_read(load: Load) -> None:
    """Two tabs of an application, each with its thread: both get the answers that they would get alone."""
    llm, twin = load("keydiff"), load("keydiff")
    expected = []
    for _ in range(2):
        twin.reset()
        expected.append(twin.create_chat_completion(QUESTION, max_tokens=8, temperature=0.0)["choices"])
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(llm.create_chat_completion, QUESTION, max_tokens=8, temperature=0.0) for _ in range(2)]
        found = [answer.result(PATIENCE)["choices"] for answer in answers]
    assert found == expected
    assert np.isfinite(logits(llm)).all()


# sessions


@both
def test_others_go_on_while_a_session_is_written(load: Load, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, twin, order = load(kind), load(kind), []
    write = sessionfile.write

    def writing(path: Any, data: Any) -> int:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(llm.prefill, TOKENS[300:500]).result(PATIENCE)
        order.append("written")
        return write(path, data)

    for each in (llm, twin):
        each.prefill(TOKENS[:150])
    twin.save_session(tmp_path / "twin")
    monkeypatch.setattr(sessionfile, "write", writing)
    llm.save_session(tmp_path / "talk", copied=lambda: order.append("copied"))
    assert order == ["copied", "written"] and (tmp_path / "talk").read_bytes() == (tmp_path / "twin").read_bytes()
