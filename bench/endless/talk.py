"""A conversation about a book that is read in pieces, from a fixed script: questions whose answers follow from the text.

Every turn, the user shows the next piece and asks for something that stands in it, in an earlier piece, or just after it. The
assistant's answers are given, and scored by their likelihood; they are what stays in the history, whatever a model would have
said. So all caches hold the same conversation, and a turn can be compared with the same turn.
"""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..report import Row
from ..runner import BenchError, Model, System, llama_cpp
from .arms import counts
from .reading import Books

COPY, NEXT, GO_ON, BACK = KINDS = ("copy", "next", "go on", "back")
SHORTEST, LONGEST = 6, 60  # words of a sentence that is asked for
QUESTION = 110  # tokens that question, answer and template take of a turn, about
NEAR = 8  # turns that a question about an earlier piece goes back at least
OPENING = (
    "We are going to read a book together. In every message I show you the next passage and ask you something about what "
    "we have read. Answer with the sentence from the book and nothing else.\n\n"
)


@dataclass(frozen=True)
class Turn:
    user: str
    answer: str
    kind: str
    back: int  # turns since the answer was read; 0: it stands in this piece, or it follows it


def script(books: Books, turns: int, turn_tokens: int, seed: int, sample: int) -> list[Turn]:
    """`turns` turns of about `turn_tokens` tokens each.

    Raises:
        BenchError: the text has too few sentences that can be asked for.
    """
    model, rng = books.model, random.Random(f"{seed}/{sample}")
    text = model.text(books.passage(sample, reads(turns, turn_tokens)))
    left = [sentence for sentence in sentences(text) if len(sentence.split()) <= LONGEST]  # longer ones are lists and tables
    left.reverse()
    pieces: list[list[str]] = []
    out: list[Turn] = []
    for number in range(turns):
        piece: list[str] = []
        while len(good(piece)) < 2 or len(model.tokens(" ".join(piece))) < turn_tokens - QUESTION:
            if not left:
                raise BenchError(
                    f"{', '.join(books.names)}: too few sentences of {SHORTEST} to {LONGEST} words for {turns} turns of {turn_tokens} "
                    "tokens: add another book with --text, or choose fewer --turns"
                )
            piece.append(left.pop())
        kind = KINDS[number % len(KINDS)]
        if kind == BACK and number < NEAR:
            kind = COPY
        out.append(_turn(kind, piece, pieces, left, rng))
        pieces.append(piece)
    return [replace(out[0], user=OPENING + out[0].user), *out[1:]]


def reads(turns: int, turn_tokens: int) -> int:
    """Tokens of the text that a script is made of; not all of it is shown."""
    return 2 * turns * turn_tokens


def sentences(text: str) -> list[str]:
    """Those of a text, on one line each."""
    return [" ".join(part.split()) for part in re.split(r"(?:(?<=[.!?])|(?<=[.!?]\"))\s+(?=[\"'A-Z])", text) if part.split()]


def good(piece: Sequence[str]) -> list[int]:
    """The sentences that can be asked for, by number."""
    return [i for i, sentence in enumerate(piece) if len(sentence.split()) >= SHORTEST]


def _turn(kind: str, piece: list[str], earlier: list[list[str]], left: list[str], rng: random.Random) -> Turn:
    shown = " ".join(piece)
    if kind == GO_ON and good(left[-1:]):
        return Turn(f"{shown}\n\nWhich sentence does the book go on with?", left.pop(), kind, 0)
    if kind == BACK:
        back = rng.randint(NEAR, len(earlier))
        old = earlier[-back]
        begin, rest = _halves(old[rng.choice(good(old))])
        asked = f'In an earlier passage a sentence began with "{begin}". How did that sentence go on?'
        return Turn(f"{shown}\n\n{asked}", rest, kind, back)
    places = good(piece)
    if kind == NEXT:
        place = rng.choice([i for i in places if i])
        return Turn(f'{shown}\n\nWhich sentence comes after this one: "{piece[place - 1]}"', piece[place], kind, 0)
    sentence = piece[rng.choice(places)]
    asked = f'Repeat the sentence that begins with "{_halves(sentence)[0]}".'
    return Turn(f"{shown}\n\n{asked}", sentence, COPY, 0)


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    cut = min(len(words) // 2, 6)
    return " ".join(words[:cut]), " ".join(words[cut:])


class Template:
    """What a model's chat template makes of a conversation, turn by turn.

    Raises:
        BenchError: it has none that llama.cpp knows.
    """

    def __init__(self, model: Model):
        self.template = model.raw.metadata().get("tokenizer.chat_template", "").encode()
        self.messages: list[tuple[bytes, bytes]] = []
        self.text = ""
        if not self.template or self._render([(b"user", b"Hello")], True) is None:
            raise BenchError(f"{model.path.name} has no chat template that llama.cpp knows: leave talk out of --parts")

    def say(self, role: str, content: str, reply: bool) -> str:
        """What a message adds; with `reply`, up to where the assistant's answer begins."""
        self.messages.append((role.encode(), content.encode()))
        text = self._render(self.messages, reply)
        if text is None or not text.startswith(self.text):
            raise BenchError("the chat template changes what it made of earlier messages: leave talk out of --parts")
        added, self.text = text[len(self.text) :], text
        return added

    def _render(self, messages: Sequence[tuple[bytes, bytes]], reply: bool) -> str | None:
        chat = (llama_cpp.llama_chat_message * len(messages))(*(llama_cpp.llama_chat_message(*m) for m in messages))
        size = 256 + sum(len(role) + 2 * len(content) + 256 for role, content in messages)
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_chat_apply_template(self.template, chat, len(messages), reply, buffer, size)
        return buffer.raw[:n].decode("utf-8", "replace") if 0 <= n <= size else None


def run_talk(system: System, turns: Sequence[Turn], advance: Callable[[int], None]) -> Row:
    """Has the conversation; of each turn, the likelihood of its answer."""
    model, template = system.model, Template(system.model)
    rows, before = [], model.tokens("", bos=True)
    for number, turn in enumerate(turns, 1):
        asked = template.say("user", turn.user, reply=True)
        system.feed(before + model.tokens(asked, special=True), last_logits=True)
        nll = system.nll(model.tokens(turn.answer))
        rows.append(
            {"turn": number, "kind": turn.kind, "back": turn.back, "nll": float(nll.mean()), "tokens_seen": system.seen}
        )
        before = model.tokens(template.say("assistant", turn.answer, reply=False).removeprefix(turn.answer), special=True)
        advance(number)
    return {"turns": rows, **counts(system)}


def tokens_of(model: Model, turns: Sequence[Turn]) -> int:
    """Of the whole conversation, about: for a progress bar."""
    return sum(len(model.tokens(turn.user)) + len(model.tokens(turn.answer)) + 12 for turn in turns)


