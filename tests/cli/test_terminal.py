"""A person at a terminal: what is typed, pasted and seen. Everything is waited for on the screen, never for a time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pty", reason="needs pseudo terminals")

from indexmem_edge.native import find
from support.terminals import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    ENTER,
    TAB,
    UP,
    Person,
    pasted,
    person_at,
)

pytestmark = [
    pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built"),
    pytest.mark.usefixtures("demo_model"),
]

CHAT = ("chat", "--kv-budget", "256", "--kv-window", "64", "-t", "1", "-n", "6", "--temp", "0")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text("The lighthouse keeper counted the ships that came in with the tide. " * 500)
    return tmp_path


def test_a_talk(home: Path) -> None:
    with person_at(*CHAT, home=home) as person:
        person.wait_for("Ctrl-D leaves")
        person.prompted(1)
        person.type(pasted("one\n/two\n\nthree") + ENTER)
        assert person.prompted(2).count("tokens seen") == 1  # one message, one answer
        person.type("four\\" + ENTER + "five" + ALT_ENTER + "six" + ENTER)
        assert person.prompted(3).count("tokens seen") == 2
        person.type("half a mess")
        person.wait_for("half a mess")
        person.type(CTRL_C)
        person.prompted(3)
        person.type(CTRL_C)
        person.wait_for("(Ctrl-D leaves, so does /exit)")
        person.type("/rea" + TAB)
        person.wait_for("> /read")
        person.type("bo" + TAB)
        person.wait_for("> /read book.txt")
        person.type(CTRL_C + "/statz" + ENTER)
        person.wait_for("did you mean /stats")
        person.type("/quit now" + ENTER)
        person.wait_for("/quit takes no argument")
        person.type("/edit" + ENTER)
        person.wait_for(lambda screen: " ".join(screen.split()).count("> four five six") == 2)
        person.type(" eight" + CTRL_C)
        person.wait_for("nothing was changed")
        person.type("/edit" + ENTER)
        person.wait_for(lambda screen: " ".join(screen.split()).count("> four five six") == 3)
        person.type(" seven" + ENTER)
        person.wait_for(lambda screen: screen.count("tokens seen") == 3)
        person.type(CTRL_D)
        assert person.ends() == 0
    history = home / "state" / "indexmem-edge" / "history"
    assert history.stat().st_mode & 0o777 == 0o600

    with person_at(*CHAT, "-q", home=home) as person:  # another day
        person.prompted(1)
        assert "Ctrl-D leaves" not in person.screen
        person.type(UP)
        person.wait_for("seven")
        person.type(ENTER)
        assert "tokens seen" not in person.prompted(2)
        person.type("/exit" + ENTER)
        assert person.ends() == 0


@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_talk_that_leaves_no_trace(home: Path, way: str) -> None:
    arguments, variables = (("--no-history",), {}) if way == "option" else ((), {"INDEXMEM_HISTORY": "0"})
    with person_at(*CHAT, *arguments, home=home, **variables) as person:
        person.prompted(1)
        person.type("/help" + ENTER)
        person.wait_for("//text")
        person.type("/exit" + ENTER)
        assert person.ends() == 0
    assert not (home / "state").exists()


@pytest.mark.parametrize("columns", [34, 100])
def test_reading_is_shown_on_one_line_and_can_be_taken_back(home: Path, columns: int) -> None:
    with person_at(*CHAT, home=home, columns=columns) as person:
        person.prompted(1)
        person.type("/read book.txt" + ENTER)
        person.wait_for("%" if columns == 34 else "/6")  # of the tokens
        assert sum(line.startswith("reading book") for line in person.lines) == 1
        person.type(CTRL_C)
        person.wait_for("stopped: book.txt was not added to the conversation")
        assert not any(line.startswith("reading book") for line in person.lines)
        person.prompted(2)
        person.type("Hello" + ENTER)
        person.wait_for(lambda screen: "tokens seen" in " ".join(screen.split()))
        seen = next(line for line in person.lines if "tokens seen" in line)
        assert int(seen.split()[0].replace(",", "")) < 100  # nothing of the book
        assert max(map(len, person.lines)) <= columns


def test_a_long_text_to_continue(home: Path) -> None:
    arguments = ("generate", "-f", "book.txt", "--kv-budget", "256", "-t", "1", "-n", "6")
    with person_at(*arguments, home=home) as person:
        person.wait_for("/6")
        person.type(CTRL_C)
        person.wait_for("stopped: nothing was generated")
        assert person.ends() == 130 and not any(line.startswith("reading") for line in person.lines)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": "dumb", "NO_COLOR": "1"}], ids=["dumb", "dumb, no colour"])
def test_a_terminal_that_shows_text_and_nothing_else(home: Path, variables: dict[str, str]) -> None:
    with person_at(*CHAT, home=home, **variables) as person:
        person.wait_for("Ctrl-D leaves")
        person.type("Hello\n")
        person.wait_for("tokens seen")
        person.type(CTRL_D)
        assert person.ends() == 0 and b"\x1b" not in person.raw


def test_no_colour(home: Path) -> None:
    with person_at(*CHAT, home=home, NO_COLOR="1") as person:
        person.prompted(1)
        person.type("Hello" + ENTER)
        person.wait_for("tokens seen")
        assert not coloured(person)
    with person_at(*CHAT, home=home) as person:
        person.prompted(1)
        assert coloured(person)


def coloured(person: Person) -> bool:
    """Whether anything but the plain style is chosen."""
    return any(part.partition(b"m")[0].strip(b"0;").isdigit() for part in person.raw.split(b"\x1b[") if b"m" in part[:8])


def test_ctrl_d_while_there_is_no_prompt(home: Path) -> None:
    """It ends the chat when the answer is there, as if it had been typed at the next prompt."""
    with person_at(*CHAT, home=home) as person:
        person.prompted(1)
        person.type("Hello" + ENTER)
        person.wait_for(lambda screen: "> Hello" in screen and not screen.splitlines()[-1].startswith(">"))
        person.type(CTRL_D)
        assert person.ends() == 0


def test_answers_in_a_file_while_a_person_types(home: Path) -> None:
    with person_at(*CHAT, home=home, stdout=home / "answers.txt") as person:
        person.prompted(1)
        person.type("Hello" + ENTER)
        person.prompted(2)
        person.type(CTRL_D)
        assert person.ends() == 0
    answers = (home / "answers.txt").read_bytes()
    assert len(answers.splitlines()) == 1 and b"\x1b" not in answers
