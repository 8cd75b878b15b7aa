"""The messages of a chat, and the ways back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from indexmem_edge.cli.conversation import Conversation, messages_of_json
from indexmem_edge.errors import IndexMemError


def talked() -> Conversation:
    """A question, a document, a question about it."""
    talk = Conversation("Be brief.").asked("Hello").answered("Hi")
    return talk.read("Document a:\n\nA").read("Document b:\n\nB").asked("What is A?").answered("The first.")


def test_a_document_is_the_beginning_of_the_next_question() -> None:
    messages = talked().messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "Document a:\n\nA\n\nDocument b:\n\nB\n\nWhat is A?"
    assert talked().document == ""
    pending = Conversation().read("D")
    assert pending.messages == [] and pending.open_messages == [{"role": "user", "content": "D"}]


def test_each_thing_is_taken_back_alone_and_the_last_first() -> None:
    talk, documents = talked(), []
    while talk.marks:
        talk = talk.undone()
        documents.append((len(talk.turns), talk.document))
    assert documents == [(2, "Document a:\n\nA\n\nDocument b:\n\nB"), (2, "Document a:\n\nA"), (2, ""), (0, "")]
    assert talk.system == "Be brief."
    with pytest.raises(IndexMemError, match="no question yet"):
        talk.undone()


def test_another_answer_and_another_question_keep_what_was_before() -> None:
    talk = talked()
    assert talk.unanswered().answered("Another.").turns[:-1] == talk.turns[:-1]
    edited = talk.edited("What is B?")
    assert talk.question == "What is A?" and edited.question == "What is B?"
    assert edited.turns[-1]["content"].endswith("Document b:\n\nB\n\nWhat is B?") and len(edited.turns) == 3
    assert edited.answered("x").undone() == talk.undone()
    for way in (Conversation().unanswered, Conversation("s").read("d").unanswered, lambda: Conversation().edited("x")):
        with pytest.raises(IndexMemError, match="ask something first"):
            way()


@pytest.mark.parametrize("marks", [True, False], ids=["of this version", "of another"])
def test_a_session_holds_it(marks: bool) -> None:
    talk = talked().read("Document c:\n\nC")
    kept = json.loads(json.dumps(talk.to_dict()))
    if marks:
        assert Conversation.from_dict(kept) == talk
        return
    del kept["marks"]
    loaded = Conversation.from_dict(kept)
    assert loaded is not None and loaded.messages == talk.messages and loaded.document == talk.document
    assert loaded.undone().document == "" and len(loaded.undone().undone().turns) == 2


@pytest.mark.parametrize(
    "kept",
    [
        None,
        [],
        {},
        {"messages": 3},
        {"messages": [3]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": 1, "content": ""}]},
    ],
)
def test_something_else_is_no_conversation(kept: Any) -> None:
    assert Conversation.from_dict(kept) is None


@pytest.mark.parametrize("marks", [3, [3], [["a", "b"]], [[99, ""]], [[-1, ""]]])
def test_marks_that_cannot_be_are_left_out(marks: Any) -> None:
    kept = {"messages": [{"role": "user", "content": "x"}], "document": "", "marks": marks}
    assert Conversation.from_dict(kept) == Conversation(turns=({"role": "user", "content": "x"},))


def test_messages_of_a_program() -> None:
    one = messages_of_json('{"role": "user", "content": "a\\nb"}')
    assert one == [{"role": "user", "content": "a\nb"}] and Conversation().added(one).is_open
    system, *rest = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    talk = Conversation("before").added(messages_of_json(json.dumps([system, *rest])))
    assert talk.system == "s" and list(talk.turns) == rest and not talk.is_open
    assert list(talk.added([system]).turns) == [*rest, system]  # later it stays where it is
    assert Conversation().read("D").added(rest).turns[0]["content"] == "D\n\nu"


@pytest.mark.parametrize(
    "line, word",
    [
        ("{", "none"),
        ("[]", "empty"),
        ("[3]", "3 is no message"),
        ('{"role": "user"}', "content"),
        ('{"role": "king", "content": "x"}', "assistant"),
        ('{"role": "user", "content": 3}', "no message"),
    ],
)
def test_json_that_is_no_message(line: str, word: str) -> None:
    with pytest.raises(IndexMemError, match=word) as error:
        messages_of_json(line)
    assert "\n" not in str(error.value)


def test_a_system_prompt_alone_is_nothing_to_take_back() -> None:
    begun = Conversation().added([{"role": "system", "content": "Be brief."}])
    assert begun.system == "Be brief." and begun.messages == [{"role": "system", "content": "Be brief."}]
    with pytest.raises(IndexMemError, match="no question yet"):
        begun.undone()
    asked = begun.added([{"role": "user", "content": "Why?"}])
    assert asked.undone() == begun
    with pytest.raises(IndexMemError, match="system prompt"):
        Conversation().added([{"role": "system", "content": "a \ud800"}])
