"""Several conversations at once: answers per second and seconds to the first token, ours beside a stock server."""

from __future__ import annotations

import concurrent.futures
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..report import Report, Row
from ..stats import most_of
from ..text import builtin_text
from .client import Answer, Kind, Message, Running, running

COLUMNS = ("conversations", "system", "requests_per_s", "tokens_per_s", "first_s", "first_p95_s", "evaluated", "rss_bytes")
START, TURN = 2000, 400  # characters of the first and of each later question
ANSWER = 24  # tokens


def talk(server: Running, name: int, turns: int) -> list[Answer]:
    """One conversation: its answers."""
    text = builtin_text(START + TURN * turns, seed=name)
    messages: list[Message] = []
    answers = []
    for turn in range(turns):
        part = text[:START] if turn == 0 else text[START + TURN * (turn - 1) : START + TURN * turn]
        messages.append({"role": "user", "content": f"{part}\n\nWho is it about?"})
        answers.append(server.chat(messages, ANSWER, seed=turn))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


def run_rates(
    kinds: Sequence[Kind],
    model: Path,
    threads: int,
    conversations: Sequence[int],
    turns: int,
    rounds: int,
    meta: Row,
    tell: Callable[[str], Any] = lambda _: None,
) -> Report:
    """So many conversations of `turns` turns at once, with a slot each; servers take turns, `rounds` times."""
    report = Report("serve-rates", {**meta, "answer_tokens": ANSWER, "turns": turns, "rounds": rounds})
    for n in conversations:
        answers: dict[str, list[Answer]] = {kind.name: [] for kind in kinds}
        seconds, rss = dict.fromkeys(answers, 0.0), dict.fromkeys(answers, 0)
        for round_ in range(rounds):
            for kind in kinds:
                tell(f"{n} conversations, {kind.name}, round {round_ + 1} of {rounds}")
                with running(kind.with_slots(n), model, threads) as server:
                    started = time.perf_counter()
                    with concurrent.futures.ThreadPoolExecutor(n) as pool:
                        for got in pool.map(lambda name: talk(server, name, turns), range(n)):
                            answers[kind.name] += got
                    seconds[kind.name] += time.perf_counter() - started
                    rss[kind.name] = max(rss[kind.name], server.rss_bytes)
        report.rows += [_row(n, name, got, seconds[name], rss[name]) for name, got in answers.items()]
    return report


def _row(n: int, system: str, answers: Sequence[Answer], seconds: float, rss: int) -> Row:
    firsts = [answer.first for answer in answers]
    return {
        "conversations": n,
        "system": system,
        "requests_per_s": len(answers) / seconds,
        "tokens_per_s": sum(answer.generated for answer in answers) / seconds,
        "first_s": statistics.median(firsts),
        "first_p95_s": most_of(firsts),
        "evaluated": round(statistics.mean(answer.evaluated for answer in answers)),
        "rss_bytes": rss,
    }
