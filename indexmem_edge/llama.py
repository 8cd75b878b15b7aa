"""`Llama`: llama_cpp.Llama with a KV cache of a fixed size."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from typing import Any, Callable, Generator, Iterator, Optional, Sequence, Union

import numpy as np
import numpy.typing as npt

from ._vendor.llama_cpp.llama_speculative import LlamaDraftModel
from ._vendor.llama_cpp.llama_tokenizer import LlamaTokenizer
from .errors import BudgetError, RequestError, SessionError, SidecarError
from .files.modelfile import check_model_file, fingerprint_aside
from .native import api
from .native.logs import collected_errors, quiet
from .options import SIDECAR_OFF, check_checkpoints, described, require_known, signature_of, split_keywords
from .runtime import answers, cache, inside, requests, unbounded
from .runtime.access import Access
from .runtime.align import align
from .runtime.cancel import Calls, one_call
from .runtime.checkpoints import NO_BACKGROUND, Checkpoint
from .runtime.creation import base_keywords, explain, lacks_template, options_for, require_lora
from .runtime.drafts import Drafts
from .runtime.formats import use_format
from .runtime.grammar import check_grammar
from .runtime.inside import Inside
from .runtime.kept_logits import KeptLogits
from .runtime.notices import SIDECAR, Hook, Notices
from .runtime.prompts import ChatPrompts
from .runtime.signature import like, made_with
from .runtime.spelled import Spelled
from .runtime.tools import Tools
from .sessions import file as sessionfile, session
from .stats import KVStats

_TEMPLATE_ARGUMENTS = ("functions", "function_call", "tools", "tool_choice")

PathLike = Union[str, "os.PathLike[str]"]
Progress = Callable[[int, int], None]


class Llama(inside.Base):
    """A llama.cpp model whose KV memory has the size you choose, however long the text gets.

    Takes everything that `llama_cpp.Llama` takes, has the same methods, and adds:

    Args:
        model_path: the GGUF file.
{options}
        kv_cancel: copy the KV state before a call evicts or renews positions, so that `cancel` can bring it back. That
            takes as much memory as the state, from the first such call on. False: after a cancel the history is
            evaluated again instead.
        kv_checkpoints: bytes that copies of the KV state may take, which prompts go on from that the cached text does not lead
            to: another answer, an edit, a branch, another conversation. None: 256 MiB, or, where the state is large, three of
            it. 0: none; such prompts are evaluated again.
        kv_warn: called with a `CacheWarning` when text is dropped for the first time in a conversation, when text is
            evaluated again, and when a prompt is not what it seems. None: `warnings.warn`, once for each kind.

    Options of the cache are refused without a budget. Threads are as many as the process may use, unless n_threads says
    otherwise. With a budget, `n_ubatch` follows the budget (512 from 1024 on), so that the working room does not outweigh
    it, `n_ctx` is only the largest logical length (default 2 Mi tokens) and costs no KV memory, `flash_attn` is on, and
    `embedding=True` is refused. With `logits_all=True` the logits of `n_ctx` tokens are kept, so `n_ctx`
    then defaults to the length that the model was trained for. `type_k` and `type_v` can be names, such as "q8_0".

    What is in messages is text, even where it is spelled like a control token; a prompt that is given as text to
    `create_completion` is raw, as in llama_cpp.

    What a prompt shares with the cached text, or with that of a checkpoint, is not evaluated again. When the caller edits
    older text, everything is evaluated again, and `kv_stats()` says so.

    Threads may share one: a call waits until that of another thread has ended, a stream only holds it while its next item
    is computed. Answers differ from one to the next and from process to process, unless `seed` is given. `close()`, or the
    end of `with Llama(...) as llm:`, frees it.

    Raises:
        BudgetError, PolicyError: an option is impossible; the message names the minimum or lists the choices.
        SidecarError: the sidecar is damaged, or for another model.
        LatentMemoryError: there is no such memory, or not without trained weights.
        ModelFileError, ModelNotSupported, ContextError: the model cannot be loaded, or not with a budget.
        LibraryError: there is no CPU backend for this machine, or not the one that INDEXMEM_CPU_VARIANT names.
    """

    @like(made_with)
    def __init__(
        self,
        model_path: PathLike,
        *,
        kv_cancel: bool = True,
        kv_checkpoints: Optional[int] = None,
        kv_warn: Optional[Hook] = None,
        **kwargs: Any,
    ) -> None:
        asked, others = split_keywords(kwargs)
        require_known(others, inside.MAKE.parameters)
        path = check_model_file(model_path)
        options, found = options_for(path, asked)
        draft_model = others.pop("draft_model", None)  # llama_cpp would keep the logits of a whole text for it
        base = {**base_keywords(others, options), "seed": _seed(others.get("seed"))}
        self.kv_options = options
        self._cache: Optional[cache.BoundedCache] = None
        self._turn = cache.Turn()
        self._notices = Notices(kv_warn)
        self._access = Access()
        self._inside = Inside(self)
        self._kept = KeptLogits(self._inside)
        self._calls = Calls(self._inside, self._access, self._turn, self._kept, kv_cancel)
        self._aligning = False
        self._checkpoint_bytes = check_checkpoints(kv_checkpoints, options.bounded)
        self._watchers: dict[object, Progress] = {}  # the one that came last is told
        self._watching = threading.Lock()
        self._draws = not _is_seed(others.get("seed"))  # a seed for each call
        self._seeded_call = False  # a completion has set one for itself
        self._one_sequence_per_token = options.bounded
        self._drafts: Optional[Drafts] = None
        self._spelled = Spelled(self._inside)
        refused: Optional[SidecarError] = None
        loaded = fingerprint_aside(path)
        with collected_errors(base.get("verbose", True)) as log:
            try:
                api.require_cpu()
                options.request()
                super().__init__(path, **base)
                require_lora(self._inside, log)
                self.draft_model = draft_model
            except (ValueError, RuntimeError, MemoryError) as error:
                explained = explain(self._inside, options.bounded, error, path, log)
                self.close()
                if explained is None:
                    raise
                if not (isinstance(explained, SidecarError) and found.path):
                    raise explained from error
                refused = explained  # nobody asked for that one
            finally:
                if options.bounded:
                    api.withdraw_request()
        if refused is not None:
            Llama.__init__(self, path, kv_cancel=kv_cancel, kv_checkpoints=kv_checkpoints, kv_warn=kv_warn, **{**kwargs, "indexmem": SIDECAR_OFF})
            self._notices.tell(SIDECAR, f"the sidecar {found.path} is not used: {refused}")
            return
        self._inside.seed = base["seed"]  # llama_cpp takes 0 for none
        if options.bounded:
            self.context_params.n_ctx = base["n_ctx"]
            self._cache = cache.BoundedCache(self._inside, options, self._turn, self._kept, self._calls, self._notices, kv_checkpoints)
        else:
            unbounded.make_room(self._inside)
        self.sidecar_where = found.where  # "" if it was named, or there is none
        self._prompts = ChatPrompts(self._inside, options, self._notices, lacks_template(self._inside, base))
        self._tools = Tools(self._inside, self._prompts)
        self._calls.attach(self._cache)
        self._talk = session.Talk(self._inside, options, self._cache, self._turn, self._kept, self._notices, loaded)
        for problem in found.problems:
            self._notices.tell(SIDECAR, problem)

    # evaluation and generation

    @property
    def draft_model(self) -> Optional[LlamaDraftModel]:
        """What guesses the next tokens, or None. Another one can be assigned between two calls.

        While a stream waits for its next item, `n_tokens` may count guesses that are not accepted yet; `kv_stats()` does not.

        Raises:
            RequestError: it is no draft model.
            ModelNotSupported: the model has recurrent layers, which cannot take a wrong draft back.
        """
        return self._drafts

    @draft_model.setter
    def draft_model(self, model: Optional[LlamaDraftModel]) -> None:
        model = model.model if isinstance(model, Drafts) else model
        self._drafts = None if model is None else Drafts(model, self._inside, self._kept, self.kv_options.bounded)
        self._calls.drafts = self._drafts

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens after those already evaluated.

        Raises:
            BudgetExhausted: the policy is `full` and there is no room. The cache holds what it held before.
            DecodeError: evaluation failed. The cache holds the tokens evaluated before the failure.
        """
        if len(tokens) > 1:
            self._calls.run(lambda: self._evaluate(tokens), self)
            return
        with self._access.alone():  # by itself as short as a call can be, and not worth the way back
            self._calls.overtake()
            self._evaluate(tokens)

    def _evaluate(self, tokens: Sequence[int]) -> None:
        if self._turn.evaluated < 0:
            self._turn.evaluated = len(tokens)
        drafts = self._drafts.handed_out() if self._drafts is not None else 0
        if self._cache is not None:
            self._cache.settle()
            self._cache.read(tokens, every=drafts > 0)
        else:
            self._evaluate_unbounded(tokens, drafts > 0)
        if self._drafts is not None:
            self._drafts.evaluated(drafts)
        self._look()

    def _evaluate_unbounded(self, tokens: Sequence[int], every: bool) -> None:
        if len(tokens) > 0:
            self._kept.forget()
        if every and not self._inside.logits_all:
            self._calls.check()
            try:
                with quiet(self.verbose):
                    unbounded.evaluate_drafts(self._inside, tokens)
            finally:
                self._calls.check()
            return
        for start in range(0, max(len(tokens), 1), self.n_batch):
            self._calls.check()
            try:
                with quiet(self.verbose):
                    super().eval(tokens[start : start + self.n_batch])
            except RuntimeError:
                self._calls.check()
                raise
            self._calls.evaluated()

    def _look(self) -> None:
        self._notices.look(self._inside, self.kv_options, self._stats)

    @one_call
    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        """See `llama_cpp.Llama.generate`. What the cache already holds of `tokens` is not evaluated again.

        Raises:
            GenerationSuperseded: another call has been made since the last token, and the conversation is another.
            GrammarError: the grammar has a mistake.
        """
        prompt = requests.plain_tokens(tokens)
        call = inside.GENERATE.bind(self, prompt, *args, **kwargs)
        reset = call.arguments.get("reset", True)
        if not prompt and (reset or self.n_tokens == 0):
            raise RequestError("the prompt is empty, and there is nothing to go on from: give it at least one token")
        return self._generated(prompt, call, reset)

    def set_seed(self, seed: int) -> None:
        """See `llama_cpp.Llama.set_seed`: from now on, draws follow from it."""
        super().set_seed(seed)
        if not isinstance(seed, _CallSeed):
            self._draws = False
        elif self._draws:
            self._seeded_call = True

    def _draw_seed(self) -> None:
        """Before tokens are drawn with random numbers of their own."""
        if self._draws and not self._seeded_call:
            self._inside.seed = _seed(None)
        self._seeded_call = False

    def _generated(self, prompt: list[int], call: Any, reset: bool) -> Generator[int, Any, None]:
        self._draw_seed()
        if self._cache is not None and reset:
            call.arguments["tokens"] = self._cache.reuse(prompt)
            call.arguments["reset"] = False
        else:
            self._turn.begin(len(prompt), -1)
        tokens, before, own = super().generate(*call.args[1:], **call.kwargs), self._inside.stream_sampler, None
        sent = None
        try:
            while True:
                try:
                    token = tokens.send(sent)
                except StopIteration:
                    return
                finally:
                    if own is None and self._inside.stream_sampler is not before:
                        own = self._inside.stream_sampler
                if self._drafts is not None:
                    self._drafts.sampled()
                sent = yield token
        finally:
            tokens.close()
            if own is not None:
                inside.end_stream(self, own)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """See `llama_cpp.Llama.sample`: a token after the last one. Where the logits are gone, they are computed."""
        with self._access.alone():
            try:
                return self._sample(*args, **kwargs)
            finally:
                self._inside.raise_of_processors()

    def _sample(self, *args: Any, **kwargs: Any) -> int:
        if self._inside.fresh and self._calls.in_progress and not self._kept:  # once for each token of an answer
            return int(super().sample(*args, **kwargs))
        given = inside.SAMPLE.bind(self, *args, **kwargs).arguments
        options = {name: value for name, value in given.items() if name not in ("self", "idx")}
        if self.n_tokens == 0:
            raise RequestError("there is nothing to sample from: eval() a prompt first")
        if not self._inside.fresh:
            self._refresh()
        if self._calls.in_progress:
            return self._sampled(given.get("idx"), options)
        self._draw_seed()
        with self._inside.no_stream():
            return self._sampled(given.get("idx"), options)

    def _sampled(self, idx: Optional[int], options: dict[str, Any]) -> int:
        if self._kept and idx in (None, self.n_tokens - 1):
            return self._kept.sample(self._inside.sampler(**options))
        return int(super().sample(**options, idx=idx))

    def _refresh(self) -> None:
        """Evaluates the last token again, or, where that cannot be taken out by itself, what has to be."""
        if self._cache is not None:
            self._cache.refresh()
        else:
            history = self._inside.history.tolist()
            unbounded.rewind(self._inside, len(history) - 1)
            self._evaluate(history[self.n_tokens :])

    @one_call
    def prefill(self, tokens: Sequence[int], progress: Optional[Progress] = None) -> int:
        """Evaluates a prompt without generating; returns how many of its tokens had to be evaluated.

        Args:
            tokens: the whole prompt; what is already cached of it is not evaluated again.
            progress: called with (tokens evaluated, tokens to evaluate) after every batch.
        """
        prompt = requests.plain_tokens(tokens)
        if self._cache is not None:
            rest = self._cache.reuse(prompt)
        else:
            rest = unbounded.reuse(self._inside, self._turn, prompt)
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
        self._access.require_open()
        mine = object()
        with self._watching:
            self._watchers[mine] = self._calls.watcher = progress
        try:
            yield
        finally:  # which may be in another order than they came, in several threads
            with self._watching:
                del self._watchers[mine]
                self._calls.watcher = next(reversed(self._watchers.values()), None)

    def cancel(self) -> bool:
        """Stops the call in progress, from any thread; returns whether there was one.

        The call then raises `Cancelled`, and the conversation is as it was before it: cached text, history, counts, pin.
        Without a budget, cached text that the call's prompt had replaced is evaluated again when it is asked for.
        A call is an `eval`, `generate`, `prefill`, `prefill_chat`, `create_completion` or `create_chat_completion`. One
        that streams lasts until its iterator ends, is closed, or another call is made; its next item raises `Cancelled`.
        Calls that wait for the one in progress go on.
        An `eval` of one token by itself ends; a cancel without a call in progress is forgotten. On the CPU a call stops
        after the node of the graph that it is at, on a GPU after a batch.
        """
        return self._calls.cancel()

    def reset(self) -> None:
        """Forgets the conversation."""
        with self._access.alone():
            self._calls.overtake()
            super().reset()
            if not self._calls.in_progress:  # what a call resets belongs to its own prompt
                self._turn.begin()
            self._notices.start_over()
            self._kept.forget()
            self._kept.all_known = True
            if self._cache is not None:
                self._cache.background = NO_BACKGROUND
                self._cache.clear()

    # completions

    @like(inside.Base.create_completion)
    @one_call
    def create_completion(self, prompt: Union[str, list[int]], *args: Any, **kwargs: Any) -> Any:
        """See `llama_cpp.Llama.create_completion`.

        Args:
            prompt: text, or token ids.
            max_tokens: 0 evaluates the prompt and generates nothing; None or -1: no limit but n_ctx.
            echo: the answer begins with the prompt; with `logprobs` its tokens have the log-probabilities that they had
                after those before them.

        Raises:
            RequestError: the prompt is empty, or not text.
            GrammarError: the grammar has a mistake.
        """
        call = inside.COMPLETE.bind(self, requests.plain_prompt(prompt), *args, **kwargs)
        given = call.arguments
        requests.check_completion(given, self._inside.adds_bos)
        requests.make_stop_plain(given)
        if self._draws:
            given["seed"] = _CallSeed(_seed(None) if given.get("seed") is None else given["seed"])
        if given.get("grammar") is not None:
            check_grammar(self._inside.vocab, *inside.grammar_text(given["grammar"]))
        plain_prompt = given["prompt"]
        if self._cache is not None:
            if self._aligning and isinstance(plain_prompt, list):
                given["prompt"] = self._align(plain_prompt)
            elif not self._aligning:
                self._cache.wanted_pin = 0
        reads = given.get("max_tokens") == 0
        if reads:
            given |= {"max_tokens": 1, "stopping_criteria": requests.ReadOnly()}
        elif self._cache is not None and len(self._cache.background.tokens):
            given["max_tokens"] = self._room_behind_background(given["prompt"], given.get("max_tokens"))
        if given.get("stream"):
            return super().create_completion(*call.args[1:], **call.kwargs)
        echo, given["echo"] = given.get("echo", False), False
        if echo and given.get("logprobs") is not None and not self._kept.all_known:
            self.reset()  # those of the prompt that are not known have to be computed
        answer = answers.plain(super().create_completion(*call.args[1:], **call.kwargs))
        if reads:
            answer["usage"] |= {"completion_tokens": 0, "total_tokens": answer["usage"]["prompt_tokens"]}
        if echo:
            answer["choices"] = [self._echoed(answer["choices"][0], given, answer["usage"]["prompt_tokens"])]
        return answer

    def _room_behind_background(self, prompt: Union[str, list[int]], asked: Optional[int]) -> Optional[int]:
        """`max_tokens` for a prompt: llama_cpp counts it alone, so that an answer up to n_ctx would not end but fail."""
        assert self._cache is not None
        tokens = prompt if isinstance(prompt, list) else self.tokenize(prompt.encode("utf-8"), special=True)
        room = self.n_ctx() - len(self._cache.background.tokens) - len(tokens)
        if room < 1:
            return asked  # reading it says why it does not fit
        return room if asked is None or asked < 1 else min(asked, room)

    def _echoed(self, choice: dict[str, Any], given: dict[str, Any], n: int) -> dict[str, Any]:
        tokens, prompt = self._own_history[:n].tolist(), given["prompt"]
        first = 1 if tokens[:1] == [self.token_bos()] else 0  # which is no text
        text = prompt if isinstance(prompt, str) else self.detokenize(prompt).decode("utf-8", "ignore")
        return answers.echoed(
            choice, tokens[first:], self.scores[first:n], lambda token: self.detokenize([token]).decode("utf-8", "ignore"),
            text, len(prompt), given.get("logprobs"),
        )  # fmt: skip

    def embed(self, input: Union[str, list[str]], normalize: bool = False, truncate: bool = False, return_count: bool = False) -> Any:
        """See `llama_cpp.Llama.embed`. A text is not cut unless `truncate` says so.

        Raises:
            RequestError: a text is longer than a batch, which is as much as is embedded at once, or has no token.
        """
        with self._access.alone():
            self._calls.overtake()
            if not self.context_params.embeddings:
                return super().embed(input, normalize, truncate, return_count)  # which says so
            if not isinstance(input, str) and not len(input):
                return ([], 0) if return_count else []
            for text in [input] if isinstance(input, str) else input:
                if (n := len(self.tokenize(text.encode("utf-8")))) == 0:
                    raise RequestError("there is no text to embed: leave out what is empty")
                if n > self.n_batch and not truncate:
                    raise RequestError(
                        f"a text of {n:,} tokens cannot be embedded at once, with n_batch {self.n_batch:,}: give Llama a larger n_batch and n_ubatch, "
                        "embed it in parts, or say truncate=True"
                    )
            try:
                return super().embed(input, normalize, truncate, return_count)
            except BaseException:
                self.reset()  # of the conversation the entries are gone
                raise

    # chat

    @like(inside.Base.create_chat_completion)
    @one_call
    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """See `llama_cpp.Llama.create_chat_completion`.

        The cached text is reused even where the tokenizer would now cut the model's own answers differently. Contents may
        be lists of text parts, and `response_format` OpenAI's `json_schema`.

        Raises:
            BudgetError: with kv_pin="auto", the system prompt is too long for the budget.
            RequestError: messages, tools or response_format cannot be read by the chat format.
            GrammarError: there is a mistake in a grammar or a schema.
        """
        call = inside.CHAT.bind(self, messages, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        requests.make_chat_plain(given, parts=self.chat_handler is not None)
        self._tools.warn(given, stacklevel=6)  # in the line of the application, which `one_call` is between
        arguments = {name: value for name, value in given.items() if name != "self"}
        template = {name: given[name] for name in _TEMPLATE_ARGUMENTS}
        self._prompts.check(given["messages"], **template)

        def finish(prompt: Any, **sampling: Any) -> Any:
            if isinstance(prompt, list):
                self._pin_system(given["messages"], prompt, template)
            return self.create_completion(prompt, **sampling)

        self._aligning = True
        try:
            return self._prompts.run(finish=finish, **arguments)
        finally:
            self._aligning = False

    @one_call
    def prefill_chat(self, messages: list[dict[str, Any]], progress: Optional[Progress] = None) -> int:
        """Evaluates a conversation whose last message is still open, and returns how many tokens that took.

        For reading a long document now and asking about it later: paragraphs that the caller then adds to the last
        message cost only themselves.
        """
        messages = requests.plain_messages(messages, parts=False)
        if not messages:
            raise RequestError("there are no messages to read: the last one of them is the one that is still open")
        prompt = self._prompts.open_prefix(messages)
        if prompt is None:
            return 0
        if self._cache is not None:
            self._pin_system(messages, prompt, {})
            prompt = self._align(prompt)
        return self.prefill(prompt, progress)

    def rehearse(self, system: Optional[str] = None) -> None:
        """Says what would be wrong with a chat that has not begun: no chat template, no room for the system prompt, ...

        Raises:
            BudgetError: with kv_pin="auto", the system prompt is too long for the budget.
        """
        with self._access.alone():
            self._prompts.rehearse(system)

    def use_chat_format(self, name_or_file: str) -> None:
        """Has messages written in another format: one that llama_cpp knows by name, or the Jinja template in a file.

        Raises:
            ModelFileError: it is neither; the message lists the names.
        """
        with self._access.alone():
            use_format(self._inside, name_or_file)

    def _pin_system(self, messages: Any, prompt: list[int], template: dict[str, Any]) -> None:
        if self._cache is None or not self.kv_options.auto_pin:
            return
        pin = self._prompts.system_prefix(messages, prompt, **template)
        self.kv_options.require_room(pin, "the system prompt of")
        self._cache.wanted_pin = pin

    def _align(self, prompt: list[int]) -> list[int]:
        """Where the text is the same. A control token is not: what a person wrote can be spelled like one."""
        control = self._prompts.control.spelled
        return align(
            self._own_history,
            prompt,
            piece=lambda token: control.get(token) or self._spelled.piece(token, True),
            tokenize=lambda text: self.tokenize(text, add_bos=False, special=False),
        )

    @property
    def _own_history(self) -> npt.NDArray[np.intc]:
        """What comes after the background, which is no part of any prompt."""
        history = self._inside.history
        return history if self._cache is None else history[len(self._cache.background.tokens) :]

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """See `llama_cpp.Llama.tokenize`."""
        with self._access.beside():
            return super().tokenize(text, add_bos, special)

    def detokenize(self, tokens: list[int], prev_tokens: Optional[list[int]] = None, special: bool = False) -> bytes:
        """See `llama_cpp.Llama.detokenize`; the same bytes, fast enough for very long answers."""
        with self._access.beside():
            if self._cache is None or type(self.tokenizer_) is not LlamaTokenizer:
                return super().detokenize(tokens, prev_tokens=prev_tokens, special=special)
            text = self._spelled.of(tokens, special)
        leading_space = len(tokens) > 0 and tokens[0] == self.token_bos() and text[:1] == b" "
        return text[1:] if leading_space else text

    # what the cache holds

    def kv_stats(self) -> KVStats:
        """What the cache has seen, kept, dropped and evaluated again, and what it costs."""
        with self._access.between():
            return self._stats()

    def _stats(self) -> KVStats:
        return self._cache.stats() if self._cache is not None else unbounded.stats(self._inside, self._turn)

    @property
    def kv_warn(self) -> Optional[Hook]:
        """What is called with warnings about the cache; None: `warnings.warn`, once for each kind."""
        return self._notices.hook

    @kv_warn.setter
    def kv_warn(self, hook: Optional[Hook]) -> None:
        self._notices.hook = hook

    def kv_snapshot(self, rotary: bool = False) -> dict[int, list[npt.NDArray[np.int32]]]:
        """Positions in the text that are held now: for each layer with a cache, one ascending array per KV head.

        Args:
            rotary: instead, for the same entries in the same order, the positions that their keys are rotated by. They
                are equal until positions are renewed (`kv_stats().rebases`), and stay below `kv_stats().span`.
        """
        with self._access.between():
            return self._bounded("kv_snapshot").snapshot(rotary)

    def set_pin(self, n: int) -> None:
        """Pins the first `n` tokens. Possible until something has been evicted; later only to make the pin shorter.

        With kv_pin="auto" the next chat completion chooses again.
        """
        with self._access.alone():
            self._bounded("set_pin").set_pin(n)

    def _bounded(self, what: str) -> cache.BoundedCache:
        if self._cache is None:
            raise BudgetError(f"{what} needs a bounded KV cache: give Llama a kv_budget")
        return self._cache

    # going back

    @one_call
    def checkpoint(self) -> Checkpoint:
        """The conversation as it is now, in memory: `restore` comes back to it, as often as wanted.

        A few are kept without being asked for (`kv_checkpoints`). One has a fixed size, however long the text.

        Raises:
            BudgetError: there is no budget: `save_state` is for that.
            ContextError: nothing has been read yet, or there is no memory for it.
        """
        return self._bounded("checkpoint").checkpoint()

    @one_call
    def restore(self, checkpoint: Checkpoint) -> None:
        """Makes the conversation what it was when the checkpoint was made.

        Raises:
            BudgetError: there is no budget.
            ContextError: it is of another model, or of a cache with other options. The conversation is as it was.
        """
        self._bounded("restore").restore(checkpoint)
        self._turn.begin(len(checkpoint), 0)

    # sessions

    def save_session(
        self, path: PathLike, extra: Any = None, *, checkpoints: Union[bool, int] = False, copied: Optional[Callable[[], None]] = None
    ) -> int:
        """Writes the conversation and its KV state to a file, atomically; returns the file's size in bytes.

        The KV state is bounded by the budget; the token history adds 4 bytes per token seen. Other threads wait while the state
        is copied, and not while the file is written. A background goes along, with its state.

        Args:
            path: the file; one that exists is replaced only when the new one is complete.
            extra: anything json.dumps takes, kept with the session.
            checkpoints: whether the copies of the state go along that are kept for edits, other answers and other conversations
                (`kv_checkpoints`), each of which may be as large as the state. A number: at most so many bytes of them, those that
                were of use last.
            copied: called once the state has been copied, and before the file is written. What happens to the conversation from
                then on is not in the file.

        Raises:
            SessionError: the file could not be written; a file that was there before is intact.
        """
        with self._access.alone():
            self._calls.take_back_drafts()
            data = session.taken(self._talk, extra, checkpoints)
        if copied is not None:
            copied()
        return sessionfile.write(path, data)

    def load_session(self, path: PathLike, *, as_background: bool = False, again: bool = False) -> Any:
        """Continues a saved conversation: only tokens after it will be evaluated. Returns what `extra` was.

        It may have been saved with another budget, window, policy, pin or memory. A larger budget keeps all that the file has; for
        a smaller one the policy of this `Llama` evicts what is too much, at once. `kv_warn` is told what is different. What
        this one needs and the file does not have, such as the scores of an indexer, is a reason to refuse it. Of a file that
        was saved by an older release the last token may have to be evaluated again.

        Args:
            as_background: begin a new conversation instead, which knows what the saved one has kept: its entries and its memory stay
                in the cache, and every prompt comes after them, until `reset`. They count as tokens seen, and are evicted like
                others; the system prompt of the new conversation is not pinned.
            again: evaluate the text of the file instead of loading its state. That takes as long as reading it did, can be cancelled,
                and is possible whatever the options of both are, with or without a budget; but for logits_all, if the file has a background.

        Raises:
            SessionError: the file is not a session of this model, does not fit these cache options, or is damaged. The
                conversation in memory is as it was.
        """
        if as_background and (self._cache is None or self._inside.logits_all):
            why = "a kv_budget, which bounds what is kept of it" if self._cache is None else "logits_all to be left out"
            raise SessionError(f"a session as a background needs {why}")
        if again:
            return self._read_session(path, as_background)
        with self._access.alone():
            self._calls.overtake()
            data = session.load(self._talk, path)
            if as_background and self._cache is not None:
                self._cache.make_background()
            self._notices.start_over(self._stats().rebases)
            session.tell_changes(self._talk, path, data.header)
            return data.extra

    @one_call
    def _read_session(self, path: PathLike, as_background: bool) -> Any:
        data = session.read(self._talk, path)
        if self._cache is not None:
            before, self._cache.background = self._cache.background, NO_BACKGROUND
            pin_before = self._cache.wanted_pin
            self._cache.wanted_pin = session.pinned_here(self._talk, path, data.header)
        try:
            self.prefill(data.tokens.tolist())
        except BaseException:
            if self._cache is not None:
                self._cache.background, self._cache.wanted_pin = before, pin_before
            raise
        if self._cache is not None:
            self._cache.make_background(None if as_background else session.background(data.header))
        return data.extra

    def save_state(self) -> Any:
        """See `llama_cpp.Llama.save_state`."""
        with self._access.alone():
            self._calls.take_back_drafts()
            with self._inside.own_scores():  # not those that are shown beside drafts
                state = super().save_state()
            state.input_ids = state.input_ids[: state.n_tokens].copy()
            state.__dict__["logits"] = self._kept.now()  # where llama_cpp leaves it alone, and pickles it
            return state

    def load_state(self, state: Any) -> None:
        """See `llama_cpp.Llama.load_state`. If it fails, the conversation is empty."""
        with self._access.alone():
            self._calls.overtake()
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
            self._kept.restore(state.__dict__.get("logits"))
            self._kept.all_known = True
            if self._cache is not None:
                self._cache.background = NO_BACKGROUND

    def __getstate__(self) -> dict[str, Any]:
        draft_model = self._drafts.model if self._drafts is not None else None
        seed = inside.DEFAULT_SEED if self._draws else self._inside.seed
        return {**super().__getstate__(), "seed": seed, "draft_model": draft_model, **self.kv_options.keywords(), "kv_cancel": self._calls.keep, "kv_checkpoints": self._checkpoint_bytes}

    # the end

    def close(self) -> None:
        """Frees the model, when the call in progress has ended; every method but this one raises `ModelClosed` from then on."""
        if not inside.opened(self):
            return
        if self._access.forked:
            inside.leave(self)
        else:
            self._calls.close(self._free)

    def _free(self) -> None:
        super().close()
        inside.shut(self)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _beside(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The method of llama_cpp, which asks the model something small: it is not freed meanwhile."""

    @functools.wraps(method)
    def ask(self: Llama) -> Any:
        with self._access.beside():
            return method(self)

    return ask


for _name in ("n_ctx", "n_embd", "n_vocab", "token_bos", "token_eos", "token_nl", "pooling_type"):
    setattr(Llama, _name, _beside(getattr(inside.Base, _name)))


class _CallSeed(int):
    """One that a completion sets for itself, and for nothing after it."""


def _is_seed(given: Optional[int]) -> bool:
    """Whether an application has chosen one."""
    return given is not None and given % (1 << 32) != inside.DEFAULT_SEED


def _seed(given: Optional[int]) -> int:
    """Of a `Llama`: another for every one that is asked for none."""
    if given is not None and _is_seed(given):
        return given
    return int.from_bytes(os.urandom(4), "little") % inside.DEFAULT_SEED


Llama.__doc__ = str(Llama.__doc__).replace("{options}", described())
Llama.__init__.__signature__ = signature_of(Llama.__init__, inside.Base.__init__)  # type: ignore[attr-defined]
