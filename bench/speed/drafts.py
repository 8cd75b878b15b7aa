"""Prompt lookup on a text-editing task: tokens per second with drafts and without, and whether the tokens are the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from indexmem_edge import Llama
from indexmem_edge._vendor.llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from indexmem_edge.options import CacheOptions

from ..machine import describe
from ..report import Report, Row, Verdict
from ..runner import BenchError, library
from ..stats import alternate, pair_interval, pair_ratio
from ..text import read_text

if TYPE_CHECKING:
    from rich.progress import Progress

COLUMNS = ("passage", "prompt", "tokens", "evicted", "plain_tps", "drafts_tps", "ratio", "tokens_a_batch", "same")
PASSAGE = 1500  # characters
GOAL = 1.8
_TASK = "Copy the text below word for word, but write '{new}' wherever it says '{old}'. Answer with the text alone.\n\n{text}"


class Counted(LlamaDraftModel):
    """A draft model, and how often it was asked: each time a batch is evaluated."""

    def __init__(self, model: LlamaDraftModel) -> None:
        self.model, self.asked = model, 0

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        self.asked += 1
        return self.model(input_ids, **kwargs)


def passages_of(text: str, n: int) -> list[str]:
    """The first `n` passages of a text, each from one beginning of a sentence on."""
    found: list[str] = []
    start = 0
    while len(found) < n:
        if start + PASSAGE > len(text):
            raise BenchError(f"the text has {len(text):,} characters, {n} passages need about {n * PASSAGE:,}: take a longer one")
        end = text.rfind(". ", start + PASSAGE // 2, start + PASSAGE) + 1 or start + PASSAGE
        found.append(text[start:end].strip())
        start = end
    return found


def task_of(passage: str) -> str:
    """The question: to copy a passage, with its most frequent longer word replaced."""
    words = [word for word in passage.split() if word.isalpha() and len(word) > 3]
    old = max(sorted(set(words)), key=words.count) if words else "the"
    return _TASK.format(old=old, new=old.upper(), text=passage)


def run_drafts(
    path: Path, options: CacheOptions, *, passages: int, tokens: int, rounds: int, ngram: int, drafts: int, threads: int,
    text: Path | None, progress: Progress,
) -> Report:  # fmt: skip
    """Each passage is edited with and without drafts, in turns; only what is generated counts, not the reading of the prompt."""
    meta = describe(path.name, library(), threads, rounds=rounds, policy=options.policy, budget=options.budget, ngram=ngram, drafts=drafts)
    report = Report("drafts", meta)
    task = progress.add_task("passages", total=passages)
    lookup = Counted(LlamaPromptLookupDecoding(max_ngram_size=ngram, num_pred_tokens=drafts))
    with closing(Llama(path, **options.keywords(), n_threads=threads, n_threads_batch=threads, verbose=False)) as llm:
        for i, passage in enumerate(passages_of(read_text(text, 2 * passages * PASSAGE), passages)):
            report.rows.append({"passage": i + 1, **_measured(llm, lookup, task_of(passage), tokens, rounds)})
            progress.advance(task)
    ratios = [row["ratio"] for row in report.rows]
    low, high = pair_interval(ratios, [1.0] * len(ratios))
    report.verdicts.append(Verdict(f"tokens/s with prompt lookup, against without ({low:.2f} to {high:.2f})", statistics.median(ratios), GOAL))
    report.verdicts.append(Verdict("share of passages with the same tokens", statistics.fmean(row["same"] for row in report.rows), 1.0))
    return report


def _measured(llm: Llama, lookup: Counted, question: str, n: int, rounds: int) -> Row:
    llm.reset()
    llm.draft_model = None
    asked: Any = llm.create_chat_completion([{"role": "user", "content": question}], max_tokens=1)
    prompt = llm.input_ids[: asked["usage"]["prompt_tokens"]].tolist()
    answers: list[list[int]] = []

    def answer(model: LlamaDraftModel | None) -> float:
        llm.draft_model = model
        found, seconds = _answer(llm, prompt, n)
        answers.append(found)
        return len(found) / seconds

    plain, drafted = alternate(rounds, [lambda: answer(None), lambda: answer(lookup)])
    lookup.asked = 0
    answer(lookup)
    return {
        "prompt": len(prompt),
        "tokens": len(answers[0]),
        "evicted": llm.kv_stats().evicted,
        "plain_tps": statistics.median(plain),
        "drafts_tps": statistics.median(drafted),
        "ratio": pair_ratio(drafted, plain),
        "tokens_a_batch": len(answers[-1]) / max(lookup.asked, 1),
        "same": all(found == answers[0] for found in answers),
    }


def _answer(llm: Llama, prompt: Sequence[int], n: int) -> tuple[list[int], float]:
    """The tokens after the first, which comes with the prompt, and the seconds that they took."""
    stream = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
    last = next(stream)
    found: list[int] = []
    started = time.perf_counter()
    for last in stream:
        if len(found) == n or last == llm.token_eos():
            break
        found.append(last)
    seconds = time.perf_counter() - started
    stream.close()
    return found, seconds
