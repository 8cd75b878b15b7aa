"""Runs texts through an ordinary cache and through bounded ones: who is kept when, and what attention computes with."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Callable, Optional

import numpy as np

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import ContextError, DecodeError, IndexMemError, ModelNotSupported
from ..native import api
from ..native.logs import collected_errors, reason
from ..options import CacheOptions
from .attention import Array, Kept, Passage
from .capture import AttentionCapture, Callback, LayerCapture

ROWS = 16  # measured of each ubatch


class TextContext:
    """A context that reads one text after the other, ubatch by ubatch; bounded if there are options."""

    def __init__(
        self,
        model: int,
        n_ctx: int,
        n_ubatch: int,
        n_threads: Optional[int],
        options: Optional[CacheOptions] = None,
        capture: Optional[Callback] = None,
    ) -> None:
        self._model, self._capture = model, capture
        params = llama_lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ubatch, n_ubatch
        params.flash_attn_type = llama_lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if n_threads is not None:
            params.n_threads = params.n_threads_batch = n_threads
        if capture is not None:
            params.cb_eval = capture.callback
        with collected_errors(False) as log:
            try:
                if options is not None:
                    options.request()
                self._ctx = llama_lib.llama_init_from_model(model, params)
                if not self._ctx:
                    why = f"cannot create a context of {n_ctx:,} tokens: {reason(log) or 'is there enough memory?'}"
                    raise ContextError(why) if options is None else api.failure(why, ContextError)
            finally:
                api.withdraw_request()

    def close(self) -> None:
        with collected_errors(False):
            llama_lib.llama_free(self._ctx)

    def clear(self) -> None:
        llama_lib.llama_memory_clear(llama_lib.llama_get_memory(self._ctx), True)

    def decode(self, tokens: Array) -> None:
        """Continues the text with one ubatch."""
        data = (llama_lib.llama_token * len(tokens))(*tokens.tolist())
        status = llama_lib.llama_decode(self._ctx, llama_lib.llama_batch_get_one(data, len(tokens)))
        if self._capture is not None and (error := self._capture.error) is not None:
            self._capture.error = None
            if isinstance(error, (KeyboardInterrupt, IndexMemError, MemoryError)):
                raise error
            raise IndexMemError(f"cannot observe the attention of this model: {error}") from error
        if status != 0:
            raise DecodeError(f"evaluating {len(tokens):,} tokens failed with code {status}: {api.last_error()}")

    def logits(self) -> Array:
        """After the last token."""
        n = llama_lib.llama_vocab_n_tokens(llama_lib.llama_model_get_vocab(self._model))
        return np.ctypeslib.as_array(llama_lib.llama_get_logits_ith(self._ctx, -1), (n,)).astype(np.float64)

    def kept(self) -> Kept:
        layers = range(llama_lib.llama_model_n_layer(self._model))
        return [[api.positions(self._ctx, il, h) for h in range(api.n_head_kv(self._ctx, il))] for il in layers]


class Reader:
    """An ordinary context, and one for each kind of bounded cache, by its budget. `layers` are those that are bounded."""

    def __init__(
        self, model: int, bounded: Sequence[CacheOptions], n_ctx: int, n_ubatch: int, n_threads: Optional[int] = None
    ) -> None:
        why = api.model_unsupported_reason(model)
        if why is not None:
            raise ModelNotSupported(f"the model cannot have a bounded KV cache: {why}")
        self.layers = tuple(il for il, kind in enumerate(api.model_layers(model)) if kind & api.LAYER_BOUNDED)
        if any(k and not v for k, v in api.model_rows(model)):
            raise ModelNotSupported(
                "the model keeps one row for keys and values together (latent attention, MLA), and a memory keeps them apart: "
                "use no memory"
            )
        self._n_ubatch = n_ubatch
        self._capture = AttentionCapture(self.layers)
        self._open = contextlib.ExitStack()
        with self._open:
            self._bounded = {o.budget: self._context(model, n_ctx, n_ubatch, n_threads, o) for o in bounded}
            self._full = self._context(model, n_ctx, n_ubatch, n_threads, None, self._capture)
            self._open = self._open.pop_all()

    def _context(self, *arguments: Any) -> TextContext:
        context = TextContext(*arguments)
        self._open.callback(context.close)
        return context

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def steps(self, n_tokens: int) -> int:
        """Calls of `done` that a text of so many tokens takes."""
        n = -(-n_tokens // self._n_ubatch)
        return n + len(self._bounded) * (n - 1)

    def read(self, tokens: Array, done: Callable[[], None]) -> tuple[Passage, dict[int, LayerCapture]]:
        """What the bounded caches keep of a text, and with what the attention of each of `layers` computes on all of it."""
        n = len(tokens)
        ubatches = [(start, min(start + self._n_ubatch, n)) for start in range(0, n, self._n_ubatch)]
        kept: dict[int, list[Kept]] = {}
        for budget, context in self._bounded.items():
            context.clear()
            kept[budget] = []
            for start, end in ubatches[:-1]:
                context.decode(tokens[start:end])
                kept[budget].append(context.kept())
                done()
        fewest = [0, *(min(len(head) for after in kept.values() for il in self.layers for head in after[u][il]) for u in range(len(ubatches) - 1))]
        rows = [_spread(*ubatch) if m < ubatch[0] else np.empty(0, np.intp) for m, ubatch in zip(fewest, ubatches)]
        if not any(map(len, rows)):
            raise IndexMemError(f"of a text of {n:,} tokens nothing leaves this cache: give longer texts, or a smaller budget or ubatch")

        self._full.clear()
        self._capture.layers = {}
        for ubatch, wanted in zip(ubatches, rows):
            self._capture.expect(wanted - ubatch[0], ubatch[1] == n)
            self._full.decode(tokens[slice(*ubatch)])
            done()
        for layer in self._capture.layers.values():
            assert layer.keys is not None and layer.values is not None
            layer.keys, layer.values = layer.keys[:, :n], layer.values[:, :n]
        return Passage(ubatches, rows, kept), self._capture.layers


def _spread(start: int, end: int) -> Array:
    """Positions all over a ubatch: its first rows see little more than the budget, as generated tokens do."""
    n = min(ROWS, end - start)
    return start + np.arange(n) * (end - start) // n


def first_tokens(model: int) -> list[int]:
    """What every text of this model begins with."""
    vocab = llama_lib.llama_model_get_vocab(model)
    return [llama_lib.llama_vocab_bos(vocab)] if llama_lib.llama_vocab_get_add_bos(vocab) else []


def tokenize(model: int, text: str) -> list[int]:
    """Tokens of a text, without any that mark its beginning or end."""
    vocab = llama_lib.llama_model_get_vocab(model)
    data = text.encode()
    room = len(data) + 16
    buffer = (llama_lib.llama_token * room)()
    n = llama_lib.llama_tokenize(vocab, data, len(data), buffer, room, False, False)
    if n < 0:
        raise IndexMemError("the text cannot be split into tokens")
    return list(buffer[:n])


def passages(texts: Sequence[Sequence[int]], first: Sequence[int], length: int, least: int, most: int) -> list[Array]:
    """Cuts tokens of texts into passages of up to `length` tokens, each beginning with `first`; no more than `most`,
    spread over the texts. A remainder counts if it has `least` tokens; a single passage is cut into halves.

    Raises:
        IndexMemError: there are not two passages of `least` tokens.
    """
    n = length - len(first)
    pieces = [text[i : i + n] for text in texts for i in range(0, len(text), n)]
    pieces = [piece for piece in pieces if len(piece) + len(first) >= least]
    if len(pieces) == 1:
        half = len(pieces[0]) // 2
        pieces = [pieces[0][:half], pieces[0][half:]] if half + len(first) >= least else []
    if len(pieces) < 2:
        raise IndexMemError(
            f"the text is too short: two passages of at least {least:,} tokens are needed, so that there is something "
            f"to evict in each; found {sum(map(len, texts)):,} tokens. Give more text, or a smaller budget or ubatch"
        )
    chosen = np.linspace(0, len(pieces) - 1, min(len(pieces), most)).round().astype(int)
    return [np.array([*first, *pieces[i]], np.int32) for i in chosen]
