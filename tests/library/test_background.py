"""A session as a background: what it kept stays in front of every prompt of a new conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import Cancelled, DecodeError, Llama, SessionError, SessionInfo
from indexmem_edge.native import find

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

OLD = [3 + (7 * i) % 250 for i in range(300)]
NEW = [3 + (11 * i + 5) % 250 for i in range(300)]
OTHER = [3 + (13 * i + 9) % 250 for i in range(300)]
Make = Callable[..., Llama]


@pytest.fixture
def make(tiny: Tiny) -> Iterator[Make]:
    made: list[Llama] = []

    def new(arch: str = "llama", **options: Any) -> Llama:
        defaults = dict(
            kv_budget=96, kv_window=16, n_ubatch=32, n_batch=32, n_threads=1, n_threads_batch=1, verbose=False, kv_warn=lambda _: None
        )
        made.append(Llama(tiny(arch)[0], **{**defaults, **options}))
        return made[-1]

    yield new
    for llm in made:
        llm.close()


@pytest.fixture
def saved(make: Make, tmp_path: Path) -> Path:
    llm = make()
    llm.prefill(OLD)
    llm.save_session(tmp_path / "old", extra="old")
    return tmp_path / "old"


def drawn(llm: Llama, prompt: list[int], n: int = 8) -> list[int]:
    return [token for _, token in zip(range(n), llm.generate(prompt, temp=0.0))]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("span", [None, 200])
def test_a_prompt_comes_after_what_was_kept(make: Make, tmp_path: Path, arch: str, span: Any) -> None:
    """As if it had been said in the old conversation, but for what it was matched with."""
    options = dict(kv_span=span, kv_window=20)
    old, new = make(arch, **options), make(arch, **options)
    old.prefill(OLD)
    old.save_session(tmp_path / "s", extra="old")
    assert new.load_session(tmp_path / "s", as_background=True) == "old"
    assert new.kv_stats().background == 300 and "background    the first 300" in str(new.kv_stats())
    assert new.prefill(NEW[:100]) == 100 and new.kv_stats().turn_reused == 300
    old.eval(NEW[:100])
    np.testing.assert_equal(new.kv_snapshot(), old.kv_snapshot())
    assert drawn(new, NEW[:100]) == drawn(old, OLD + NEW[:100])
    assert new.prefill(NEW[:150]) <= 150 - 100 + 32


def test_another_beginning_goes_back_to_the_background(make: Make, saved: Path) -> None:
    """It costs the new prompt, with no copies kept for edits, too."""
    for copies in (None, 0):
        llm, fresh = make(kv_checkpoints=copies), make()
        llm.load_session(saved, as_background=True)
        llm.prefill(NEW)
        assert llm.prefill(OTHER[:50]) == 50 and llm.kv_stats().reevaluated == 0
        fresh.load_session(saved, as_background=True)
        fresh.prefill(OTHER[:50])
        np.testing.assert_equal(llm.kv_snapshot(), fresh.kv_snapshot())
        assert llm.kv_stats().checkpoint_bytes > 0


def test_its_state_stays_whatever_else_is_kept(make: Make, saved: Path, tmp_path: Path) -> None:
    """A session that has a background brings its state along as a checkpoint; those leave when others need their memory."""
    first = make()
    first.load_session(saved, as_background=True)
    first.prefill(NEW[:120])
    first.save_session(tmp_path / "both")
    one = first.kv_stats().checkpoint_bytes
    for limit in (0, 3 * one):
        llm = make(kv_checkpoints=limit)
        llm.load_session(tmp_path / "both")
        fresh = make()
        fresh.load_session(tmp_path / "both")
        for i in range(8):
            assert llm.prefill(OTHER[7 * i :][:50]) == 50 and llm.kv_stats().reevaluated == 0
            assert llm.kv_stats().checkpoint_bytes <= limit + one
        fresh.prefill(OTHER[49:][:50])
        np.testing.assert_equal(llm.kv_snapshot(), fresh.kv_snapshot())
        llm.save_session(tmp_path / "again")
        fresh.load_session(tmp_path / "again")
        assert fresh.prefill(OTHER[:20]) == 20


def test_reset_and_other_sessions_end_it(make: Make, saved: Path, tmp_path: Path) -> None:
    llm, plain = make(), make()
    llm.load_session(saved, as_background=True)
    llm.reset()
    plain.prefill(NEW)
    assert llm.prefill(NEW) == 300 and llm.kv_stats().background == 0
    np.testing.assert_equal(llm.kv_snapshot(), plain.kv_snapshot())
    llm.load_session(saved, as_background=True)
    llm.load_session(saved)
    assert llm.kv_stats().background == 0 and llm.prefill([*OLD, 5]) == 1


def test_it_is_saved_with_the_conversation(make: Make, saved: Path, tmp_path: Path) -> None:
    first, second = make(), make()
    first.load_session(saved, as_background=True)
    first.prefill(NEW[:120])
    first.save_session(tmp_path / "both")
    assert (info := SessionInfo.read(tmp_path / "both")).background == 300 and info.tokens == 420 and info.checkpoints == 1
    second.load_session(tmp_path / "both")
    assert second.kv_stats().background == 300
    assert second.prefill(NEW[:130]) == 10
    assert second.prefill(OTHER[:20]) == 20, "its state goes along"
    third = make()
    third.load_session(tmp_path / "both", as_background=True)
    assert third.kv_stats().background == 420 and third.prefill(OTHER[:20]) == 20
    fourth = make(kv_budget=60)
    fourth.load_session(tmp_path / "both", again=True)
    assert fourth.kv_stats().background == 300 and fourth.prefill(NEW[:125]) == 5


def test_checkpoints_know_it(make: Make, saved: Path) -> None:
    llm = make()
    llm.prefill(NEW[:50])
    before = llm.checkpoint()
    llm.load_session(saved, as_background=True)
    llm.prefill(NEW[:60])
    after = llm.checkpoint()
    llm.restore(before)
    assert llm.kv_stats().background == 0 and llm.prefill(NEW[:55]) == 5
    llm.restore(after)
    assert llm.kv_stats().background == 300 and llm.prefill(NEW[:65]) == 5
    assert llm.prefill(OTHER[:30]) == 30


def test_cancelled_calls_leave_it(make: Make, saved: Path) -> None:
    llm = make()
    llm.load_session(saved, as_background=True)
    llm.prefill(NEW[:40])
    before = llm.kv_snapshot()
    with llm.watch(lambda done, total: done > 60 and llm.cancel()):
        with pytest.raises(Cancelled):
            llm.prefill(OTHER)
        with pytest.raises(Cancelled):
            llm.load_session(saved, again=True)
    np.testing.assert_equal(llm.kv_snapshot(), before)
    assert llm.kv_stats().background == 300 and llm.prefill(NEW[:45]) == 5


def test_samples_and_text_completions(make: Make, saved: Path) -> None:
    """What computes logits again, and what echoes a prompt, knows where the prompt begins."""
    llm = make()
    llm.load_session(saved, as_background=True)
    llm.prefill(NEW[:40])
    expected = llm.sample(temp=0.0)
    llm._inside.fresh = False
    assert llm.sample(temp=0.0) == expected and llm.n_tokens == 340
    answer = llm.create_completion("ab", max_tokens=2, temperature=0.0, echo=True)
    assert answer["choices"][0]["text"].startswith("ab") and answer["usage"]["prompt_tokens"] == 3


def test_a_chat_goes_on_turn_by_turn(make: Make, saved: Path) -> None:
    """Its system prompt is not pinned: the first tokens are those of the background."""
    llm = make(kv_budget=256)
    llm.load_session(saved, as_background=True)
    pin = llm.kv_stats().pin
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    for turn in range(3):
        reply = llm.create_chat_completion(messages, max_tokens=5, temperature=0.0)["choices"][0]["message"]
        new = sum(len(m["content"]) for m in messages[-2 * (turn > 0) - 2 :]) + 40
        assert llm.kv_stats().turn_evaluated <= new and llm.kv_stats().reevaluated <= 32 * turn
        messages += [{"role": "assistant", "content": reply["content"] or ""}, {"role": "user", "content": "And more"}]
    assert llm.kv_stats().pin == pin


def test_what_it_needs(make: Make, saved: Path) -> None:
    with pytest.raises(SessionError, match="needs a kv_budget"):
        make(kv_budget=None, kv_window=None, n_ctx=1024).load_session(saved, as_background=True)
    with pytest.raises(SessionError, match="needs logits_all to be left out"):
        make(logits_all=True, n_ctx=1024).load_session(saved, as_background=True)
    empty = make()
    empty.save_session(saved)
    empty.load_session(saved, as_background=True)
    assert empty.kv_stats().background == 0 and empty.prefill(NEW[:10]) == 10


def test_a_refused_session_leaves_it(make: Make, saved: Path, tmp_path: Path) -> None:
    llm, other = make(), make(type_k=8, type_v=8)
    llm.load_session(saved, as_background=True)
    llm.prefill(NEW[:40])
    before = llm.kv_snapshot()
    other.prefill(OLD)
    other.save_session(tmp_path / "other")
    damaged = bytearray(saved.read_bytes())
    damaged[-50] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    for name, words in (("other", "type_k"), ("damaged", "checksum")):
        with pytest.raises(SessionError, match=words):
            llm.load_session(tmp_path / name, as_background=True)
        assert llm.kv_stats().background == 300
        np.testing.assert_equal(llm.kv_snapshot(), before)
    assert llm.prefill(NEW[:45]) == 5 and llm.prefill(OTHER[:20]) == 20


def test_it_fits_another_budget_and_memory(make: Make, saved: Path) -> None:
    small = make(kv_budget=60, memory="centroid", memory_slots=8)
    small.load_session(saved, as_background=True)
    assert small.kv_stats().kept == 52 and small.kv_stats().background == 300
    assert small.prefill(NEW[:50]) == 50 and small.prefill(OTHER[:50]) == 50


@pytest.mark.parametrize("n", [None, 100, 7])
def test_an_answer_ends_where_n_ctx_does(make: Make, saved: Path, n: Optional[int]) -> None:
    """The background is in front of it, and counts."""
    llm = make(n_ctx=512)
    llm.load_session(saved, as_background=True)
    answer: Any = llm.create_completion(NEW[:180], max_tokens=n, temperature=0.0, logit_bias={llm.token_eos(): -1e9})
    choice, usage = answer["choices"][0], answer["usage"]
    assert choice["finish_reason"] == "length" and usage["completion_tokens"] == min(n or 32, 512 - 300 - 180)
    with pytest.raises(DecodeError, match="n_ctx is 512 and 513 tokens were to be evaluated"):
        llm.create_completion(NEW[:213], max_tokens=1)
