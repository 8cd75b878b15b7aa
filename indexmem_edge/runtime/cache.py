"""Keeps the tokens that Python knows and the entries that the native cache holds in step."""

from __future__ import annotations

import functools
import operator
import os
import weakref
from dataclasses import dataclass
from typing import Any, Optional, Protocol, Sequence

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import BudgetExhausted, ContextError, DecodeError
from ..native import api
from ..native.logs import quiet
from ..options import CacheOptions
from ..stats import KVStats, layer_budgets, trained_length_warning
from .align import common_prefix
from .checkpoints import NO_BACKGROUND, Background, Checkpoint, Checkpoints, default_limit
from .choice import INDEXER_POLICY, sidecar_kinds
from .inside import Inside
from .kept_logits import KeptLogits, Logits
from .notices import REEVALUATED, Notices, evaluated_again

_ANY = 1 << 62  # tokens: no limit
_NEAR_END = 32  # tokens of a prompt: another answer, or the next prompt, often departs where its last few stand
_LARGER = "give Llama a larger n_ctx (with a kv_budget it costs no KV memory)"
_WORTH_A_COPY = 8  # tokens: less is evaluated as fast
_INTERRUPTED = "evaluating was interrupted, and what was cached could not be used any more"
_ABORTED = 2  # llama_decode: the callback that it asks after every node said so


@dataclass
class Turn:
    """The last prompt: its length, and how much of it was evaluated (-1: not known yet)."""

    prompt: int = 0
    evaluated: int = 0

    def begin(self, prompt: int = 0, evaluated: int = 0) -> None:
        """There is another."""
        self.prompt, self.evaluated = prompt, evaluated


class Watch(Protocol):
    """Who wants to know what happens to a cache, before it happens: the call in progress."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps."""
        ...

    @property
    def device_nbytes(self) -> int:
        """Those of them in memory of devices."""
        ...

    def check(self) -> None:
        """Between two batches; raises if there is to be no other."""
        ...

    def before_growth(self, n: int) -> None:
        """`n` tokens are about to be evaluated."""
        ...

    def evaluated(self) -> None:
        """They have been."""
        ...

    def before_cut(self, start: int) -> None:
        """The history from `start` on is about to be replaced."""
        ...


