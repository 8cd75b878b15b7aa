"""Branches of a chat: points with names, and what it costs to come back to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from indexmem_edge import Llama
from indexmem_edge.cli.branches import Branches, Copies
from indexmem_edge.cli.chat import Chat
from indexmem_edge.cli.conversation import Conversation
from indexmem_edge.cli.options import RunOptions
from indexmem_edge.cli.sampling import AnswerOptions
from indexmem_edge.errors import IndexMemError
from indexmem_edge.native import find
from support.cancelling import Load, held, load, logits

__all__ = ["load"]  # a fixture

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

LONG = "The tide comes in. " * 20  # more tokens than the budget
Start = Callable[..., Chat]


@pytest.fixture
def talk(demo_model: Path) -> Iterator[Any]:
    """talk(**options) -> Chat with a model whose answers are text, and a cache that keeps no copies by itself"""
    made = []

    def make(**options: Any) -> Chat:
        small = dict(kv_budget=96, kv_window=32, n_ubatch=32, n_batch=64, n_threads=1, n_threads_batch=1, kv_checkpoints=0, verbose=False)
        made.append(Llama(demo_model, **{**small, **options}))
        return Chat(made[-1], RunOptions(predict=8, temp=0.0), AnswerOptions())

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def start(load: Load) -> Start:
    """start(kind, **options) -> Chat with a tiny model, whose answers are noise"""

    def make(kind: str = "keydiff", **options: Any) -> Chat:
        return Chat(load(kind), RunOptions(predict=8, temp=0.0, **options), AnswerOptions())

    return make


def say(chat: Chat, *lines: str) -> list[str]:
    """The contents of all messages after that."""
    for line in lines:
        assert chat._handle(line) and not chat._failed
    return [m["content"] for m in chat._conversation.messages]


def evaluated(chat: Chat) -> int:
    return chat._llm.kv_stats().turn_evaluated


@pytest.mark.parametrize("options", [{"kv_policy": "snapkv"}, {"kv_span": 160}, {"kv_budget_ratio": 0.5}], ids=str)
def test_coming_back_costs_what_is_new(talk: Any, options: dict[str, Any]) -> None:
    chat, alone = talk(**options), talk(**options)
    at_the_fork = say(chat, LONG, "/branch other")
    assert chat._llm.kv_stats().evicted > 0
    on_main = say(chat, LONG)
    costs = []
    for branch, before in (("other", at_the_fork), ("main", on_main), ("other", None), ("main", None)):
        assert say(chat, f"/branch {branch}") == before or before is None
        say(chat, "Why?")
        costs.append(evaluated(chat))
    say(alone, LONG, "Why?")
    costs.append(evaluated(alone))
    assert max(costs) - min(costs) <= 1 and max(costs) < 20  # the question, and the end of the answer before it
    assert chat._llm.kv_stats().reevaluated == 0


def test_the_state_is_the_same_as_if_the_others_had_never_been(talk: Any) -> None:
    chat, alone = talk(), talk()
    after = say(chat, LONG, "/branch other", "The tide goes out.", "/branch other", "Why?")
    assert after == say(alone, LONG, "Why?")
    assert np.array_equal(logits(chat._llm), logits(alone._llm)) and held(chat._llm, True) == held(alone._llm, True)


def test_a_branch_goes_on_and_the_one_that_is_left_stays(start: Start) -> None:
    chat = start()
    first = say(chat, "One.", "/branch b")
    main = say(chat, "Two.")
    assert main[:2] == first and len(main) == 4
    assert say(chat, "/branch b") == first
    b = say(chat, "Three.")
    assert say(chat, "/branch main") == main and say(chat, "/branch b") == b
    assert say(chat, "/undo") == first and say(chat, "/branch main") == main


def test_without_a_budget_and_before_the_first_message(start: Start) -> None:
    chat = start("unbounded")
    say(chat, "/branch empty", "One.", "/branch b", "Two.")
    assert len(say(chat, "/branch b")) == 2 and say(chat, "/branch empty") == []
    assert len(say(chat, "Hello")) == 2
    chat = start()
    say(chat, "/branch empty", "One.")
    assert say(chat, "/branch empty") == [] and len(say(chat, "Hello")) == 2


def test_what_is_told(start: Start, capsys: Any) -> None:
    chat = start()
    say(chat, "What is the sea?", "/branch b", "And the land?")
    assert "/branch b comes back to it; the chat goes on, on main" in capsys.readouterr().err
    say(chat, "/branch")
    assert capsys.readouterr().out == '  b     2 messages, "What is the sea?"\n* main  4 messages, "And the land?"\n'
    say(chat, "/branch main")
    assert "on main already" in capsys.readouterr().err
    say(chat, "/branch b", "/branch -d main", "/branch")
    told = capsys.readouterr()
    assert "on b now, main stays as it is: 2 messages" in told.err and told.out == '* b  2 messages, "What is the sea?"\n'
    assert chat._handle("/branch -d b") and chat._failed and "the chat is on b" in capsys.readouterr().err


def test_one_is_forgotten(start: Start, capsys: Any) -> None:
    chat = start()
    say(chat, "One.", "/branch  a b ", "/branch c", "/branch -d  a b")
    assert list(chat._branches) == ["c", "main"] and "a b" not in chat._copies and "c" in chat._copies
    for name in ("", "a b", "d"):
        chat._handle(f"/branch -d {name}")
        assert f"there is no branch {name!r}: choose from c, main" in capsys.readouterr().err


def test_a_program_gets_them_as_json(start: Start, capsys: Any) -> None:
    chat = start(as_json=True)
    say(chat, "One.", "/branch b")
    capsys.readouterr()
    say(chat, "/branch")
    listed = [{"name": "b", "current": False, "messages": 2}, {"name": "main", "current": True, "messages": 2}]
    assert json.loads(capsys.readouterr().out) == {"branches": listed}


def test_reset_and_load_forget_them(start: Start, tmp_path: Any, capsys: Any) -> None:
    chat = start()
    say(chat, f"/save {tmp_path}/none", "One.", "/branch b", f"/save {tmp_path}/two", "/reset")
    assert "forgotten, with its other branch" in capsys.readouterr().err and list(chat._branches) == ["main"]
    say(chat, f"/load {tmp_path}/two")
    assert list(chat._branches) == ["b", "main"] and len(say(chat, "Two.", "/branch b")) == 2
    say(chat, f"/load {tmp_path}/none")
    assert list(chat._branches) == ["main"] and chat._copies.nbytes == 0


def test_copies_have_a_limit(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = start()
    say(chat, LONG)
    one = chat._llm.checkpoint().nbytes
    monkeypatch.setattr("indexmem_edge.runtime.checkpoints._LEAST", 0)
    names = ["a", "b", "c", "d"]
    say(chat, *(f"/branch {name}" for name in names))
    assert [name in chat._copies for name in names] == [False, True, True, True] and chat._copies.nbytes == 3 * one
    assert len(say(chat, "/branch a")) == 2 and len(say(chat, "Why?")) == 4  # its text is there, and is read again


@pytest.mark.parametrize("name", ["x" * 65, "a\tb", "-x", "\x1b[2J"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(IndexMemError, match="cannot be called"):
        Branches().begun(name, Conversation())


def test_a_session_holds_them() -> None:
    talk = Conversation("s").asked("Hello").answered("Hi")
    branches = Branches().begun("b", talk).gone_to("b", talk.asked("x").answered("y"))
    assert branches.current == "b" and list(branches) == ["b", "main"] and "main" in branches
    assert Branches.from_dict(json.loads(json.dumps(branches.to_dict()))) == branches
    assert Branches().to_dict() == {} and Branches.from_dict({}) == Branches()


@pytest.mark.parametrize("kept", [{"branch": 3, "branches": {}}, {"branch": "a", "branches": [3]}, {"branch": "a"}])
def test_something_else_is_no_branches(kept: Any) -> None:
    assert Branches.from_dict(kept) == Branches()


def test_of_damaged_branches_the_others_are_kept() -> None:
    good = Conversation().asked("x")
    kept = {"branch": "a", "branches": {"b": good.to_dict(), "c": 3, "a": good.to_dict()}}
    assert Branches.from_dict(kept) == Branches("a", {"b": good})


def test_the_copy_that_is_gone_to_does_not_have_to_leave_first() -> None:
    """Three fill the limit, and the one that was left longest ago is wanted."""
    restored = []
    llm = SimpleNamespace(checkpoint=lambda: SimpleNamespace(nbytes=100 << 20), restore=restored.append)
    copies = Copies(llm)  # type: ignore[arg-type]
    for name in "abc":
        copies.take(name)
    a = copies._kept["a"]
    copies.go_to("a", "main")
    assert restored == [a] and list(copies._kept) == ["b", "c", "main"]
