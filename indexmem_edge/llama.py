"""`Llama`: llama_cpp.Llama with a KV cache of a fixed size."""

from __future__ import annotations

import contextlib
import inspect
import os
from typing import Any, Callable, Generator, Iterator, Optional, Sequence, Union

import numpy as np
import numpy.typing as npt

from ._vendor import llama_cpp
from ._vendor.llama_cpp.llama_tokenizer import LlamaTokenizer
from .errors import BudgetError
from .files.modelfile import check_model_file
from .native import api
from .native.logs import collected_errors, quiet
from .options import DEFAULT_SINKS, DEFAULT_WINDOW, CacheOptions, bounded_keywords
from .runtime import cache, prompts
from .runtime.align import align
from .runtime.cancel import Calls, one_call
from .runtime.creation import explain
from .sessions import session
from .stats import KVStats

_GENERATE = inspect.signature(llama_cpp.Llama.generate)
_SAMPLE = inspect.signature(llama_cpp.Llama.sample)
_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)
_TEMPLATE_ARGUMENTS = ("functions", "function_call", "tools", "tool_choice")

PathLike = Union[str, "os.PathLike[str]"]
Progress = Callable[[int, int], None]


class Llama(llama_cpp.Llama):
    """A llama.cpp model whose KV memory has the size you choose, however long the text gets.

    Takes everything that `llama_cpp.Llama` takes, has the same methods, and adds:

    Args:
        model_path: the GGUF file.
        kv_budget: entries kept per KV head, protected ones included; None or 0: llama.cpp's own cache, untouched.
        kv_budget_ratio: keep no more than this share of the tokens seen, either, nor fewer than the protected ones;
            kv_budget remains the most that is kept, and what is allocated.
        kv_policy: which entries leave when the budget is reached; `indexmem_edge.policies()` lists them. None: the
            indexer with a sidecar, else streaming.
        indexmem: a sidecar, the file with an indexer or a memory for this model (docs/sidecar.md).
        memory: what becomes of evicted entries: "centroid" keeps them as running means in `memory_slots` slots of the
            budget and needs no training, "residual" needs the trained weights of a sidecar, "off" forgets them. None:
            that of the sidecar, without one off.
        memory_slots: of the memory "centroid"; None: as the sidecar says, without one 64.
        kv_sinks: first tokens that are never evicted.
        kv_window: most recent tokens that are never evicted.
        kv_pin: length of a prefix that is never evicted; "auto": the system prompt, in chat completions.
        kv_evict_step: entries evicted at once during generation; 0: chosen from the budget.
        kv_seed: for policies that draw numbers.
        kv_span: number of positions that are used, however long the text gets: before new tokens would pass it, the keys
            that are kept are rotated to smaller ones, in their order. It takes at least kv_budget + n_ubatch. None: the
            length that the model was trained for, where its keys can be rotated; `kv_stats()` says if not. 0: positions
            grow with the text.
        kv_cancel: copy the KV state before a call evicts or renews positions, so that `cancel` can bring it back. That
            takes as much memory as the state, from the first such call on. False: after a cancel the history is
            evaluated again instead.

    With a budget, `n_ctx` is only the largest logical length (default 2 Mi tokens) and costs no KV memory,
    `flash_attn` is on, and `embedding=True` and `draft_model` are refused. With `logits_all=True` the logits of `n_ctx`
    tokens are kept, so `n_ctx` then defaults to the length that the model was trained for.

    Conversations append: what a prompt shares with the cached text is not evaluated again. When the caller edits text
    that can no longer be taken out of the cache exactly, everything is evaluated again, and `kv_stats()` says so.

    Raises:
        BudgetError, PolicyError: an option is impossible; the message names the minimum or lists the choices.
        SidecarError: the sidecar is damaged, or for another model.
        LatentMemoryError: there is no such memory, or not without trained weights.
        ModelFileError, ModelNotSupported, ContextError: the model cannot be loaded, or not with a budget.
        LibraryError: there is no CPU backend for this machine, or not the one that INDEXMEM_CPU_VARIANT names.
    """

    def __init__(
        self,
        model_path: PathLike,
        *,
        kv_budget: Optional[int] = None,
        kv_budget_ratio: Optional[float] = None,
        kv_policy: Optional[str] = None,
        kv_sinks: int = DEFAULT_SINKS,
        kv_window: int = DEFAULT_WINDOW,
        kv_pin: Union[int, str] = 0,
        kv_evict_step: int = 0,
        kv_seed: int = 0,
        kv_span: Optional[int] = None,
        kv_cancel: bool = True,
        indexmem: Optional[PathLike] = None,
        memory: Optional[str] = None,
        memory_slots: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        options = CacheOptions.checked(
            kv_budget, kv_policy, kv_sinks, kv_window, kv_pin, kv_evict_step, kv_seed, kv_budget_ratio, indexmem, memory,
            memory_slots, kv_span,
        )  # fmt: skip
        path = check_model_file(model_path)
        self.kv_options = options
        self._cache: Optional[cache.BoundedCache] = None
        self._turn = cache.Turn()
        self._calls = Calls(self, kv_cancel)
        self._aligning = False
        self._pieces: dict[tuple[int, bool], bytes] = {}
        if options.bounded:
            kwargs = bounded_keywords(kwargs)
        with collected_errors(kwargs.get("verbose", True)) as log:
            try:
                api.require_cpu()
                if options.bounded:
                    options.request().submit()
                super().__init__(path, **kwargs)
            except (ValueError, RuntimeError, MemoryError) as error:
                explained = explain(self, error, path, log)
                self.close()
                if explained is None:
                    raise
                raise explained from error
            finally:
                if options.bounded:
                    api.Request.withdraw()
        if options.bounded:
            self.context_params.n_ctx = kwargs["n_ctx"]
            self._cache = cache.BoundedCache(self, options)
        self._calls.attach()

    @property
    def _ctx(self) -> Any:
        return self.__dict__["_ctx"]

    @_ctx.setter
    def _ctx(self, context: Any) -> None:
        self.__dict__["_ctx"] = context
        if self.kv_options.bounded:
            # The base class now sizes its batch by n_ctx sequence ids per token, of which it uses one. The context
            # has its own copy of the parameters, and __init__ puts the true value back.
            self.context_params.n_ctx = 1

    # evaluation and generation

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens after those already evaluated.

        Raises:
            BudgetExhausted: the policy is `full` and there is no room. The cache holds what it held before.
            DecodeError: evaluation failed. The cache holds the tokens evaluated before the failure.
        """
        if len(tokens) > 1:
            self._calls.run(lambda: self._evaluate(tokens))
        else:  # by itself as short as a call can be, and not worth the way back
            self._calls.overtake()
            self._evaluate(tokens)

    def _evaluate(self, tokens: Sequence[int]) -> None:
        if self._turn.evaluated < 0:
            self._turn.evaluated = len(tokens)
        if self._cache is not None:
            self._cache.settle()
            self._cache.read(tokens)
            return
        if len(tokens) > 0:
            self._calls.logits = None
        for start in range(0, max(len(tokens), 1), self.n_batch):
            self._calls.check()
            try:
                with quiet(self.verbose):
                    super().eval(tokens[start : start + self.n_batch])
            except RuntimeError:
                self._calls.check()
                raise
            self._calls.evaluated()

    @one_call
    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        """See `llama_cpp.Llama.generate`. What the cache already holds of `tokens` is not evaluated again."""
        call = _GENERATE.bind(self, tokens, *args, **kwargs)
        if self._cache is not None and call.arguments.get("reset", True):
            call.arguments["tokens"] = self._cache.reuse(tokens)
            call.arguments["reset"] = False
        else:
            self._turn = cache.Turn(prompt=len(tokens), evaluated=-1)
        yield from super().generate(*call.args[1:], **call.kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """See `llama_cpp.Llama.sample`."""
        kept = self._calls.logits
        if kept is None or self._requires_eval:
            return int(super().sample(*args, **kwargs))
        given = _SAMPLE.bind(self, *args, **kwargs).arguments
        options = {name: value for name, value in given.items() if name not in ("self", "idx")}
        return kept.sample(self._sampler or self._init_sampler(**options))

    @one_call
    def prefill(self, tokens: Sequence[int], progress: Optional[Progress] = None) -> int:
        """Evaluates a prompt without generating; returns how many of its tokens had to be evaluated.

        Args:
            tokens: the whole prompt; what is already cached of it is not evaluated again.
            progress: called with (tokens evaluated, tokens to evaluate) after every batch.
        """
        if self._cache is not None:
            rest = self._cache.reuse(tokens)
        else:
            rest = cache.reuse_unbounded(self, tokens)
        for start in range(0, len(rest), self.n_batch):
            self.eval(rest[start : start + self.n_batch])
            if progress is not None:
                progress(min(start + self.n_batch, len(rest)), len(rest))
        return len(rest)

    @contextlib.contextmanager
    def watch(self, progress: Progress) -> Iterator[None]:
        """While this lasts, `progress` is called with (tokens evaluated, tokens to evaluate) after every batch of a prompt,
        whatever call evaluates it: completions read theirs in silence otherwise.
        """
        before, self._calls.watcher = self._calls.watcher, progress
        try:
            yield
        finally:
            self._calls.watcher = before

    def cancel(self) -> bool:
        """Stops the call in progress, from any thread; returns whether there was one.

        The call then raises `Cancelled`, and the conversation is as it was before it: cached text, history, counts, pin.
        Without a budget, cached text that the call's prompt had replaced is evaluated again when it is asked for.
        A call is an `eval`, `generate`, `prefill`, `prefill_chat`, `create_completion` or `create_chat_completion`. One
        that streams lasts until its iterator ends, is closed, or another call is made; its next item raises `Cancelled`.
        An `eval` of one token by itself ends; a cancel without a call in progress is forgotten. On the CPU a call stops
        after the node of the graph that it is at, on a GPU after a batch.
        """
        return self._calls.cancel()

    def reset(self) -> None:
        """Forgets the conversation."""
        super().reset()
        if not self._calls.in_progress:  # what a call resets belongs to its own prompt
            self._turn = cache.Turn()
        if self._cache is not None:
            self._cache.clear()

    # chat

    @one_call
    def create_completion(self, prompt: Union[str, list[int]], *args: Any, **kwargs: Any) -> Any:
        """See `llama_cpp.Llama.create_completion`."""
        if self._cache is not None:
            if self._aligning and isinstance(prompt, list):
                prompt = self._align(prompt)
            elif not self._aligning:
                self._cache.wanted_pin = 0
        return super().create_completion(prompt, *args, **kwargs)

    @one_call
    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """See `llama_cpp.Llama.create_chat_completion`.

        The cached text is reused even where the tokenizer would now cut the model's own answers differently.

        Raises:
            BudgetError: with kv_pin="auto", the system prompt is too long for the budget.
        """
        if self._cache is None:
            return super().create_chat_completion(messages, *args, **kwargs)
        if self.kv_options.auto_pin:
            given = _CHAT.bind(self, messages, *args, **kwargs).arguments
            template = {name: given[name] for name in _TEMPLATE_ARGUMENTS if name in given}
            self._pin_system(messages, prompts.chat_tokens(self, messages, **template), template)
        self._aligning = True
        try:
            return super().create_chat_completion(messages, *args, **kwargs)
        finally:
            self._aligning = False

    @one_call
    def prefill_chat(self, messages: list[dict[str, Any]], progress: Optional[Progress] = None) -> int:
        """Evaluates a conversation whose last message is still open, and returns how many tokens that took.

        For reading a long document now and asking about it later: paragraphs that the caller then adds to the last
        message cost only themselves.
        """
        prompt = prompts.open_prefix(self, messages)
        if prompt is None:
            return 0
        if self._cache is not None:
            if self.kv_options.auto_pin:
                self._pin_system(messages, prompt, {})
            prompt = self._align(prompt)
        return self.prefill(prompt, progress)

    def _pin_system(self, messages: Any, prompt: Optional[list[int]], template: dict[str, Any]) -> None:
        assert self._cache is not None
        pin = 0 if prompt is None else prompts.system_prefix(self, messages, prompt, **template)
        self.kv_options.require_room(pin, "the system prompt of")
        self._cache.wanted_pin = pin

    def _align(self, prompt: list[int]) -> list[int]:
        return align(
            self._input_ids,
            prompt,
            piece=lambda token: self._piece(token, True),
            tokenize=lambda text: self.tokenize(text, add_bos=False, special=True),
        )

    def _piece(self, token: int, special: bool) -> bytes:
        piece = self._pieces.get((token, special))
        if piece is None:
            piece = self._pieces[(token, special)] = cache.token_piece(self._model.vocab, token, special)
        return piece

    def detokenize(self, tokens: list[int], prev_tokens: Optional[list[int]] = None, special: bool = False) -> bytes:
        """See `llama_cpp.Llama.detokenize`; the same bytes, fast enough for very long answers."""
        if self._cache is None or type(self.tokenizer_) is not LlamaTokenizer:
            return super().detokenize(tokens, prev_tokens=prev_tokens, special=special)
        text = b"".join([self._piece(token, special) for token in tokens])
        leading_space = len(tokens) > 0 and tokens[0] == self.token_bos() and text[:1] == b" "
        return text[1:] if leading_space else text

    # what the cache holds

    def kv_stats(self) -> KVStats:
        """What the cache has seen, kept, dropped and evaluated again, and what it costs."""
        return self._cache.stats() if self._cache is not None else cache.unbounded_stats(self)

    def kv_snapshot(self, rotary: bool = False) -> dict[int, list[npt.NDArray[np.int32]]]:
        """Positions in the text that are held now: for each layer with a cache, one ascending array per KV head.

        Args:
            rotary: instead, for the same entries in the same order, the positions that their keys are rotated by. They
                are equal until positions are renewed (`kv_stats().rebases`), and stay below `kv_stats().span`.
        """
        return self._bounded("kv_snapshot").snapshot(rotary)

    def set_pin(self, n: int) -> None:
        """Pins the first `n` tokens. Possible until something has been evicted; later only to make the pin shorter.

        With kv_pin="auto" the next chat completion chooses again.
        """
        self._bounded("set_pin").set_pin(n)

    def _bounded(self, what: str) -> cache.BoundedCache:
        if self._cache is None:
            raise BudgetError(f"{what} needs a bounded KV cache: give Llama a kv_budget")
        return self._cache

    # sessions

    def save_session(self, path: PathLike, extra: Any = None) -> int:
        """Writes the conversation and its KV state to a file, atomically; returns the file's size in bytes.

        The KV state is bounded by the budget; the token history adds 4 bytes per token seen.

        Args:
            path: the file; one that exists is replaced only when the new one is complete.
            extra: anything json.dumps takes, kept with the session.

        Raises:
            SessionError: the file could not be written; a file that was there before is intact.
        """
        return session.save(self, path, extra)

    def load_session(self, path: PathLike) -> Any:
        """Continues a saved conversation: only tokens after it will be evaluated. Returns what `extra` was.

        Raises:
            SessionError: the file is not a session of this model with these cache options, or is damaged. The
                conversation in memory is as it was.
        """
        return session.load(self, path)

    def save_state(self) -> Any:
        """See `llama_cpp.Llama.save_state`."""
        state = super().save_state()
        if self._cache is not None:
            state.input_ids = state.input_ids[: state.n_tokens].copy()
        return state

    def load_state(self, state: Any) -> None:
        """See `llama_cpp.Llama.load_state`. If it fails, the conversation is empty."""
        if self._cache is None:
            super().load_state(state)
            return
        self._calls.before_cut(0)
        ids = self.input_ids
        try:
            super().load_state(state)
            ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        except BaseException:
            self.reset()
            raise
        finally:
            self.input_ids = ids

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self.kv_options.keywords(), "kv_cancel": self._calls.keep}

    def close(self) -> None:
        """Frees the model."""
        if "_stack" in self.__dict__:
            super().close()