class BoundedCache:
    """The bounded cache of one `Llama`, sequence 0.

    Invariant between calls: the native cache has seen exactly `llm.input_ids[:llm.n_tokens]`. Where a caller or an
    interrupt breaks it, `settle` restores it.
    """

    def __init__(
        self, llm: Inside, options: CacheOptions, turn: Turn, kept: KeptLogits, watch: Watch, notices: Notices,
        checkpoint_bytes: Optional[int] = None,
    ) -> None:  # fmt: skip
        if not api.is_bounded(llm.ctx):
            raise ContextError("the library made an unbounded KV cache although a budget was requested")
        self._llm = llm
        self._options = options
        self._turn = turn
        self._kept = kept
        self._notices = notices
        self._watch: Watch = weakref.proxy(watch)  # which knows this cache
        self._indexer = sidecar_kinds(options.sidecar).indexer if options.policy == INDEXER_POLICY else ""
        self._limit = len(llm.scores) if llm.logits_all else llm.n_ctx
        self.reevaluations: tuple[int, Optional[str]] = (0, None)  # tokens so far, and why the last time
        self.wanted_pin: Optional[int] = None
        self._prompt: npt.NDArray[np.intc] = np.empty(0, dtype=np.intc)  # the last, and the logits after it
        self._after_prompt: Logits = None
        self._exact_until: Optional[int] = None  # tokens: so far what follows it can be taken out; None: never mind
        kinds = functools.reduce(operator.or_, api.model_layers(llm.model))
        self.mixed = bool(kinds & (api.LAYER_WINDOW | api.LAYER_RECURRENT))  # not all that is kept can be taken out
        self._no_way_back = (
            "and recurrent layers have no way back"
            if kinds & api.LAYER_RECURRENT
            else "from where entries had already been evicted, got new positions, or left a window"
            if kinds & api.LAYER_WINDOW
            else "from where entries had already been evicted, or got new positions"
        )
        self.checkpoints = Checkpoints(self._limit_of_checkpoints(checkpoint_bytes))
        self._background = NO_BACKGROUND
        llm.tokens = np.empty(llm.n_ctx, dtype=np.intc)  # 4 bytes per token seen: untouched pages cost nothing
        if not llm.logits_all:
            llm.scores = np.zeros((1, llm.n_vocab), dtype=np.single)

    @property
    def never_evicts(self) -> bool:
        """Whether the policy fails instead."""
        return self._options.policy == "full"

    def length(self) -> int:
        """Logical length according to the native cache."""
        return int(llama_lib.llama_memory_seq_pos_max(self._llm.memory, 0)) + 1

    def clear(self) -> None:
        """Empties the native cache; a background has to be read again, too."""
        self._watch.before_cut(0)
        self._exact_until = None
        self._llm.n_tokens = 0
        self._llm.fresh = False
        llama_lib.llama_memory_clear(self._llm.memory, True)

    # what prompts come after

    @property
    def background(self) -> Background:
        """What every prompt comes after."""
        return self._background

    @background.setter
    def background(self, background: Background) -> None:
        self._background = background
        self.checkpoints.held = background.checkpoint

    def make_background(self, n: Optional[int] = None, restored: Sequence[Checkpoint] = ()) -> None:
        """The first `n` tokens of the conversation, or all of it, are what prompts come after from now on.

        Args:
            restored: checkpoints that are not kept yet, of which one may be after these tokens.
        """
        tokens = self._llm.history.copy() if n is None else self._llm.history[:n].copy()
        # It is held from now on: the memory of those that are kept is used again when they leave.
        at_end = self.checkpoints.take_out(tokens) or next((made for made in restored if np.array_equal(made.tokens, tokens)), None)
        if n is None and at_end is None:
            at_end = Checkpoint.of(self._llm.ctx, tokens, self._kept.now())
        self.background = Background(tokens, at_end) if len(tokens) else NO_BACKGROUND

    # going back

    def _limit_of_checkpoints(self, asked: Optional[int]) -> int:
        """Bytes that checkpoints may take."""
        if asked is not None:
            return asked
        native = api.get_stats(self._llm.ctx)
        return default_limit(int(native.kv_bytes + native.meta_bytes + native.window_bytes + native.recurrent_bytes))

    def _take_checkpoint(self) -> None:
        """Keeps the state as it is."""
        llm = self._llm
        if self.checkpoints.limit and self.length() == llm.n_tokens:
            self.checkpoints.take(llm.ctx, llm.history, self._kept.now())

    def _before(self, length: int) -> None:
        """Keeps the state, if there is no way back to it once the history is `length` tokens long."""
        if self.exact_until(api.get_stats(self._llm.ctx)) < length:
            self._take_checkpoint()

    def _rewind(self, target: int) -> int:
        """Takes the tokens from `target` on out of the cache. Where that cannot be done exactly, more have to go; returns
        how many.
        """
        llm = self._llm
        self._watch.before_cut(target)
        self._exact_until = None
        llm.fresh = False
        if target > 0 and llama_lib.llama_memory_seq_rm(llm.memory, 0, target, -1):
            llm.n_tokens = target
        elif not self._to_checkpoint(*self.checkpoints.best(llm.tokens[:target])):
            self.clear()
        return target - llm.n_tokens

    def _to_checkpoint(self, checkpoint: Optional[Checkpoint], n: int) -> bool:
        """Makes cache and history those after the first `n` tokens of a checkpoint; False: they are as they were."""
        llm = self._llm
        if checkpoint is None:
            return False
        self._watch.before_cut(common_prefix(llm.history, checkpoint.tokens[:n]))
        if not checkpoint.put(llm.ctx, n):
            self.checkpoints.drop(checkpoint)
            return False
        self.checkpoints.used(checkpoint)
        self._exact_until = None
        llm.tokens[:n] = checkpoint.tokens[:n]
        llm.n_tokens = n
        self._kept.restore(checkpoint.logits if n == len(checkpoint) else None)
        return True

    def checkpoint(self) -> Checkpoint:
        """The state as it is now, for the application to keep.

        Raises:
            ContextError: nothing has been read yet, or there is no memory for it.
        """
        self.settle()
        made = Checkpoint.of(self._llm.ctx, self._llm.history, self._kept.now())
        if made is None:
            raise ContextError("no checkpoint was made: nothing has been read yet, or there is no memory for it")
        made.background = self.background
        return made

    def restore(self, checkpoint: Checkpoint) -> None:
        """Makes the conversation that of a checkpoint.

        Raises:
            ContextError: it is of another model, of a cache with other options, or longer than n_ctx. Nothing has changed.
        """
        if len(checkpoint) > self._limit:
            raise ContextError(f"the checkpoint is of {len(checkpoint):,} tokens and n_ctx is {self._limit:,}: {_LARGER}")
        if not self._to_checkpoint(checkpoint, len(checkpoint)):
            raise ContextError("the checkpoint does not fit: it is of another model, or of a cache with other options")
        self.background = checkpoint.background or NO_BACKGROUND

    def lose(self, tokens: int, why: str) -> None:
        """Counts tokens of the history that have to be evaluated again."""
        self.reevaluations = self.reevaluations[0] + tokens, why
        self._notices.tell_later(REEVALUATED, evaluated_again(tokens, why))

    def settle(self) -> None:
        """Makes the native cache hold exactly the first `n_tokens` tokens of the history."""
        llm, length = self._llm, self.length()
        if length == llm.n_tokens:
            return
        history = llm.history.copy()
        if length < llm.n_tokens:
            llm.n_tokens = length
        elif lost := self._rewind(llm.n_tokens):
            self.lose(lost, f"the conversation was cut at token {len(history):,}, {self._no_way_back}")
        self.evaluate(history[llm.n_tokens :].tolist())

    def reuse(self, tokens: Sequence[int]) -> list[int]:
        """Readies the cache for a prompt and returns the tokens of it that remain to be evaluated. They come after the background.

        Raises:
            DecodeError: together they are longer than n_ctx. Nothing has changed.
        """
        self._require_length(len(self.background.tokens) + len(tokens))
        return self._ready(np.concatenate([self.background.tokens, np.array(tokens, dtype=np.intc)]))

    def refresh(self) -> None:
        """Evaluates as much of the history again as it takes to have the logits after it."""
        self.evaluate(self._ready(self._llm.history.copy()))

    def _ready(self, prompt: npt.NDArray[np.intc]) -> list[int]:
        llm, length = self._llm, self.length()
        self._exact_until = None
        known = min(llm.n_tokens, length)
        same = common_prefix(llm.tokens[:known], prompt)
        fresh = same == length and llm.fresh  # the logits of the prompt's last token are at hand
        asked_again = self._after_prompt is not None and same == len(prompt) and np.array_equal(self._prompt, prompt)
        keep = same if same < len(prompt) or fresh or asked_again else max(same - 1, 0)
        self._go_to(prompt, keep, length, f"the prompt departs from the cached text at token {same:,} of {known:,}")
        if asked_again and llm.n_tokens == same and not llm.fresh:
            self._kept.restore(self._after_prompt)
        self._apply_pin()
        rest: list[int] = prompt[llm.n_tokens :].tolist()
        self._prompt, self._after_prompt = prompt, None
        if not rest:
            self._end_of_prompt()
        self._turn.begin(len(prompt), len(rest))
        return rest

    def _go_to(self, prompt: npt.NDArray[np.intc], keep: int, length: int, departs: str) -> None:
        """Makes the cache that of the first `keep` tokens of a prompt, of the `length` that it holds, or of more of them."""
        llm = self._llm
        if length - keep > _WORTH_A_COPY and length - self.checkpoints.best(llm.history)[1] > _WORTH_A_COPY:
            self._take_checkpoint()  # of the conversation that this one replaces
        best, n = self.checkpoints.best(prompt)
        exact = keep == length or keep > llama_lib.llama_memory_seq_pos_min(llm.memory, 0)
        if n > (keep if exact else 0) and self._to_checkpoint(best, n):
            if n < keep:
                self.lose(keep - n, f"{departs}, {self._no_way_back}")
            return
        if keep == length:
            llm.n_tokens = keep
        elif lost := self._rewind(keep):
            self.lose(lost, f"{departs}, {self._no_way_back}")

    def _apply_pin(self) -> None:
        if not self._options.auto_pin or self.wanted_pin is None or len(self.background.tokens):
            return  # the first tokens are not the prompt's
        native = api.get_stats(self._llm.ctx)
        if native.pin != self.wanted_pin and native.n_evicted == 0:
            api.set_pin(self._llm.ctx, self.wanted_pin)

    def set_pin(self, n: int) -> None:
        """Pins the first `n` tokens."""
        self._options.require_room(n, "a pinned prefix of")
        api.set_pin(self._llm.ctx, n)

    def read(self, tokens: Sequence[int], every: bool = False) -> None:
        """Evaluates what the application gives, see `evaluate`. Where the last part of a prompt begins, and near its end, the state is kept, if
        what follows leaves no way back there.
        """
        llm, end = self._llm, self._turn.prompt
        if self.checkpoints.limit and llm.n_tokens + len(tokens) == end and len(tokens) > 1:
            self._before(end)
            first = max(len(tokens) - _NEAR_END, 0)
            if first:
                self.evaluate(tokens[:first])
                self._before(end)
            tokens = tokens[first:]
        self.evaluate(tokens, every)
        if self._after_prompt is None and llm.n_tokens == len(self._prompt) > 0:
            self._end_of_prompt()

    def _end_of_prompt(self) -> None:
        """Another answer may be wanted: the logits are kept, and, before the first eviction, the state."""
        self._after_prompt = self._kept.now()
        if self.checkpoints.limit:
            self._exact_until = self.exact_until(api.get_stats(self._llm.ctx))

    def exact_until(self, native: api.Stats) -> int:
        """The length until which nothing is evicted and no position renewed: what is appended can be taken out again."""
        if self.mixed:
            return int(native.n_seen)  # recurrent layers have no way back, and windows a short one
        room = _ANY if self.never_evicts else int(native.room)
        if native.span:
            room = min(room, int(native.span) - int(native.next_position))
        return int(native.n_seen) + room

    def evaluate(self, tokens: Sequence[int], every: bool = False) -> None:
        """Runs tokens through the model, batch by batch. `every`: the logits after each of a batch are wanted."""
        n_batch = self._llm.n_batch
        for start in range(0, len(tokens), n_batch):
            self._decode(tokens[start : start + n_batch], every)

    def _require_length(self, n: int) -> None:
        if n > self._limit:
            raise DecodeError(f"n_ctx is {self._limit:,} and {n:,} tokens were to be evaluated: {_LARGER}")

    def _decode(self, batch: Sequence[int], every: bool) -> None:
        llm = self._llm
        self._watch.check()
        past, end = llm.n_tokens, llm.n_tokens + len(batch)
        self._require_length(end)
        self._watch.before_growth(len(batch))
        if self._exact_until is not None and end > self._exact_until:
            self._exact_until = None
            self._take_checkpoint()
        self._kept.forget()
        llm.tokens[past:end] = batch  # first, so that the history is right however far the decode gets
        code = 0
        try:
            with quiet(llm.verbose):
                code = llm.decode(batch, past, every)
        finally:
            llm.n_tokens = min(self.length(), end)
            llm.fresh = llm.n_tokens == end
        if code != 0:
            said = api.last_error()
            if api.get_stats(llm.ctx).broken:  # only an empty one can go on: `settle` evaluates the history again
                llama_lib.llama_memory_clear(llm.memory, True)
                best, n = self.checkpoints.best(llm.history)
                self.lose(llm.n_tokens - (n if best is not None and best.put(llm.ctx, n) else 0), _INTERRUPTED)
            if code == _ABORTED:
                self._watch.check()
            raise self._failure(code, len(batch), said)
        if llm.logits_all:
            llm.scores[past:end] = llm.batch_logits(len(batch))
        self._watch.evaluated()

    def _failure(self, code: int, n: int, said: str) -> DecodeError:
        seen = self._llm.n_tokens
        if code == 1 and self.never_evicts:
            return BudgetExhausted(
                f"the KV budget of {self._options.budget:,} entries is used up ({seen:,} tokens seen, {n:,} more to "
                "evaluate) and the policy `full` never evicts: raise kv_budget or choose another kv_policy"
            )
        return DecodeError(f"evaluating {n:,} tokens after {seen:,} failed with code {code}" + (said and f": {said}"))

    def snapshot(self, rotary: bool) -> dict[int, list[npt.NDArray[np.int32]]]:
        """Positions held, per layer and KV head: in the text, or those that keys are rotated by."""
        ctx, unsure = self._llm.ctx, self._llm.unsure  # drafts are the newest entries of every head

        def read(ctx: int, layer: int, head: int) -> npt.NDArray[np.int32]:
            found = (api.rotary if rotary else api.positions)(ctx, layer, head)
            return found[: len(found) - unsure]

        heads = {layer: api.n_head_kv(ctx, layer) for layer in range(llama_lib.llama_model_n_layer(self._llm.model))}
        return {layer: [read(ctx, layer, h) for h in range(n)] for layer, n in heads.items() if n > 0}

    def stats(self) -> KVStats:
        """Counts of the sequence."""
        native, reason = api.get_stats(self._llm.ctx), api.span_reason(self._llm.ctx)
        seen, position = native.n_seen - self._llm.unsure, native.next_position - self._llm.unsure
        return KVStats(
            policy=self._options.policy,
            budget=native.budget,
            tokens_seen=seen,
            kept=native.n_kept - self._llm.unsure,
            evicted=native.n_evicted,
            reevaluated=self.reevaluations[0],
            reevaluated_reason=self.reevaluations[1],
            kv_bytes=native.kv_bytes,
            window_bytes=native.window_bytes,
            recurrent_bytes=native.recurrent_bytes,
            meta_bytes=native.meta_bytes,
            slots=native.n_slots,
            sinks=native.sinks,
            window=native.window,
            pin=native.pin,
            first=native.n_first,
            evict_step=native.evict_step,
            evict_seconds=native.evict_us / 1e6,
            evictions=native.n_evictions,
            indexer=self._indexer,
            sidecar=os.path.basename(self._options.sidecar or ""),
            sidecar_bytes=native.sidecar_bytes,
            indexer_bytes=native.indexer_bytes,
            memory=native.memory.decode(),
            memory_slots=native.memory_slots,
            memory_layers=native.memory_layers,
            memory_bytes=native.memory_bytes,
            cancel_bytes=self._watch.nbytes,
            cancel_device_bytes=self._watch.device_nbytes,
            checkpoints=len(self.checkpoints),
            checkpoint_bytes=self.checkpoints.nbytes,
            checkpoint_device_bytes=self.checkpoints.device_nbytes,
            background=len(self.background.tokens),
            budget_now=native.budget_now,
            compute_bytes=native.compute_bytes,
            work_bytes=native.work_bytes,
            span=native.span,
            span_reason=reason,
            rebases=native.n_rebases,
            rebase_seconds=native.rebase_us / 1e6,
            layers=layer_budgets(native),
            **common_counts(self._llm, self._turn, seen, position, native.span, reason or "kv_span is 0"),
        )


def common_counts(llm: Inside, turn: Turn, seen: int, position: int, span: int, why_no_span: str) -> dict[str, Any]:
    """Counts that caches with and without a budget have."""
    trained = llm.n_ctx_train
    warning = None if span else trained_length_warning(position, trained, why_no_span)
    evaluated = max(turn.evaluated, 0)
    return {
        "turn_evaluated": evaluated,
        "turn_reused": turn.prompt - evaluated,
        "turn_generated": max(seen - turn.prompt, 0),
        "n_ctx": llm.n_ctx,
        "n_ctx_train": trained,
        "next_position": position,
        "warnings": (warning,) if warning else (),
    }
