"""Going back costs what is new: another answer, an edit, a branch, a second question, another conversation."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest

from indexmem_edge import BudgetError, ContextError, DecodeError, KVStats, Llama, llama_cpp
from indexmem_edge.native import find
from indexmem_edge.runtime.checkpoints import Checkpoint, Checkpoints

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

UBATCH = 64
README = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
SYSTEM = {"role": "system", "content": "You are a clerk. The code is 7781."}
DOCUMENT = README[:2400]


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def make(demo_model: Path) -> Iterator[Any]:
    made = []

    def new(**options: Any) -> Llama:
        settings = dict(kv_budget=192, kv_window=48, n_ubatch=UBATCH, n_batch=UBATCH, n_threads=2, kv_pin=0, verbose=False)
        llm = Llama(str(demo_model), **{**settings, **options})
        made.append(llm)
        return llm

    yield new
    for llm in made:
        llm.close()


def answer(llm: Llama, messages: list[dict[str, str]], n: int = 12, **options: Any) -> str:
    reply = llm.create_chat_completion(messages, max_tokens=n, temperature=0, **options)
    return str(reply["choices"][0]["message"]["content"])


def evaluated(llm: Llama) -> int:
    return llm.kv_stats().turn_evaluated


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_another_answer(make: Any) -> None:
    llm = make()
    first = answer(llm, [SYSTEM, ask(DOCUMENT)], 24)
    assert llm.kv_stats().evicted > 0 and evaluated(llm) > 192
    again = answer(llm, [SYSTEM, ask(DOCUMENT)], 24)
    assert evaluated(llm) <= UBATCH and again == first
    assert llm.kv_stats().reevaluated <= UBATCH


def test_the_last_message_is_edited_and_taken_back(make: Any) -> None:
    llm = make()
    history = [SYSTEM, ask(DOCUMENT)]
    history.append(said(answer(llm, history, 20)))
    for question in ("What is the code?", "Name a river.", "Say no."):
        answer(llm, [*history, ask(question)], 20)
        assert evaluated(llm) <= UBATCH
    answer(llm, history[:2], 20)  # as if there had been no question
    assert evaluated(llm) <= 2 * UBATCH


def test_a_second_question_about_a_text(make: Any) -> None:
    llm = make()
    answer(llm, [ask(f"{DOCUMENT}\n\nWhat is this about?")])
    answer(llm, [ask(f"{DOCUMENT}\n\nIs it long, and who would want to read such a thing at all?")])
    assert evaluated(llm) <= 2 * UBATCH


def test_tabs(make: Any) -> None:
    llm = make()
    tabs = [[SYSTEM, ask(f"{DOCUMENT[i * 50 :]}\nSummarise.")] for i in range(3)]
    for tab in tabs:
        tab.append(said(answer(llm, tab)))
    for turn in range(3):
        for tab in tabs:
            tab.append(ask(f"And part {turn}?"))
            tab.append(said(answer(llm, tab)))
            assert evaluated(llm) <= UBATCH


def test_a_stopped_reading(make: Any) -> None:
    llm = make()
    history = [SYSTEM, ask(DOCUMENT)]
    history.append(said(answer(llm, history)))

    def stop(done: int, total: int) -> None:
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.prefill_chat([*history, ask(README[3000:6000])], progress=stop)
    answer(llm, [*history, ask("Go on.")])
    assert evaluated(llm) <= UBATCH


def test_turns_whose_thoughts_are_dropped_do_not_grow(make: Any) -> None:
    """As with templates that leave out what the model thought before earlier answers."""
    llm = make()
    history, counts = [SYSTEM, ask(DOCUMENT)], []
    for turn in range(50):
        text = answer(llm, history, 16)
        history += [said(text[-6:]), ask(f"And number {turn}?")]
        answer(llm, history, 1)
        counts.append(evaluated(llm))
    assert max(counts) <= UBATCH and sum(counts[-10:]) <= 1.2 * sum(counts[:10])


@pytest.mark.parametrize("n", [1, 30, 70])
def test_what_comes_back_is_what_was(make: Any, n: int) -> None:
    """The same logits as in a conversation that never was anywhere else."""
    llm, other = make(kv_checkpoints=0), make(kv_checkpoints=0)
    tokens = llm.tokenize(README[:5000].encode(), add_bos=False)
    for one in (llm, other):
        one.eval(tokens[:500])
    kept = llm.checkpoint()
    assert len(kept) == 500 and kept.nbytes > 1000
    for _ in range(2):
        llm.eval(tokens[600 : 600 + 100 * n])
        llm.restore(kept)
        assert llm.n_tokens == 500 and llm.input_ids[:500].tolist() == tokens[:500]
        assert llm.sample(temp=0) == other.sample(temp=0)
    for one in (llm, other):
        one.eval(tokens[500:560])
    logits = [one._inside.last_logits() for one in (llm, other)]
    np.testing.assert_array_equal(*logits)
    assert llm.kv_stats().checkpoints == 0


def test_a_checkpoint_outlives_its_llama(make: Any) -> None:
    """It is a state as the library writes it, which another cache takes up: one of another budget, too."""
    llm = make(kv_checkpoints=0)
    tokens = llm.tokenize(README[:3000].encode(), add_bos=False)
    llm.eval(tokens[:500])
    kept = llm.checkpoint()
    assert kept.device_nbytes == 0 < len(kept.state) <= kept.nbytes
    written = (ctypes.c_uint8 * len(kept.state))()
    assert llama_cpp.llama_state_seq_get_data(llm.ctx, written, len(kept.state), 0) == len(kept.state)
    assert bytes(written) == kept.state
    llm.eval(tokens[500:560])
    after = llm._inside.last_logits().copy()
    llm.close()
    for budget in (192, 256):
        other = make(kv_checkpoints=0, kv_budget=budget)
        other.eval(tokens[600:900])
        other.restore(kept)
        assert other.n_tokens == 500 and other.kv_stats().kept <= budget
        other.eval(tokens[500:560])
        if budget == 192:
            np.testing.assert_array_equal(other._inside.last_logits(), after)
    smaller = make(kv_checkpoints=0, kv_budget=128)  # what it has no room for leaves
    smaller.restore(kept)
    assert smaller.n_tokens == 500 and smaller.kv_stats().kept <= 128


def test_where_copies_lie_is_said() -> None:
    stats = KVStats("streaming", 64, 100, 60, 40, cancel_bytes=2048, checkpoints=2, checkpoint_bytes=4096)
    assert "on the device" not in str(stats)
    here = replace(stats, cancel_device_bytes=1024, checkpoint_device_bytes=3072)
    assert "2.0 KiB (1.0 KiB of it on the device), a copy" in str(here) and "2, 4.0 KiB (3.0 KiB of it on the device)" in str(here)


def test_a_checkpoint_of_another_cache_is_refused(make: Any) -> None:
    llm, other = make(), make(type_k=8, type_v=8)
    tokens = llm.tokenize(README[:3000].encode(), add_bos=False)
    with pytest.raises(ContextError, match="nothing has been read"):
        llm.checkpoint()
    llm.eval(tokens[:400])
    kept = llm.checkpoint()
    other.eval(tokens[100:300])
    before = other.kv_snapshot()
    with pytest.raises(ContextError, match="does not fit"):
        other.restore(kept)
    assert other.n_tokens == 200 and all((a == b).all() for i in before for a, b in zip(before[i], other.kv_snapshot()[i]))
    with pytest.raises(BudgetError, match="kv_budget"):
        make(kv_budget=None, n_ctx=512).checkpoint()


def test_a_checkpoint_longer_than_n_ctx_is_refused(make: Any) -> None:
    llm, short = make(), make(n_ctx=256)
    tokens = llm.tokenize(README[:3000].encode(), add_bos=False)
    llm.eval(tokens[:400])
    short.eval(tokens[100:120])
    before = short.kv_snapshot()
    with pytest.raises(ContextError, match="is of 400 tokens and n_ctx is 256: give Llama a larger n_ctx"):
        short.restore(llm.checkpoint())
    assert short.n_tokens == short.kv_stats().tokens_seen == 20
    assert all((a == b).all() for i in before for a, b in zip(before[i], short.kv_snapshot()[i]))


def test_a_prompt_longer_than_n_ctx_is_refused_before_it_is_read(make: Any) -> None:
    llm = make(n_ctx=256)
    tokens = llm.tokenize(README[:3000].encode(), add_bos=False)
    llm.eval(tokens[100:120])
    with pytest.raises(DecodeError, match="n_ctx is 256 and 300 tokens were to be evaluated"):
        llm.prefill(tokens[:300])
    assert llm.n_tokens == 20 and llm.prefill(tokens[100:130]) == 10


def test_bytes_are_bounded_counted_and_can_be_none(make: Any) -> None:
    llm = make(kv_checkpoints=12_000_000)
    for i in range(6):
        answer(llm, [ask(f"{i} {DOCUMENT}")])
        stats = llm.kv_stats()
        assert 0 < stats.checkpoint_bytes <= 12_000_000 and stats.checkpoints >= 1
    assert "checkpoints" in str(stats)
    none = make(kv_checkpoints=0)
    answer(none, [ask(DOCUMENT)], 24)
    answer(none, [ask(DOCUMENT)], 24)
    assert none.kv_stats().checkpoints == 0 and none.kv_stats().reevaluated > 192


# which leave first


class _Copy:
    nbytes = 100


def full(*texts: str) -> Checkpoints:
    """Checkpoints of 100 bytes and 4 a token."""
    kept = Checkpoints(1 << 20)
    for text in texts:
        kept._kept.append(Checkpoint(np.array([ord(c) for c in text], np.intc), len(text), None, _Copy()))  # type: ignore[arg-type]
    return kept


def names(kept: Checkpoints) -> list[str]:
    return ["".join(map(chr, one.tokens)) for one in kept._kept]


@pytest.mark.parametrize(
    "texts, left",
    [
        (("a", "ab", "x"), ["ab", "x"]),  # the oldest
        (("x", "a", "ab", "abc"), ["x", "ab", "abc"]),  # two newer ones of its conversation
        (("x", "a", "ab", "xy"), ["a", "ab", "xy"]),
    ],
)
def test_who_leaves(texts: tuple[str, ...], left: list[str]) -> None:
    kept = full(*texts)
    kept._drop()
    assert names(kept) == left


def test_the_longest_that_fits() -> None:
    kept = full("a", "abc", "abcd", "abx")


    def best(text: str) -> int:
        return kept.best(np.array([ord(c) for c in text], np.intc))[1]

    assert best("abcdef") == 4 and best("abcd") == 3 and best("b") == 0 and best("a") == 0
    kept._kept[2].logits = np.zeros(3, np.single)
    assert best("abcd") == 4
    kept._kept[2].least = 2  # of which the last two tokens can be taken out
    assert best("abyy") == 2 and best("ayyy") == 1 and best("abc") == 2
