"""Cancelled in the middle of a prompt and of an answer, models of several kinds of layers go on like ones that were not."""

from __future__ import annotations

from typing import Any

import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import Cancelled
from indexmem_edge.native import find
from support.cancelling import TOKENS, Nodes
from support.mixed import KINDS, RECURRENT

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")


def load(tiny: Tiny, name: str, budget: int) -> Any:
    threads = {"n_threads": 1, "n_threads_batch": 1}
    return indexmem_edge.Llama(
        tiny(name)[0], kv_budget=budget, kv_window=33, n_batch=48, n_ubatch=24, seed=5, verbose=False, **threads
    )


def answer(llm: Any, prompt: list[int], n: int) -> list[int]:
    """The likeliest tokens: what a person would have read."""
    return [token for _, token in zip(range(n), llm.generate(prompt, temp=0.0))]



@pytest.mark.parametrize("name", [*RECURRENT, *(name for name in KINDS if name not in RECURRENT)])
@pytest.mark.parametrize("budget", [96, 700], ids=["evicting", "room for all"])
def test_tokens_are_those_of_a_run_that_was_never_cancelled(tiny: Tiny, name: str, budget: int) -> None:
    first, second, third = TOKENS[:150], TOKENS[150:290], TOKENS[290:330]
    llm, whole = load(tiny, name, budget), load(tiny, name, budget)
    said = answer(whole, first, 20)
    assert answer(llm, first, 20) == said
    history = [*first, *said, *second]
    with Nodes(whole) as reading:
        whole.prefill(history)
    for share in (0.1, 0.5, 0.95):  # in the middle of a prompt
        with Nodes(llm, stop_after=max(1, int(share * reading.count))) as stopped, pytest.raises(Cancelled):
            llm.prefill(history)
        assert stopped.heard
    llm.prefill(history)
    expected = answer(whole, history, 30)
    with Nodes(load(tiny, name, budget)) as speaking:
        other = speaking._llm
        other.prefill(first)
        before = speaking.count
        answer(other, [*first, *said[:1]], 12)
    for share in (0.2, 0.6, 0.9):  # and of an answer
        with Nodes(llm, stop_after=max(1, int(share * (speaking.count - before)))) as stopped, pytest.raises(Cancelled):
            answer(llm, history, 30)
        assert stopped.heard
    assert answer(llm, history, 30) == expected
    assert answer(llm, [*history, *expected, *third], 20) == answer(whole, [*history, *expected, *third], 20)
