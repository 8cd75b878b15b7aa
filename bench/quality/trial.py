"""One job of a quality run: a context, what is asked after it was compressed, and the row of figures.

Every trial is a fresh context: the context is evaluated with the cache bounded (physical eviction, the question unseen), then
the question. From there on, each time from the same state: the true answer is scored by likelihood, the answer of the full cache
is followed token by token, and an answer is generated greedily.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from indexmem_edge.native.memory import resident_memory

from ..report import Row
from ..runner import Model, System
from ..stats import tps
from .byte_budget import Budgets
from .plan import Job, Sample

BOOK_SCORED = 512  # tokens scored after each window of a book
AGREED = 32  # tokens of the full cache's answer that the others are compared with


def split_tokens(model: Model, before: str, after: str) -> tuple[list[int], list[int]]:
    """Tokens of the whole text, cut where `before` ends; a token across the cut goes to the second part."""
    whole, part = model.tokens(before + after, bos=True), model.tokens(before, bos=True)
    cut = next((i for i, (a, b) in enumerate(zip(whole, part)) if a != b), min(len(part), len(whole) - 1))
    return whole[:cut], whole[cut:]


def run_sample(model: Model, budgets: Budgets, job: Job, sample: Sample, reference: Sequence[int] | None) -> Row:
    """`reference`: the answer of the full cache, as in its row under `tokens`; None makes this the row that has one.

    Raises:
        DoesNotFit: the arm cannot be made for a context of this size.
    """
    context, question = split_tokens(model, sample.context, sample.question)
    answer = split_tokens(model, sample.context + sample.question, sample.answer)[1]
    more = len(question) + max(len(answer), sample.n_generate, AGREED) + 1
    with System(model, budgets.setup(job.arm, len(context), more)) as system:
        times = system.feed(context)
        system.feed(question, last_logits=True)
        back = system.bookmark()
        nll = float(system.nll(answer).mean())
        back()
        agreed = {}
        if reference:
            agreed = agreement(system.choices(reference), reference)
            back()
        start = time.perf_counter()
        out = _generate(system, sample, least=AGREED if reference is None else 0)
        seconds = time.perf_counter() - start
        text = _text(model, out)
        return _row(
            job,
            system,
            budgets,
            len(context),
            score=sample.score(text),
            nll=nll,
            text=text,
            **({"tokens": out[:AGREED]} if reference is None else agreed),
            prefill_tps=tps(times),
            decode_tps=len(out) / seconds if len(out) > 8 else None,
        )


def agreement(choices: np.ndarray, reference: Sequence[int]) -> Row:
    """Share of the places where the likeliest token is the full cache's, and how many of them come first.

    Both are read along the full cache's answer: after a first difference a free answer could not be compared any more.
    """
    same = choices == np.asarray(reference)
    return {"agreement": float(same.mean()), "prefix": len(same) if same.all() else int(same.argmin())}


def _generate(system: System, sample: Sample, least: int) -> list[int]:
    """Greedily, until more text cannot raise the score. At least `least` tokens, as far as the task has so many; with the token
    that ends the text, if one does.
    """
    out: list[int] = []
    while len(out) < sample.n_generate:
        out.append(token := system.greedy())
        found = len(out) >= least and sample.settled(_text(system.model, out))
        if found or system.model.is_end(token):
            break
        if len(out) < sample.n_generate:
            system.step(token)
    return out


def _text(model: Model, tokens: list[int]) -> str:
    return model.text(tokens[:-1] if tokens and model.is_end(tokens[-1]) else tokens)


def run_book(model: Model, budgets: Budgets, job: Job, tokens: Sequence[int], recalled: np.ndarray) -> Row:
    """Likelihood of the tokens that follow `length` tokens of a book, 128 at a time; apart those that `recalled` marks."""
    context, scored = tokens[:-BOOK_SCORED], tokens[-BOOK_SCORED:]
    with System(model, budgets.setup(job.arm, len(context), BOOK_SCORED)) as system:
        times = system.feed(context, last_logits=True)
        nll = system.nll(scored)
        parts = {"nll": nll, "nll_recall": nll[recalled], "nll_rest": nll[~recalled]}
        return _row(
            job,
            system,
            budgets,
            len(context),
            score=None,
            **{name: float(part.mean()) if len(part) else None for name, part in parts.items()},
            n_recall=int(recalled.sum()),
            prefill_tps=tps(times),
            decode_tps=None,
        )


def _row(job: Job, system: System, budgets: Budgets, context_tokens: int, **values: Any) -> Row:
    setup = system.setup
    return {
        **asdict(job),
        "trained": setup.sidecar is not None,
        "threads": setup.threads,
        "budget": setup.budget,
        "window": setup.window if setup.budget else None,
        "memory_slots": setup.memory_slots,
        "context_tokens": context_tokens,
        "tokens_seen": system.seen,
        **system.byte_counts(),
        **budgets.count(system, context_tokens),
        "rss_bytes": resident_memory(),
        **values,
    }
