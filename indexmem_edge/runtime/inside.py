"""All that this package relies on inside of llama_cpp 0.3.36: its private names, and what it does with them.

`Base` overrides two of its private methods. Other files know a `Llama` by its public names and by those that `Inside` gives to
private ones; it does not keep the `Llama` alive. tests/library/test_inside.py has a test for each: when another release of
llama_cpp is taken in, that is where to look, and here.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional, cast

import numpy as np
import numpy.typing as npt

from .._vendor import llama_cpp
from .._vendor.llama_cpp import _internals as internals, llama_chat_format as chat_format, llama_cpp as llama_lib, llama_grammar
from ..errors import ModelClosed, RequestError
from .grammar import check_grammar

MAKE = inspect.signature(llama_cpp.Llama)
GENERATE = inspect.signature(llama_cpp.Llama.generate)
SAMPLE = inspect.signature(llama_cpp.Llama.sample)
COMPLETE = inspect.signature(llama_cpp.Llama.create_completion)
CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)
_INIT_SAMPLER = inspect.signature(llama_cpp.Llama._init_sampler)
DEFAULT_SEED = int(llama_lib.LLAMA_DEFAULT_SEED)  # an application that gives none gets this one


class _Untouched:
    """In place of llama_cpp's redirection of standard output and error while a model is loaded, which is the whole process's:
    other threads lose what they print, and two loads at once restore what the other had redirected. The log is quiet anyway.
    """

    def __init__(self, disable: bool = True) -> None:
        pass

    def __enter__(self) -> _Untouched:
        return self

    def __exit__(self, *_: object) -> None:
        pass


internals.suppress_stdout_stderr = _Untouched  # type: ignore[misc,assignment]


class _Stack(contextlib.ExitStack):
    """What is freed at the end. llama_cpp has it call a function that holds the `Llama`, for a LoRA adapter, which the library
    frees with the model anyway."""

    def callback(self, callback: Any, /, *args: Any, **kwargs: Any) -> Any:
        return callback


class Base(llama_cpp.Llama):
    """llama_cpp.Llama, where a subclass has to take part in its private doings."""

    _one_sequence_per_token = False
    _own_scores = False  # no row for drafts

    @property
    def _stack(self) -> contextlib.ExitStack:
        return self.__dict__["_stack"]

    @_stack.setter
    def _stack(self, stack: contextlib.ExitStack) -> None:
        self.__dict__["_stack"] = _Stack()

    @property
    def _ctx(self) -> Any:
        return self.__dict__["_ctx"]

    @_ctx.setter
    def _ctx(self, context: Any) -> None:
        self.__dict__["_ctx"] = context
        if self._one_sequence_per_token:
            # The constructor now sizes its batch by n_ctx sequence ids per token, of which it uses one. The context
            # has its own copy of the parameters, and the true value is put back afterwards.
            self.context_params.n_ctx = 1

    @property
    def _scores(self) -> npt.NDArray[np.single]:
        # What `generate` shows to criteria for stopping, by a row behind each draft. Without `logits_all` nobody has kept any.
        if self._logits_all or self.draft_model is None or self._own_scores:
            return self.scores[: self.n_tokens]
        return np.broadcast_to(self.scores[:1], (self.n_tokens + 1, self.scores.shape[1]))

    def _init_sampler(self, *args: Any, **options: Any) -> Any:
        # A grammar with a mistake makes a sampler that is null, and the first token a crash. And processors of logits
        # are called through a closure that holds the Llama, in a sampler that the Llama holds.
        given = _INIT_SAMPLER.bind(self, *args, **options).arguments
        if given.get("grammar") is not None:
            check_grammar(self._model.vocab, *grammar_text(given["grammar"]))
        if given.get("logits_processor") is not None:
            failed = self.__dict__.setdefault("_failed", [])
            given["logits_processor"] = [_Guarded(processor, failed) for processor in given["logits_processor"]]
        given["self"] = weakref.proxy(self)
        return llama_cpp.Llama._init_sampler(**given)


class _Guarded:
    """A processor of logits. Called by the library, it cannot raise: the first error is kept for who sampled."""

    def __init__(self, processor: Callable[..., Any], failed: list[BaseException]) -> None:
        self._processor, self._failed = processor, failed

    def __call__(self, tokens: Any, logits: Any) -> Any:
        if not self._failed:
            try:
                found = np.asarray(self._processor(tokens, logits), np.single)
                if found.shape != logits.shape:
                    raise RequestError(f"a processor of logits returns {len(logits):,} numbers, as many as it gets, found an array of shape {found.shape}")
                return found
            except BaseException as error:
                self._failed.append(error)
        return logits


class Closed:
    """In place of the model, the context and the batch of a `Llama` that has been closed: whoever wants them is told."""

    def __getattr__(self, name: str) -> Any:
        raise ModelClosed("this Llama has been closed: make another one")


class Inside:
    """The inside of one `Llama`."""

    def __init__(self, llm: Base) -> None:
        self._llm = cast(Base, weakref.proxy(llm))
        self.sure: Optional[int] = None  # tokens of the history before drafts that have not been accepted yet, if there are any

    # the conversation

    @property
    def n_tokens(self) -> int:
        """Tokens of the history."""
        return int(self._llm.n_tokens)

    @n_tokens.setter
    def n_tokens(self, n: int) -> None:
        self._llm.n_tokens = n

    @property
    def tokens(self) -> npt.NDArray[np.intc]:
        """The array that the history is the beginning of."""
        return self._llm.input_ids

    @tokens.setter
    def tokens(self, tokens: npt.NDArray[np.intc]) -> None:
        self._llm.input_ids = tokens

    @property
    def history(self) -> npt.NDArray[np.intc]:
        """The tokens evaluated so far: a view."""
        return self._llm._input_ids

    @property
    def unsure(self) -> int:
        """Tokens at the end of the history that are drafts, and not accepted yet."""
        return 0 if self.sure is None else max(self.n_tokens - self.sure, 0)

    @property
    def fresh(self) -> bool:
        """Whether the library's logits, or those kept for it, are those after the last token of the history."""
        return not self._llm._requires_eval

    @fresh.setter
    def fresh(self, fresh: bool) -> None:
        self._llm._requires_eval = not fresh

    @property
    def seed(self) -> int:
        """Of the next call that draws."""
        return int(self._llm._seed)

    @seed.setter
    def seed(self, seed: int) -> None:
        self._llm._seed = seed

    # the model and its context

    @property
    def ctx(self) -> int:
        """The context: llama_context *."""
        return self._llm.ctx

    @property
    def model(self) -> int:
        """The model: llama_model *."""
        return self._llm.model

    @property
    def vocab(self) -> int:
        """Its vocabulary: llama_vocab *."""
        return self._llm._model.vocab

    @property
    def memory(self) -> Any:
        """What the context keeps of the past: llama_memory_t."""
        return llama_lib.llama_get_memory(self.ctx)

    @property
    def loaded_model(self) -> Optional[int]:
        """The model, or None where the constructor did not get so far."""
        model = getattr(self._llm, "_model", None)
        return None if model is None else int(model.model)

    @property
    def has_context(self) -> bool:
        """Whether the constructor got as far as a context."""
        return "_ctx" in self._llm.__dict__

    @property
    def n_ctx(self) -> int:
        """The largest length of a history."""
        return int(self._llm._n_ctx)

    @property
    def n_ctx_train(self) -> int:
        """The length that the model was trained for."""
        return int(llama_lib.llama_model_n_ctx_train(self.model))

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return int(self._llm._n_vocab)

    @property
    def n_batch(self) -> int:
        """Tokens evaluated at once."""
        return int(self._llm.n_batch)

    @property
    def verbose(self) -> bool:
        """Whether llama.cpp's log is printed."""
        return bool(self._llm.verbose)

    @property
    def public(self) -> Base:
        """The `Llama`, for its public names; it is not kept alive by it."""
        return self._llm

    # evaluation

    def decode(self, batch: Sequence[int], past: int, every: bool = False) -> int:
        """Evaluates at most `n_batch` tokens after `past` others; returns the library's code, 0 if all is well.

        Args:
            every: the logits after each token are wanted, not only those after the last.
        """
        self._llm._batch.set_batch(batch=batch, n_past=past, logits_all=self.logits_all or every)
        return int(llama_lib.llama_decode(self.ctx, self._llm._batch.batch))

    # logits

    @property
    def adds_bos(self) -> bool:
        """Whether text that is tokenized begins with a token of its own."""
        return bool(self._llm._model.add_bos_token()) and self._llm.token_bos() != -1

    @property
    def logits_all(self) -> bool:
        """Whether the logits after every token are kept, in `scores`."""
        return bool(self._llm._logits_all)

    @property
    def scores(self) -> npt.NDArray[np.single]:
        """With `logits_all`, row i holds the logits after token i of the history."""
        return self._llm.scores

    @scores.setter
    def scores(self, scores: npt.NDArray[np.single]) -> None:
        self._llm.scores = scores

    def batch_logits(self, n: int) -> npt.NDArray[np.single]:
        """Those after each of the `n` tokens of the last batch: a view."""
        return np.ctypeslib.as_array(self._llm._ctx.get_logits(), shape=(n, self.n_vocab))

    def last_logits(self, before: int = 0) -> Optional[npt.NDArray[np.single]]:
        """A copy of those that the library has after the last token that it evaluated, if there are any, or `before` tokens earlier."""
        found = llama_lib.llama_get_logits_ith(self.ctx, -1 - before)
        return np.ctypeslib.as_array(found, shape=(self.n_vocab,)).copy() if found else None

    # sampling

    def sampler(self, **options: Any) -> Any:
        """That of the stream in progress, else one with these options: its attribute `sampler` is a llama_sampler *."""
        return self._llm._sampler or self._llm._init_sampler(**options)

    @property
    def stream_sampler(self) -> Any:
        """That of the stream in progress, or None."""
        return self._llm._sampler

    def raise_of_processors(self) -> None:
        """What a processor of logits raised while a token was sampled, if one did."""
        if failed := self._llm.__dict__.get("_failed"):
            error = failed.pop()
            try:
                raise error
            finally:
                del error  # which holds this frame

    @contextlib.contextmanager
    def own_scores(self) -> Iterator[None]:
        """Logits are those that are kept meanwhile, without a row for each draft."""
        self._llm._own_scores = True
        try:
            yield
        finally:
            self._llm._own_scores = False

    @contextlib.contextmanager
    def no_stream(self) -> Iterator[None]:
        """What is sampled meanwhile has its own options and random numbers, not those of a stream that was left unfinished."""
        left, self._llm._sampler = self._llm._sampler, None
        try:
            yield
        finally:
            self._llm._sampler = left

    # chat formats

    @property
    def chat_function(self) -> Callable[..., Any]:
        """What makes a prompt of messages, and an answer of a completion: the handler that create_chat_completion takes."""
        llm, name = self._llm, self._llm.chat_format or ""
        return llm.chat_handler or llm._chat_handlers.get(name) or chat_format.get_chat_completion_handler(name)

    @property
    def chat_formats(self) -> list[str]:
        """The names that `chat_format` may have."""
        return sorted({*chat_format.LlamaChatCompletionHandlerRegistry()._chat_handlers, *self._llm._chat_handlers})

    def token_text(self, token: int) -> str:
        """How the vocabulary spells a token; "" for -1, which is none."""
        return str(self._llm._model.token_get_text(token)) if token != -1 else ""

    @property
    def has_lora(self) -> bool:
        """Whether the LoRA that was named has been loaded: llama_cpp goes on without one that could not be."""
        return bool(self._llm._lora_adapter)


