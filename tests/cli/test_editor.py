"""Typing a message: the keys of a person, sent to the editor."""

from __future__ import annotations

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
    assert typing("whole" + ENTER) == "whole"


@pytest.mark.parametrize("when", ["the prompt is closing", "the prompt is closed"])
def test_ctrl_c_in_the_moment_after_enter(typing: Any, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    app = typing.app
    name = "_redraw" if when == "the prompt is closing" else "cancel_and_wait_for_background_tasks"
    step = getattr(app, name)

    def signal() -> None:
        app.loop.call_soon_threadsafe(app.key_processor.send_sigint)  # what the handler of the signal does

    def redraw(render_as_done: bool = False) -> None:
        step(render_as_done)
        if render_as_done:
            signal()

    async def end() -> None:
        await step()
        signal()

    with monkeypatch.context() as patch:
        patch.setattr(app, name, redraw if when == "the prompt is closing" else end)
        with pytest.raises(KeyboardInterrupt):
            typing("sent" + ENTER)
    assert typing("whole" + ENTER) == "whole"


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
