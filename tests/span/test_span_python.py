"""Positions that stay inside the trained length, as `Llama`, its sessions, cancels and figures, and the commands have them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import BudgetError, Cancelled, SessionError, llama_cpp
from indexmem_edge.native import api, find
from indexmem_edge.options import CacheOptions
from indexmem_edge.sessions.file import SessionData, read, write
from indexmem_edge.stats import KVStats, trained_length_warning
from support.cancelling import held, logits
from support.commands import one_error, run
from support.states import of_format_6

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

TRAINED, BUDGET, WINDOW, UBATCH = 256, 96, 16, 64
SMALLEST = BUDGET + UBATCH
TOKENS = [3 + (7 * i * i + 5 * i) % 250 for i in range(2000)]
Q4_0 = llama_cpp.GGML_TYPE_Q4_0


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    return tiny("llama", n_ctx_train=TRAINED)[0]


def load(model: Path, **options: Any) -> Any:
    defaults = {"kv_budget": BUDGET, "kv_window": WINDOW, "n_ubatch": UBATCH, "n_threads": 1, "n_threads_batch": 1}
    return indexmem_edge.Llama(model, verbose=False, **{**defaults, **options})


def answer(llm: Any, prompt: list[int], n: int = 12) -> list[int]:
    return [token for _, token in zip(range(n), llm.generate(prompt, temp=0.0))]


# options


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kv_span": -1}, "kv_span must be from 0 to"),
        ({"kv_span": 1 << 31}, "kv_span must be from 0 to"),
        ({"kv_span": "long"}, "kv_span must be a whole number"),
        ({"kv_span": True}, "kv_span must be a whole number"),
        ({"kv_span": 300, "kv_budget": None, "kv_window": None}, "kv_span needs a bounded KV cache: give a kv_budget"),
        ({"kv_span": SMALLEST - 1}, f"budget of {BUDGET} and a ubatch of {UBATCH} do not fit a span of {SMALLEST - 1}"),
        ({"kv_span": 300, "type_k": Q4_0}, "q4_0"),
    ],
)
def test_impossible_spans(model: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        load(model, **options)


def test_what_the_library_is_asked_for() -> None:
    def asked(**options: Any) -> CacheOptions:
        return CacheOptions.from_keywords({"kv_budget": BUDGET, "kv_window": WINDOW, **options})

    assert [asked(kv_span=span).span for span in (None, 0, 500)] == [None, 0, 500]
    assert api.library().indexmem_default_params().span == api.SPAN_TRAINED  # what None leaves there
    assert asked(kv_span=500).keywords()["kv_span"] == 500 and "kv_span" not in asked(kv_span=500).for_session()
    assert CacheOptions.from_keywords({"kv_budget": 0, "kv_span": 0}) == CacheOptions()


def test_a_pickle_has_the_span(model: Path) -> None:
    copy = pickle.loads(pickle.dumps(load(model, kv_span=SMALLEST)))
    assert copy.kv_options.span == copy.kv_stats().span == SMALLEST


# what is in force, and what is said about it


def test_the_trained_length_is_kept_and_nothing_is_refused_beyond_it(model: Path) -> None:
    llm = load(model)
    assert llm.n_ctx() > 1000 * TRAINED
    out = llm.create_completion(TOKENS[: 3 * TRAINED], max_tokens=TRAINED, temperature=0.0, logit_bias={2: -100.0})
    assert out["usage"]["completion_tokens"] >= TRAINED  # more where it would end within a character
    stats = llm.kv_stats()
    assert stats.tokens_seen >= 4 * TRAINED - 1 and stats.span == TRAINED and stats.rebases > 2
    assert stats.kept <= stats.next_position <= TRAINED and stats.rebase_seconds > 0
    assert stats.warnings == () and stats.span_reason == "" and stats.n_ctx_train == TRAINED
    assert np.isfinite(logits(llm)).all()
    shown = stats.to_dict()
    assert [shown[name] for name in ("span", "rebases", "next_position")] == [TRAINED, stats.rebases, stats.next_position]
    assert f"below {TRAINED}, the next is {stats.next_position}; renewed {stats.rebases} times in" in str(stats)
    assert f"positions renewed {stats.rebases} times" in stats.line()
    llm.reset()
    stats = llm.kv_stats()
    assert (stats.rebases, stats.next_position) == (0, 0) and "not renewed yet" in str(stats)


def test_logits_of_all_tokens_are_kept_beyond_the_trained_length(model: Path) -> None:
    llm = load(model, logits_all=True, n_ctx=4 * TRAINED)
    llm.eval(TOKENS[: 3 * TRAINED])
    assert llm.kv_stats().rebases > 0 and np.isfinite(llm.scores[: 3 * TRAINED]).all() and llm.scores[3 * TRAINED - 1].any()


def test_without_a_span_positions_grow_and_the_reason_is_told(model: Path) -> None:
    asked, cannot = load(model, kv_span=0), load(model, type_k=Q4_0, type_v=Q4_0)
    plain = load(model, kv_budget=None, kv_window=None, n_ctx=4 * TRAINED)
    for llm, why in ((asked, "kv_span is 0"), (cannot, "q4_0"), (plain, "only a cache with a kv_budget")):
        llm.eval(TOKENS[:TRAINED])
        assert llm.kv_stats().warnings == ()
        llm.eval(TOKENS[TRAINED : 2 * TRAINED])
        stats = llm.kv_stats()
        assert (stats.span, stats.rebases, stats.next_position) == (0, 0, 2 * TRAINED)
        (warning,) = stats.warnings
        assert f"position {2 * TRAINED} is beyond the {TRAINED} tokens" in warning and why in warning
        assert "renewed" not in stats.line()
    assert asked.kv_stats().span_reason == "" and "q4_0" in cannot.kv_stats().span_reason
    assert "grow with the text, because keys of type q4_0" in str(cannot.kv_stats())
    assert "grow with the text\n" in str(asked.kv_stats())


def test_words_for_counts() -> None:
    once = KVStats(policy="streaming", budget=64, tokens_seen=300, kept=64, evicted=236, span=256, next_position=130, rebases=1)
    assert "positions renewed once" in once.line() and "renewed once in 0.000 s" in str(once)
    assert trained_length_warning(256, 256, "") is None and trained_length_warning(257, 0, "") is None


# what is kept


@pytest.mark.parametrize("policy", ["streaming", "keydiff", "snapkv"])
def test_the_snapshot_shows_both_positions(model: Path, policy: str) -> None:
    llm = load(model, kv_policy=policy, kv_pin=9)
    llm.eval(TOKENS[:TRAINED])
    assert held(llm, rotary=True) == held(llm, rotary=False)
    for start in range(TRAINED, len(TOKENS), 50):
        llm.eval(TOKENS[start : start + 50])
        stats = llm.kv_stats()
        indices, rotary = llm.kv_snapshot(), llm.kv_snapshot(rotary=True)
        assert indices.keys() == rotary.keys() and stats.rebases > 0
        for layer, heads in indices.items():
            assert len(heads) == len(rotary[layer])
            for index, turned in zip(heads, rotary[layer]):
                assert turned.dtype == np.int32 and len(turned) == len(index) == stats.kept
                steps = np.diff(turned)
                assert (steps > 0).all() and (steps[9:] <= np.diff(index)[9:]).all()  # behind the prefix there is room
                assert turned[:9].tolist() == list(range(9)) and turned[-1] == stats.next_position - 1 < TRAINED
                assert (steps[-WINDOW + 1 :] == 1).all() and index[-1] == stats.tokens_seen - 1


def test_below_the_span_nothing_is_different(model: Path) -> None:
    with_span, without = load(model, kv_policy="keydiff"), load(model, kv_policy="keydiff", kv_span=0)
    for start in range(0, TRAINED, 32):
        for llm in (with_span, without):
            llm.eval(TOKENS[start : start + 31])
            llm.eval(TOKENS[start + 31 : start + 32])
        assert np.array_equal(logits(with_span), logits(without))
    assert with_span.kv_stats().evicted > 0 and with_span.kv_stats().rebases == 0
    for llm in (with_span, without):
        llm.eval(TOKENS[TRAINED : TRAINED + 1])
    assert with_span.kv_stats().rebases == 1 and not np.array_equal(logits(with_span), logits(without))


def test_an_edit_after_positions_were_renewed_is_evaluated_again_and_said(model: Path) -> None:
    llm = load(model, kv_checkpoints=0)
    llm.prefill(TOKENS[: 2 * TRAINED])
    while llm.kv_stats().rebases == 3:
        llm.eval([TOKENS[llm.n_tokens]])
    prompt = llm._input_ids.tolist()
    edited = [*prompt[:-4], 9, 8, 7]
    answers = [answer(other, edited) for other in (llm, load(model, kv_checkpoints=0))]
    stats = llm.kv_stats()
    assert answers[0] == answers[1] and stats.reevaluated == len(prompt) - 4 and stats.turn_evaluated == len(edited)
    assert "got new positions" in stats.reevaluated_reason


# sessions


@pytest.fixture
def renewed(model: Path, tmp_path: Path) -> Path:
    """A session whose positions have been renewed."""
    llm = load(model)
    llm.eval(TOKENS[:700])
    assert llm.kv_stats().rebases > 0
    llm.save_session(tmp_path / "renewed")
    return tmp_path / "renewed"


def test_a_session_goes_on_where_it_was(model: Path, renewed: Path) -> None:
    llm, twin = load(model), load(model)
    twin.eval(TOKENS[:700])
    llm.load_session(renewed)
    for start in range(700, 1500, 40):
        for other in (llm, twin):
            other.eval(TOKENS[start : start + 39])
            other.eval(TOKENS[start + 39 : start + 40])
        assert np.array_equal(logits(llm), logits(twin))
        assert held(llm, True) == held(twin, True)
    ours, theirs = llm.kv_stats(), twin.kv_stats()
    assert (ours.rebases, ours.next_position, ours.reevaluated) == (theirs.rebases, theirs.next_position, 0)


@pytest.mark.parametrize("span", [SMALLEST, TRAINED + 1, 4 * TRAINED])
def test_it_needs_a_span_of_any_length(model: Path, renewed: Path, span: int) -> None:
    llm = load(model, kv_span=span)
    llm.load_session(renewed)
    before = llm.kv_stats()
    llm.eval(TOKENS[700:1900])
    stats = llm.kv_stats()
    assert stats.tokens_seen == 1900 and stats.reevaluated == 0 and stats.next_position <= span
    assert stats.rebases > before.rebases > 0 and np.isfinite(logits(llm)).all()


def test_without_one_it_is_refused_with_what_to_do(model: Path, renewed: Path) -> None:
    for options, words in (({"kv_span": 0}, "leave --kv-span 0 .* out"), ({"n_ubatch": TRAINED}, "this one has none, because")):
        llm = load(model, **options)
        llm.eval(TOKENS[:300])
        before = held(llm, True)
        with pytest.raises(SessionError, match=f"positions had been renewed, and needs a span to go on: {words}"):
            llm.load_session(renewed)
        assert llm.n_tokens == 300 and held(llm, True) == before


def test_a_state_is_refused_like_a_session(model: Path, renewed: Path) -> None:
    llm = load(model)
    llm.load_session(renewed)
    state = llm.save_state()
    with pytest.raises(RuntimeError):
        load(model, kv_span=0).load_state(state)
    other = load(model, kv_span=TRAINED - 20)
    other.load_state(state)
    assert held(other, True) == held(llm, True) and other.n_tokens == 700


def test_a_session_without_a_span_heals(model: Path, tmp_path: Path) -> None:
    grown = load(model, kv_span=0)
    grown.eval(TOKENS[: 3 * TRAINED])
    grown.save_session(tmp_path / "grown")
    llm = load(model)
    llm.load_session(tmp_path / "grown")
    assert llm.kv_stats().next_position == 3 * TRAINED and held(llm, True) == held(grown, True)
    llm.eval(TOKENS[3 * TRAINED : 3 * TRAINED + 1])
    stats = llm.kv_stats()
    assert stats.rebases == 1 and stats.next_position <= TRAINED and stats.warnings == () and stats.reevaluated == 0
    assert held(llm, False) == held_after(grown) and max(head[-1] for head in held(llm, True)[0]) < TRAINED


def held_after(llm: Any) -> dict[int, list[list[int]]]:
    """What is held after the same token."""
    llm.eval(TOKENS[3 * TRAINED : 3 * TRAINED + 1])
    return held(llm, False)


def test_a_file_from_before_there_were_spans_is_accepted(model: Path, tmp_path: Path) -> None:
    llm = load(model)
    llm.eval(TOKENS[:200])
    llm.save_session(tmp_path / "new")
    data = read(tmp_path / "new")
    header = {name: value for name, value in data.header.items() if name not in ("rebases", "rope_factors")}
    assert len(header) == len(data.header) - 2 and "kv_span" not in header
    state = of_format_6(data.state, "streaming", 4, WINDOW)
    write(tmp_path / "old", SessionData(header, data.tokens, data.extra, state))
    for options in ({}, {"kv_span": 0}, {"kv_span": SMALLEST}):
        other = load(model, **options)
        other.load_session(tmp_path / "old")
        assert held(other, False) == held(llm, False)
        other.eval(TOKENS[200:600])
        assert other.kv_stats().tokens_seen == 600 and (other.kv_stats().rebases > 0) == (options != {"kv_span": 0})


def test_keys_of_short_and_of_long_texts_are_kept_apart(tiny: Tiny, tmp_path: Path) -> None:
    """Where a model has two tables of rotary factors, the length that is kept to decides between them."""
    original = ("rope.scaling.original_context_length", 200)
    path = tiny("phi3", n_ctx_train=400, metadata=(original,))[0]
    long, short = load(path), load(path, kv_span=200)
    for llm, other, words in ((long, short, "rope_factors = 'long', this one has 'short'"), (short, long, "= 'short'")):
        llm.eval(TOKENS[:100])
        llm.save_session(tmp_path / "s")
        with pytest.raises(SessionError, match=words):
            other.load_session(tmp_path / "s")
        llm.load_session(tmp_path / "s")
    yarn = tiny("llama", n_ctx_train=400, metadata=(original, ("rope.scaling.type", "yarn"), ("rope.scaling.factor", 2.0)))[0]
    llm = load(yarn)
    llm.eval(TOKENS[:100])
    llm.save_session(tmp_path / "s")
    load(yarn, kv_span=200).load_session(tmp_path / "s")


# cancelling


def test_a_cancelled_call_that_renewed_positions_has_not_happened(model: Path, tmp_path: Path) -> None:
    """Nothing is evicted, but positions are renewed before the first token: a copy of the state is needed all the same."""
    grown = load(model, kv_span=0)
    grown.eval(TOKENS[: 3 * TRAINED])
    while (room := BUDGET - grown.kv_stats().kept) < 2:
        grown.eval([TOKENS[grown.n_tokens]])
    grown.save_session(tmp_path / "grown")
    for keep in (True, False):
        llm = load(model, kv_cancel=keep)
        llm.load_session(tmp_path / "grown")
        before = held(llm, True), held(llm, False), llm.kv_stats().rebases, llm.kv_stats().evicted
        history = llm._input_ids.tolist()

        def stop(done: int, total: int) -> None:
            stats = llm.kv_stats()
            assert stats.rebases == 1 and stats.evicted == before[3]
            assert llm.cancel()

        with pytest.raises(Cancelled):
            llm.prefill([*history, *TOKENS[:room]], stop)
        assert llm.n_tokens == len(history)
        if keep:
            assert (held(llm, True), held(llm, False), llm.kv_stats().rebases, llm.kv_stats().evicted) == before
        assert llm.kv_stats().reevaluated == (0 if keep else len(history))


# commands

FLAGS = ("--kv-budget", "192", "--kv-window", "32", "-n", "4", "--temp", "0", "-t", "1", "-ub", "64", "-b", "64")


def test_commands_take_a_span(tmp_path: Path, demo_model: Path) -> None:
    text = "The lighthouse keeper counted the ships. " * 60
    stats = json.loads(run("generate", *FLAGS, "--kv-span", "300", "--json", "-p", text).stdout)["stats"]
    assert stats["span"] == 300 and stats["rebases"] > 0 and 0 < stats["next_position"] <= 300 and stats["warnings"] == []
    one_error(run("generate", *FLAGS, "--kv-span", "200", "-p", text), "192", "64", "200")
    one_error(run("generate", "--kv-budget", "0", "--kv-span", "300", "-p", text), "kv_span needs", "kv_budget")
    for command in ("chat", "generate"):
        assert "--kv-span" in run(command, "--help").stdout


def test_the_chat_says_once_that_positions_are_renewed_and_counts(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "book.txt").write_text("The lighthouse keeper counted the ships. " * 60)
    lines = f"/read {tmp_path}/book.txt\nWho?\nWho else?\n/stats\n/reset\n/stats\n"
    result = run("chat", *FLAGS, "--kv-span", "300", stdin=lines)
    assert result.returncode == 0 and result.stderr.count("position 300 has been reached") == 1, result.stderr
    first, second = result.stdout.split("policy ")[1:]
    assert "positions     below 300, the next is " in first and "; renewed " in first
    assert "positions     below 300, the next is 0; not renewed yet" in second


def test_a_loaded_chat_says_what_happens_after_it(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "book.txt").write_text("The lighthouse keeper counted the ships. " * 60)
    run("chat", *FLAGS, "--kv-span", "300", stdin=f"/read {tmp_path}/book.txt\nWho?\n/save {tmp_path}/s\n")
    lines = f"/load {tmp_path}/s\nWho?\n/stats\n"
    result = run("chat", *FLAGS, stdin=lines)
    assert "has been reached" not in result.stderr and "; renewed " in result.stdout and result.returncode == 0
    result = run("chat", *FLAGS, "--kv-span", "0", stdin=f"/load {tmp_path}/s\n")
    one_error(result, "needs a span to go on: leave --kv-span 0")


def test_doctor_and_inspect_say_what_holds(tiny: Tiny, model: Path) -> None:
    found = run("doctor", "-m", str(model)).stdout
    assert f"renews positions; with a budget they stay below {TRAINED}" in found and "Everything is in order" in found
    short = tiny("llama", n_ctx_train=100)[0]
    found = run("doctor", "-m", str(short)).stdout
    assert "positions grow with the text, because a budget of 48 and a ubatch of 64 do not fit a span of 100" in found
    assert f"below {TRAINED} with a budget" in run("inspect", str(model)).stdout