def opened(llm: Base) -> bool:
    """Whether the constructor got so far that there is something to free."""
    return "_stack" in llm.__dict__


def shut(llm: Base) -> None:
    """After the model has been freed: neither this `Llama` nor a tokenizer that somebody still has can reach it."""
    closed = Closed()
    if (model := llm.__dict__.get("_model")) is not None:
        model.model = model.vocab = closed
    if (sampler := llm.__dict__.get("_sampler")) is not None:
        llm._sampler = None
        free_sampler(sampler)
    for name in ("_model", "_ctx", "_batch"):
        llm.__dict__[name] = closed


def leave(llm: Base) -> None:
    """Frees nothing, now or later: threads, locks and devices are another process's."""
    for name, handle in (("_model", "model"), ("_ctx", "ctx"), ("_batch", "batch"), ("_sampler", "sampler")):
        if (part := llm.__dict__.get(name)) is not None:
            setattr(part, handle, None)
    llm._lora_adapter = None


def end_stream(llm: Base, sampler: Any) -> None:
    """Frees the sampler of a stream that has ended, now: it is a cycle of references."""
    if llm._sampler is sampler:
        llm._sampler = None
    free_sampler(sampler)


def free_sampler(sampler: Any) -> None:
    """Frees a llama_cpp sampler without the help of the collector of garbage."""
    sampler.close()
    for _, custom in sampler.custom_samplers:
        custom.apply_func = custom._apply_wrapper_ref = custom.sampler = None
    sampler.custom_samplers.clear()


def grammar_text(grammar: Any) -> tuple[str, str]:
    """The rules of a llama_cpp grammar, and the name of the first."""
    if not isinstance(grammar, llama_grammar.LlamaGrammar):
        raise RequestError(
            f"a grammar is what LlamaGrammar.from_string(text) or from_json_schema(text) makes, found {grammar!r:.60}"
        )
    return grammar._grammar, grammar._root


def sample_from(logits: npt.NDArray[np.single], sampler: Any) -> int:
    """What llama_sampler_sample does with the logits of a context."""
    candidates = np.zeros(len(logits), dtype=_CANDIDATE)
    candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
    data = candidates.ctypes.data_as(llama_lib.llama_token_data_p)
    array = llama_lib.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
    llama_lib.llama_sampler_apply(sampler.sampler, ctypes.byref(array))
    token = int(array.data[array.selected].id)
    llama_lib.llama_sampler_accept(sampler.sampler, token)
    return token


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


def token_piece(vocab: Any, token: int, special: bool) -> bytes:
    """The bytes of one token."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_lib.llama_token_to_piece(vocab, llama_lib.llama_token(token), buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n
