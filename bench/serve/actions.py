"""What everyday actions cost: tokens that are evaluated and seconds to the first one, ours beside a stock server."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..report import Report, Row
from ..text import builtin_text
from .client import Answer, Kind, Message, Running, running

COLUMNS = ("action", "system", "evaluated", "cached", "first_s")
DOCUMENT = 11_000  # characters: about 2400 tokens
ANSWER = 32  # tokens
SYSTEM: Message = {"role": "system", "content": "You answer in one sentence."}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def act(server: Running, seed: int) -> list[tuple[str, Answer]]:
    """The actions of somebody with a document, in their order: what is done, and what came back."""
    document, other = (builtin_text(DOCUMENT, seed * 2 + i) for i in range(2))
    done: list[tuple[str, Answer]] = []

    def ask(what: str, messages: Sequence[Message]) -> str:
        answer = server.chat(messages, ANSWER, seed=len(done))
        done.append((what, answer))
        return answer.text

    first = [SYSTEM, _user(f"{document}\n\nWho mended something?")]
    ask("the document and a question", first)
    told = ask("another answer", first)
    second = [*first, _assistant(told), _user("Where was it?")]
    ask("the next question", second)
    told = ask("that question edited", [*second[:-1], _user("When was it?")])
    history = [*second[:-1], _user("When was it?"), _assistant(told[len(told) // 2 :]), _user("And who else?")]
    ask("a turn after the template dropped what was thought", history)
    ask("another question about the same document", [SYSTEM, _user(f"{document}\n\nWhat was sold?")])
    ask("another conversation", [SYSTEM, _user(f"{other[: DOCUMENT // 2]}\n\nWho is it about?")])
    ask("back in the first one", [*history, _assistant("The clerk."), _user("Why?")])
    return done


def run_actions(
    kinds: Sequence[Kind], model: Path, threads: int, samples: int, meta: Row, tell: Callable[[str], Any] = lambda _: None
) -> Report:
    """Every server with the same documents: medians of `samples` of them. Servers take turns, each started anew."""
    report = Report("serve-actions", {**meta, "answer_tokens": ANSWER, "document_chars": DOCUMENT, "samples": samples})
    found: dict[tuple[str, str], list[Answer]] = {}
    for seed in range(samples):
        for kind in kinds:
            tell(f"{kind.name}, document {seed + 1} of {samples}")
            with running(kind, model, threads) as server:
                for action, answer in act(server, seed):
                    found.setdefault((action, kind.name), []).append(answer)
    for (action, system), answers in sorted(found.items(), key=lambda item: _order(item[0][0], found)):
        report.rows.append(
            {
                "action": action,
                "system": system,
                "evaluated": round(statistics.median(a.evaluated for a in answers)),
                "cached": round(statistics.median(a.cached for a in answers)),
                "first_s": statistics.median(a.first for a in answers),
            }
        )
    return report


def _order(action: str, found: dict[tuple[str, str], list[Answer]]) -> int:
    return [name for name, _ in found].index(action)
