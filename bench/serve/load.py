"""More conversations than there are slots, for as long as one likes: does memory grow, is text read twice, are answers mixed up?"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report import Report, Row, Verdict
from ..stats import most_of
from ..text import builtin_text
from .client import Kind, Message, Running, running

COLUMNS = ("until_s", "turns", "turns_per_s", "new", "evaluated", "again", "mixed", "first_s", "first_p95_s", "rss_bytes")
TURN = 240  # characters of a question
ANSWER = 20  # tokens
PARTS = 10  # rows of the table
ALONE = 4  # conversations that are had once more
SAME = 0.5  # of their answers: what else is in a batch changes how sums are rounded, and when entries leave
SOUNDS = ("bdfgklmnprstvz", "aeiou")  # of names that nobody else has
GROWTH, AGAIN = 1.02, 64.0  # resident memory of the last quarter to that before it; tokens of a turn that were there before


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        at: seconds since the start, at its end.
        new: tokens of the prompt that the conversation has not had before.
        evaluated: tokens of the prompt that were evaluated.
        own: whether the answer has the name that its conversation gave.
        mixed: whether it has that of another.
        first: seconds until the first token.
    """

    at: float
    new: int
    evaluated: int
    own: bool
    mixed: bool
    first: float


class Names:
    """A name for each conversation, which nobody else has. Safe to use from several threads."""

    def __init__(self, seed: int = 0) -> None:
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._all: list[str] = []

    def draw(self) -> str:
        with self._lock:
            self._all.append("".join(self._random.choice(SOUNDS[i % 2]) for i in range(6)).capitalize())
            return self._all[-1]

    def others(self, own: str, text: str) -> list[str]:
        """Names of other conversations in a text."""
        with self._lock:
            return [name for name in self._all if name != own and name in text]


class Conversation:
    """A client that gives a name at first and asks for it at every turn."""

    def __init__(self, names: Names, seed: int, slot: int | None = None) -> None:
        self.names, self.slot = names, slot
        self.name = names.draw()
        self._text, self._at = builtin_text(100_000, seed), 0
        self.known = 0  # tokens that it has had
        self.messages: list[Message] = [{"role": "system", "content": f"Your name is {self.name}."}]

    def turn(self, server: Running, started: float) -> Turn:
        """Asks once.

        Raises:
            ServerError: the server refuses, or is gone.
        """
        part = self._text[self._at : self._at + TURN]
        self._at += TURN
        self.messages.append({"role": "user", "content": f"{part}\n\nWhat is your name?"})
        answer = server.chat(self.messages, ANSWER, slot=self.slot, temperature=0)
        self.messages.append({"role": "assistant", "content": answer.text})
        total = answer.evaluated + answer.cached
        new, self.known = total - self.known, total + answer.generated
        mixed = bool(self.names.others(self.name, answer.text))
        return Turn(time.monotonic() - started, new, answer.evaluated, self.name in answer.text, mixed, answer.first)

    def same_alone(self, server: Running) -> list[bool]:
        """Of each answer, whether the server gives the same again where nobody else asks."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        told = [server.chat(self.messages[: i + 1], ANSWER, temperature=0).text for i in asked]
        return [text == self.messages[i + 1]["content"] for i, text in zip(asked, told)]


def run_load(
    kind: Kind, model: Path, threads: int, conversations: int, turns: int, seconds: float, meta: Row, tell: Callable[[str], Any] = lambda _: None
) -> Report:
    """`conversations` clients at once, each with one conversation of `turns` turns after the other, for so many seconds."""
    how = {"conversations": conversations, "turns": turns, "seconds": seconds, "answer_tokens": ANSWER}
    report = Report("serve-load", {**meta, **how})
    names, done, memory, finished = Names(), list[Turn](), list[tuple[float, int]](), list[Conversation]()
    with running(kind, model, threads) as server:
        started = time.monotonic()

        def client(name: int) -> None:
            number = 0
            while time.monotonic() - started < seconds:
                talk = Conversation(names, seed=name + conversations * number)
                number += 1
                for _ in range(turns):
                    done.append(talk.turn(server, started))
                    if time.monotonic() - started >= seconds:
                        break
                finished.append(talk)

        with ThreadPoolExecutor(conversations) as pool:
            clients = [pool.submit(client, name) for name in range(conversations)]
            while not all(c.done() for c in clients):
                memory.append((time.monotonic() - started, server.rss_bytes))
                tell(f"{memory[-1][0]:.0f} s, {len(done)} turns, {memory[-1][1] / 2**20:.0f} MiB")
                time.sleep(min(1.0, seconds / 20))
            for c in clients:
                c.result()
        memory.append((time.monotonic() - started, server.rss_bytes))
    tell("some of the conversations once more, alone")
    with running(kind, model, threads) as server:
        same = [equal for talk in finished[:ALONE] for equal in talk.same_alone(server)]
    report.rows += _rows(done, memory, max(t.at for t in done))
    report.verdicts += _verdicts(done, memory)
    report.verdicts.append(Verdict("answers that the same conversation gets when it is alone", statistics.mean(same), SAME))
    return report


def _rows(done: Sequence[Turn], memory: Sequence[tuple[float, int]], seconds: float) -> list[Row]:
    """The run in parts of the same length."""
    rows = []
    for part in range(PARTS):
        begin, end = seconds * part / PARTS, seconds * (part + 1) / PARTS
        turns = [t for t in done if begin < t.at <= end]
        if not turns:
            continue
        firsts = [t.first for t in turns]
        rows.append(
            {
                "until_s": end,
                "turns": len(turns),
                "turns_per_s": len(turns) / (end - begin),
                "new": statistics.mean(t.new for t in turns),
                "evaluated": statistics.mean(t.evaluated for t in turns),
                "again": sum(t.evaluated - t.new > AGAIN for t in turns),
                "mixed": sum(t.mixed for t in turns),
                "first_s": statistics.median(firsts),
                "first_p95_s": most_of(firsts),
                "rss_bytes": max((size for at, size in memory if begin < at <= end), default=None),
            }
        )
    return rows


def _verdicts(done: Sequence[Turn], memory: Sequence[tuple[float, int]]) -> list[Verdict]:
    end = memory[-1][0]
    before = max(size for at, size in memory if at <= 0.75 * end)
    after = max(size for at, size in memory if at > 0.75 * end)
    return [
        Verdict("answers with the name of another conversation", sum(t.mixed for t in done), 0, at_most=True),
        Verdict(f"turns that read more than {AGAIN:.0f} tokens again", sum(t.evaluated - t.new > AGAIN for t in done), 0, at_most=True),
        Verdict("resident memory of the last quarter to that before it", after / before if before else None, GROWTH, at_most=True),
        Verdict("answers with the name of their own conversation, by a small model", statistics.mean(t.own for t in done)),
    ]
