"""Typing a message: the keys of a person, sent to the editor."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from indexmem_edge.cli import editor
from indexmem_edge.cli.interrupt import asked_to_leave
from support.terminals import ALT_ENTER, CTRL_C, CTRL_D, ENTER, UP, pasted


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """typing(keys, draft) -> what the editor makes of them."""
    monkeypatch.setattr(editor, "create_output", lambda _: DummyOutput())
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        desk = editor.Editor()

        def type(keys: str, draft: str = "") -> str:
            keyboard.send_text(keys)
            return desk.read(draft)

        type.app = desk._session.app  # type: ignore[attr-defined]
        yield type


@pytest.mark.parametrize(
    "keys, message",
    [
        ("Hello" + ENTER, "Hello"),
        (pasted("one\n\ntwo\n/three") + ENTER, "one\n\ntwo\n/three"),
        (pasted("one\r\ntwo") + " and more" + ENTER, "one\ntwo and more"),
        ("a" + ALT_ENTER + "b" + ENTER, "a\nb"),
        ("a\\" + ENTER + "b\\" + ENTER + ENTER, "a\nb\n"),
        ("a\\b" + ENTER, "a\\b"),
        (pasted("one\\\ntwo") + ENTER, "one\\\ntwo"),
    ],
)
def test_enter_sends_what_belongs_together(typing: Any, keys: str, message: str) -> None:
    assert typing(keys) == message


def test_earlier_messages_come_back(typing: Any) -> None:
    typing("first" + ENTER)
    typing(pasted("second\nof two lines") + ENTER)
    assert typing(UP + "!" + ENTER) == "second\nof two lines!"


def test_a_draft_is_edited(typing: Any) -> None:
    assert typing(" more" + ENTER, "one") == "one more"


def test_ctrl_c_and_ctrl_d(typing: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        typing("half" + CTRL_C)
    with pytest.raises(EOFError):
        typing(CTRL_D)
    with pytest.raises(EOFError):  # typed before there was a prompt, see test_terminal
        typing("\0")
    assert typing("whole" + ENTER) == "whole"


MOMENTS = {  # methods of prompt_toolkit, in their order
    "nothing is there yet": "run",
    "the prompt is about to be drawn": "_pre_run",
    "the prompt is closing": "_redraw",
    "the prompt is closed": "cancel_and_wait_for_background_tasks",
}


@pytest.fixture
def signal_at(typing: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """signal_at(number, when): a signal comes, three times, just before one of the moments."""

    def arrange(number: int, when: str) -> None:
        name = MOMENTS[when]
        step = getattr(typing.app, name)

        def come(*args: Any, **keywords: Any) -> Any:
            if name != "_redraw" or keywords.get("render_as_done"):
                for _ in range(3):
                    signal.raise_signal(number)
            return step(*args, **keywords)

        monkeypatch.setattr(typing.app, name, come)

    return arrange


@pytest.mark.parametrize("when", MOMENTS)
def test_ctrl_c_before_there_is_a_prompt_and_after_enter(
    typing: Any, signal_at: Any, monkeypatch: pytest.MonkeyPatch, when: str, capfd: Any
) -> None:
    signal_at(signal.SIGINT, when)
    if when in ("nothing is there yet", "the prompt is about to be drawn"):
        assert typing("sent" + ENTER) == "sent"
    else:
        with pytest.raises(KeyboardInterrupt):
            typing("sent" + ENTER)
    monkeypatch.undo()
    assert typing("whole" + ENTER) == "whole" and "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
@pytest.mark.parametrize("when", MOMENTS)
def test_whoever_is_asked_to_leave_reads_no_more(typing: Any, signal_at: Any, when: str, capfd: Any) -> None:
    signal_at(signal.SIGHUP, when)
    with asked_to_leave() as leaving, pytest.raises(EOFError):
        typing("sent" + ENTER)
    assert leaving.status == 128 + signal.SIGHUP and "Traceback" not in capfd.readouterr().err


def completions(text: str) -> list[str]:
    document = Document(text)
    found = editor.CommandCompleter().get_completions(document, CompleteEvent(completion_requested=True))
    return [text[: len(text) + c.start_position] + c.text for c in found]


def test_commands_and_paths_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book one.txt").write_text("")
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path)
    assert completions("/re") == ["/regen", "/reset", "/read "]
    assert completions("/REA") == ["/read "]
    assert sorted(completions("/read bo")) == ["/read book one.txt", "/read books"]
    assert sorted(completions(f"/save {tmp_path}/bo")) == [f"/save {tmp_path}/book one.txt", f"/save {tmp_path}/books"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sorted(completions("/load ~/bo")) == ["/load ~/book one.txt", "/load ~/books"]
    for text in ("", "bo", "read bo", "/stats bo", "/system bo", "hello\n/re"):
        assert completions(text) == []


def test_branches_are_completed() -> None:
    document = Document("/branch -d ot")
    completer = editor.CommandCompleter(lambda: ["main", "other", "otter"])
    found = completer.get_completions(document, CompleteEvent(completion_requested=True))
    assert [c.text for c in found] == ["other", "otter"]
