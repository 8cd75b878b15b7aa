"""Which lines of a chat are commands, and which are messages."""

from __future__ import annotations

import pytest

from indexmem_edge.cli.commands import COMMANDS, help_text, load_options, parse
from indexmem_edge.errors import IndexMemError


@pytest.mark.parametrize(
    "line, command, argument",
    [
        ("/stats", "/stats", ""),
        ("/Stats", "/stats", ""),
        ("/READ  book one.txt ", "/read", "book one.txt"),
        ("/read\tbook.txt", "/read", "book.txt"),
        ("/quit", "/exit", ""),
        ("/edit", "/edit", ""),
        ("/edit What is\nthe sea?", "/edit", "What is\nthe sea?"),
        ("/system", "/system", ""),
    ],
)
def test_commands(line: str, command: str, argument: str) -> None:
    assert parse(line) == (command, argument)


@pytest.mark.parametrize(
    "line",
    [
        "Hello",
        "",
        "What does /read do?",
        "/home/me/notes.txt says the sky is green. Why?",
        "/etc/hosts",
        "/",
        "/ what?",
        "/2 is a half",
        "/usr\n/bin\n/lib",
        "/r/books is a place",
        "/tmp: what is it?",
    ],
)
def test_messages(line: str) -> None:
    assert parse(line) == (None, line)


@pytest.mark.parametrize(
    "line, message", [("//stats", "/stats"), ("//", "/"), ("//tmp is full", "/tmp is full"), ("///", "//")]
)
def test_a_doubled_slash_begins_a_message(line: str, message: str) -> None:
    assert parse(line) == (None, message)


@pytest.mark.parametrize(
    "line, words",
    [
        ("/statz", ("/statz", "did you mean /stats", "//")),
        ("/Sav it", ("/Sav", "/save")),
        ("/nonsense", ("/nonsense", "/stats", "/exit", "//")),
        ("/quit now", ("/quit takes no argument", "'now'")),
        ("/stats all", ("/stats takes no argument", "'all'")),
        ("/read", ("/read needs a file", "/read FILE")),
        ("/read a\nb", ("/read is a command of one line", "//")),
    ],
)
def test_what_looks_like_a_command_and_is_none_is_refused(line: str, words: tuple[str, ...]) -> None:
    with pytest.raises(IndexMemError) as error:
        parse(line)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argument, file, options",
    [
        ("a talk", "a talk", set()),
        ("a talk --again", "a talk", {"--again"}),
        ("a talk  --as-background --again", "a talk", {"--again", "--as-background"}),
        ("--again", "--again", set()),
        ("a --again b", "a --again b", set()),
    ],
)
def test_options_of_load_stand_behind_the_file(argument: str, file: str, options: set[str]) -> None:
    assert load_options(argument) == (file, options)


def test_the_list_has_all_of_them() -> None:
    lines = help_text("Ctrl-D leaves").splitlines()
    for command in COMMANDS:
        assert any(line.startswith(command.usage) for line in lines)
    assert any(line.startswith("//") for line in lines)
