"""Colours and bars: for a person's terminal, as it is."""

from __future__ import annotations

import io

import pytest

from indexmem_edge.cli import console
from indexmem_edge.cli.console import Bar
from indexmem_edge.cli.terminal import Terminal, without_controls


class Screen(io.StringIO):
    """A terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Where a person sits, once `sit` was called."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Screen()


def remark(screen: Screen, monkeypatch: pytest.MonkeyPatch, text: str = "something") -> str:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", screen)
    Terminal(as_json=False).note(text)
    return screen.getvalue()


def test_a_remark_is_dim(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remark(screen, monkeypatch) == "\x1b[2m[something]\x1b[0m\n"


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_where_no_colours_are_wanted_there_are_none(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert remark(screen, monkeypatch) == "[something]\n"


def test_a_remark_is_text_and_no_markup(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remark(screen, monkeypatch, "[bold] :smile: [/] 1024 'x'") == "\x1b[2m[[bold] :smile: [/] 1024 'x']\x1b[0m\n"


def test_an_answer_cannot_move_the_cursor() -> None:
    assert without_controls("a\x1b[2Jb\r\x9b1mc\x07\n\td é 模型 👩‍💻") == "a[2Jb1mc\n\td é 模型 👩‍💻"


def drawn(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(console, "_SILENT_FOR", 0.0)
    with Bar("reading a book with a long name.txt", wanted=True) as bar:
        bar.update(50, 100)
        if bar._timer.is_alive():
            bar._timer.join()  # it has been shown
    return screen.getvalue()


@pytest.mark.parametrize("columns", [34, 40, 59, 60, 80, 200])
def test_a_bar_stays_on_its_line(screen: Screen, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    import pyte

    monkeypatch.setenv("COLUMNS", str(columns))
    text = drawn(screen, monkeypatch)
    assert "\x1b[" in text
    terminal = pyte.Screen(columns, 10)
    stream = pyte.Stream(terminal)
    for part in text.replace("\n", "\r\n").split("\r\x1b[2K"):  # each time that it is drawn
        stream.feed("\r\x1b[2K" + part)
        assert all(not line.strip() for line in terminal.display[1:])
    assert not any(line.strip() for line in terminal.display)  # and wiped out
    assert "reading" in text and ("50%" in text if columns < 60 else "50/100" in text)


@pytest.mark.parametrize("name, value", [("TERM", "dumb"), ("TERM", "unknown")])
def test_there_is_no_bar_where_it_cannot_be_wiped_out(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert drawn(screen, monkeypatch) == ""


def test_there_is_no_bar_in_a_pipe(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    assert drawn(pipe, monkeypatch) == ""
    with console.progress(True) as bars:
        bars.add_task("x", total=1)
    assert pipe.getvalue() == ""


def test_what_is_quick_has_no_bar(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(console, "_SILENT_FOR", 3600.0)
    with Bar("reading", wanted=True) as bar:
        bar.update(1, 2)
    assert screen.getvalue() == ""
