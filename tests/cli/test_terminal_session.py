"""A person at a terminal whose conversation is kept, and what they do to it: branches, signals, another size."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

pytest.importorskip("pty", reason="needs pseudo terminals")

from conftest import Tiny
from indexmem_edge.native import find
from indexmem_edge.sessions import file as sessionfile
from support.terminals import CTRL_C, CTRL_D, ENTER, TAB, person_at

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")


@pytest.fixture
def chat(tiny: Tiny) -> tuple[str, ...]:
    model = str(tiny("llama")[0])
    return ("chat", "-m", model, "--kv-budget", "160", "-ub", "32", "-t", "1", "-n", "6", "--temp", "0", "--session", "talk")


def kept(home: Path) -> list[str]:
    return [m["content"] for m in sessionfile.read(home / "talk").extra["messages"]]


def test_a_talk_that_goes_on_another_day(chat: tuple[str, ...], tmp_path: Path) -> None:
    with person_at(*chat, home=tmp_path) as person:
        person.prompted(1)
        person.type("one" + ENTER)
        person.prompted(2)
        person.type("/branch here" + ENTER)
        person.wait_for("/branch here comes back to it")
        person.type("two" + ENTER)
        person.prompted(4)
        person.type("/branch he" + TAB)
        person.wait_for("> /branch here")
        person.type(ENTER)
        person.wait_for("on here now, main stays as it is")
        person.prompted(5)
        assert "talk" not in person.screen.replace("/talk", "")
        person.type(CTRL_D)
        assert person.ends() == 0
    assert kept(tmp_path)[0] == "one" and len(kept(tmp_path)) == 2
    with person_at(*chat, home=tmp_path) as person:
        person.prompted(1)
        assert sum("talk goes on after" in line for line in person.lines) == 1
        person.type("/branch" + ENTER)
        person.wait_for('* here 2 messages, "one"')
        person.wait_for('main 4 messages, "two"')
        person.type("/exit" + ENTER)
        assert person.ends() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "talk"]


def test_a_file_cannot_make_the_terminal_do_things(chat: tuple[str, ...], tmp_path: Path) -> None:
    with person_at(*chat, home=tmp_path) as person:
        person.prompted(1)
        person.type("one" + ENTER)
        person.prompted(2)
        person.type("/exit" + ENTER)
        assert person.ends() == 0
    data, title = sessionfile.read(tmp_path / "talk"), "\x1b]0;seen\x07"
    evil = {"messages": [{"role": role, "content": title + role} for role in ("system", "user", "assistant")]}
    extra = {**evil, "branch": "main", "branches": {title: evil, "b": evil}}
    sessionfile.write(tmp_path / "talk", sessionfile.SessionData(data.header, data.tokens, extra, data.state, data.logits))
    with person_at(*chat, home=tmp_path) as person:
        person.prompted(1)
        for command in ("/branch", "/system", "/branch b"):
            person.type(command + ENTER)
        person.wait_for("on b now")
        person.wait_for("seenassistant")
        assert b"\x1b]0;" not in person.raw and b"seensystem" in person.raw and b"seenuser" in person.raw


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("typed", ["", "half a mess"])
def test_asked_to_end_at_the_prompt(chat: tuple[str, ...], tmp_path: Path, number: int, typed: str) -> None:
    with person_at(*chat, home=tmp_path) as person:
        person.prompted(1)
        person.type("one" + ENTER)
        person.prompted(2)
        if typed:
            person.type(typed)
            person.wait_for(typed)
        assert not person.sees_what_is_typed
        person.signal(number)
        assert person.ends() == 128 + number and person.sees_what_is_typed and "Traceback" not in person.screen
    assert kept(tmp_path)[0] == "one" and len(kept(tmp_path)) == 2


def test_another_chat_has_it(chat: tuple[str, ...], tmp_path: Path) -> None:
    with person_at(*chat, home=tmp_path) as person, person_at(*chat, home=tmp_path) as other:
        both = (person, other)
        assert sum(p.wait_for(lambda screen: "Ctrl-D leaves" in screen or "error" in screen).count("another chat (process") for p in both) == 1


def test_stopped_and_continued_in_a_terminal_of_another_size(chat: tuple[str, ...], tmp_path: Path) -> None:
    with person_at(*chat, home=tmp_path) as person:
        person.prompted(1)
        person.type("half a mess")
        person.wait_for("half a mess")
        person.signal(signal.SIGSTOP)
        person.resize(60, 20)
        person.signal(signal.SIGCONT)
        person.type("age" + ENTER)
        person.wait_for("half a message")
        person.prompted(2)
        person.type(CTRL_C)
        person.wait_for("(Ctrl-D leaves, so does /exit)")
        person.prompted(3)
        person.type(CTRL_D)
        assert person.ends() == 0
    assert kept(tmp_path)[0] == "half a message"
