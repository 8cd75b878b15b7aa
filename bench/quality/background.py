"""Facts told in one conversation and asked in the next: what of a saved session does a new one know that begins after it?

The first conversation is a chat: in every turn the user tells a fact, with a passage of a text after it. It is saved. The next one begins with the
session as a background (`load_session(as_background=True)`), and asks for each fact with the beginning of its sentence as the beginning of the
answer; every question begins the new conversation anew. Beside it, the same question without any background, and at the end of the whole
first conversation with nothing evicted.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from indexmem_edge import Llama
from indexmem_edge.runtime.answers import log_probabilities
from indexmem_edge.runtime.choice import INDEXER_POLICY

from ..endless.facts import Fact, facts
from ..endless.talk import Template
from ..machine import describe
from ..report import Report, Row
from ..runner import Model, library
from ..text import read_text
from .paired import Paired

if TYPE_CHECKING:
    from rich.progress import Progress

COLUMNS = ("arm", "budget", "tokens", "kept", "answered", "answered_low", "answered_high", "nll", "nll_low", "nll_high", "n")
NOTHING, WHOLE = "nothing", "all of it"
SPARE = 2  # tokens that an answer may have beyond those of the value
SETTINGS: dict[str, Any] = dict(n_batch=512, verbose=False, kv_warn=lambda _: None)


@dataclass(frozen=True)
class Arm:
    name: str
    options: dict[str, Any]  # of Llama
    background: bool = True

    @property
    def budget(self) -> int:
        return int(self.options.get("kv_budget", 0))


@dataclass(frozen=True)
class Told:
    """A conversation, and what to ask in the next."""

    tokens: list[int]
    facts: list[Fact]


def arms_of(policies: Sequence[str], budgets: Sequence[int], memory: str, sidecar: Path | None) -> list[Arm]:
    """Without a background, every policy with every budget, and all of the text."""
    memories: list[dict[str, str]] = [{}, {"memory": memory}] if memory != "off" else [{}]
    arms = [Arm(NOTHING, {"kv_budget": max(budgets), "indexmem": "off"}, background=False)]
    for budget in budgets:
        for policy in policies:
            for more in memories:
                own = {"indexmem": sidecar} if policy == INDEXER_POLICY else {"indexmem": "off", "kv_policy": policy}
                name = policy + ("".join(f" + {kind}" for kind in more.values()))
                arms.append(Arm(name, {"kv_budget": budget, **own, **more}))
    return [*arms, Arm(WHOLE, {})]


def conversation(model: Model, passages: list[str], n_tokens: int, n_facts: int, seed: str) -> Told:
    """About `n_tokens` tokens with a fact in every turn."""
    rng, template = random.Random(seed), Template(model)
    found, per_turn = facts(n_facts, seed), max(n_tokens // n_facts - 60, 0)
    text = template.say("system", "You are a helpful assistant.", reply=False)
    for fact in found:
        passage, at = "", rng.randrange(len(passages))
        while len(model.tokens(passage)) < per_turn:
            passage, at = f"{passage} {passages[at]}".strip(), (at + 1) % len(passages)
        text += template.say("user", f"{fact.telling} Please remember that. And now something else: {passage}", reply=True)
        text += template.say("assistant", "I will remember that.", reply=False)
    return Told(model.tokens(text, bos=True, special=True), found)


def question(model: Model, fact: Fact) -> list[int]:
    """The first prompt of a new conversation, up to where the value begins. In other words a small model does not find it even if
    nothing has been evicted.
    """
    begun = fact.question.strip()
    asked = Template(model).say("user", f"{begun} ...", reply=True)
    return model.tokens(asked + begun, bos=True, special=True)


def run_background(
    model: Model, arms: Sequence[Arm], *, n_tokens: int, n_facts: int, samples: int, seed: int, threads: int, text: Path | None,
    progress: Progress,
) -> Report:  # fmt: skip
    """Every arm with the same conversations."""
    meta = describe(model.path.name, library(), threads, tokens=n_tokens, facts=n_facts, samples=samples, seed=seed)
    report = Report("background", meta)
    passages = [part for part in read_text(text).replace("\n", " ").split(". ") if part]
    told = [conversation(model, passages, n_tokens, n_facts, f"{seed}/{i}") for i in range(samples)]
    task = progress.add_task("arms", total=len(arms) * samples)
    for arm in arms:
        room: dict[str, Any] = {} if arm.budget else {"n_ctx": max(len(one.tokens) for one in told) + 512}
        with Llama(model.path, n_threads=threads, n_threads_batch=threads, **SETTINGS, **room, **arm.options) as llm:
            found = []
            for one in told:
                found.append(_ask(model, llm, arm, one))
                progress.advance(task)
        report.rows.append(_row(arm, found, told))
    return report


def _ask(model: Model, llm: Llama, arm: Arm, told: Told) -> tuple[list[tuple[bool, float]], int]:
    """Of each fact whether it is answered, and the likelihood of its value; and entries kept of the conversation."""
    before: list[int] = []
    llm.reset()
    if arm.budget == 0:
        before = told.tokens
    elif arm.background:
        with tempfile.TemporaryDirectory() as folder:
            llm.prefill(told.tokens)
            llm.save_session(Path(folder) / "s")
            llm.reset()
            llm.load_session(Path(folder) / "s", as_background=True)
    kept = llm.kv_stats().kept
    return [_answer(model, llm, [*before, *question(model, fact)], fact) for fact in told.facts], kept


def _answer(model: Model, llm: Llama, prompt: list[int], fact: Fact) -> tuple[bool, float]:
    value = model.tokens(f" {fact.value}")
    answer = [token for token, _ in zip(llm.generate(prompt, temp=0.0), range(len(value) + SPARE))]
    losses = []
    for i, token in enumerate(value):
        llm.prefill(prompt + value[:i])
        losses.append(-float(log_probabilities(np.asarray(llm._kept.now(), dtype=np.float64))[token]))
    return fact.value.lower() in model.text(answer).lower(), statistics.fmean(losses)


def _row(arm: Arm, found: Sequence[tuple[list[tuple[bool, float]], int]], told: Sequence[Told]) -> Row:
    """Means over the facts, with intervals by drawing these again."""
    row: Row = {"arm": arm.name, "budget": arm.budget or None, "tokens": round(statistics.fmean(len(one.tokens) for one in told))}
    row |= {"kept": round(statistics.fmean(kept for _, kept in found)), "n": sum(len(answers) for answers, _ in found)}
    for i, name in enumerate(("answered", "nll")):
        row |= Paired([np.array([[float(answer[i])] for answers, _ in found for answer in answers])]).mean(0).row(name)
    return row
