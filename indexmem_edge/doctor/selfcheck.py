"""Runs a model for a moment, without and with a budget: `python -m indexmem_edge.doctor.selfcheck MODEL`.

A process of its own, because a library that was built for another CPU, or wrongly, dies without a word. So it says what
comes next before it does it: one JSON object a line, {"part": ...}, and at the end {"done": ...} or {"error": ...}.
`trial` starts it and reads that.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import ContextError, DecodeError, IndexMemError
from ..files.modelfile import check_model_file, loaded_model
from ..native import api
from ..native.logs import collected_errors, reason
from ..native.processors import usable_processors

TEXT = b"The sun rises in the east and sets in the west. The capital of France is Paris, and the capital of Italy is"
N_PROMPT, N_ANSWER, N_UBATCH = 40, 4, 64  # the prompt at most
SINKS, WINDOW, BUDGET = 4, 16, 48
SPAN = BUDGET + N_UBATCH  # the smallest
SMALL = 1 << 30  # bytes of a model that one thread runs in a moment, even where other programs want all processors
CLOSE = 0.02  # two answers are as good if their logits differ by less than this share of all that logits span

Logits = npt.NDArray[np.float32]


class _Text:
    """A context and what has been evaluated in it."""

    def __init__(self, model: int, context: int) -> None:
        self.context = context
        self._n_vocab = llama_lib.llama_vocab_n_tokens(llama_lib.llama_model_get_vocab(model))

    def go_on(self, tokens: list[int]) -> Logits:
        """Evaluates tokens, and returns the logits after the last."""
        data = (llama_lib.llama_token * len(tokens))(*tokens)
        code = llama_lib.llama_decode(self.context, llama_lib.llama_batch_get_one(data, len(tokens)))
        if code != 0:
            raise DecodeError(f"evaluating {len(tokens)} tokens failed with code {code}: {api.last_error()}")
        logits = np.ctypeslib.as_array(llama_lib.llama_get_logits_ith(self.context, -1), shape=(self._n_vocab,)).copy()
        if not np.isfinite(logits).all():
            raise DecodeError(f"{np.count_nonzero(~np.isfinite(logits)):,} of {len(logits):,} logits are not finite")
        return logits

    def answer(self, prompt: list[int]) -> list[tuple[int, Logits]]:
        """The likeliest continuation, token by token, each with the logits that it was chosen by."""
        answer, logits = [], self.go_on(prompt)
        for _ in range(N_ANSWER):
            answer.append((int(logits.argmax()), logits))
            logits = self.go_on([answer[-1][0]])
        return answer


@contextlib.contextmanager
def _context(model: int, budget: int, span: int = api.SPAN_TRAINED) -> Iterator[_Text]:
    small = llama_lib.llama_model_size(model) < SMALL
    params = llama_lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, N_UBATCH, N_UBATCH
    params.n_threads = params.n_threads_batch = 1 if small else min(4, usable_processors())
    if budget:
        params.flash_attn_type = llama_lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    with collected_errors(False) as log:
        try:
            if budget:
                api.request_context(budget=budget, sinks=SINKS, window=WINDOW, span=span)
            context = llama_lib.llama_init_from_model(model, params)
            if not context:
                raise ContextError(api.last_error() or reason(log) or "there is no context: is there enough memory?")
        finally:
            api.withdraw_request()
        try:
            yield _Text(model, context)
        finally:
            llama_lib.llama_free(context)


def _tokens(model: int) -> list[int]:
    room = (llama_lib.llama_token * (len(TEXT) + 8))()  # some make a token of each byte, and add their own
    vocab = llama_lib.llama_model_get_vocab(model)
    n = llama_lib.llama_tokenize(vocab, TEXT, len(TEXT), room, len(room), True, False)
    if n <= 1:
        raise IndexMemError("the tokenizer of the model makes nothing of an English sentence")
    return list(room[: min(n, N_PROMPT)])


def difference(ours: list[tuple[int, Logits]], theirs: list[tuple[int, Logits]]) -> Optional[str]:
    """In what two answers differ by more than rounding, or None."""
    for i, ((a, logits), (b, others)) in enumerate(zip(ours, theirs)):
        if a != b:
            gap = max(logits[a] - logits[b], others[b] - others[a]) / max(np.ptp(logits), np.ptp(others))
            if gap < CLOSE:
                return None  # a toss-up: what follows need not be equal
            return f"token {i} of the answer is {b} without a budget, and {a} with one that is not even reached"
    return None


def run(path: str) -> dict[str, Any]:
    """All the parts; figures for people."""
    _say(part="loading it")
    with loaded_model(check_model_file(path), as_used=True) as model:
        prompt = _tokens(model)
        _say(part="decoding without a budget")
        with _context(model, 0) as text:
            plain = text.answer(prompt)
        why = api.model_unsupported_reason(model)
        if why is not None:
            return {"tokens": len(prompt) + N_ANSWER, "evicted": 0, "unsupported": why}
        _say(part="decoding with a budget")
        with _context(model, BUDGET) as text:
            found = difference(text.answer(prompt), plain)
            if found is not None:
                raise DecodeError(found)
            _say(part="evicting")
            while (stats := api.get_stats(text.context)).n_seen <= BUDGET + N_ANSWER:
                text.go_on(prompt)
                text.answer(prompt[-1:])
            positions = {"span": stats.span, "span_reason": api.span_reason(text.context)}
        if stats.n_evicted == 0 or stats.n_kept > BUDGET:
            raise DecodeError(f"{stats.n_kept} entries are left of {stats.n_seen} with a budget of {BUDGET}")
        done = {"tokens": len(prompt) + N_ANSWER + int(stats.n_seen), "evicted": int(stats.n_evicted), **positions}
        if stats.span > 0:
            _say(part="renewing positions")
            done["tokens"] += _renew(model, prompt)
        return done


def _renew(model: int, prompt: list[int]) -> int:
    """Goes on until positions have been renewed; returns how many tokens that took."""
    with _context(model, BUDGET, SPAN) as text:
        while (stats := api.get_stats(text.context)).n_rebases == 0:
            text.go_on(prompt)
        if stats.next_position > SPAN:
            raise DecodeError(f"position {stats.next_position} comes next with a span of {SPAN}")
        return int(stats.n_seen)


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _die_quietly() -> None:
    """No core file and no window, should it come to that."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x8003)


def main() -> int:
    """The process."""
    _die_quietly()
    try:
        _say(done=run(sys.argv[1]))
    except Exception as error:  # whatever it is, the other process tells it
        _say(error=f"{error}" if isinstance(error, IndexMemError) else f"{type(error).__name__}: {error}",
             wrong=isinstance(error, DecodeError))  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
