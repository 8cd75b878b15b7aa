"""Stops a call from another thread, and takes the conversation back to where the call found it.

A call is what an application asks of a `Llama`: one `prefill`, one completion, one stream of chunks from its creation to
its end. What it calls in turn belongs to it. `Calls` knows which call is in progress, which is the one that `cancel` stops;
`Call` holds what that call found, and, as soon as it does something that could not be taken back, a copy of the KV state.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Optional, TypeVar

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import BudgetError, Cancelled, LibraryError
from ..native import api
from .align import common_prefix
from .cache import rewind_unbounded
from .kept_logits import KeptLogits
from .statecopy import StateCopy

if TYPE_CHECKING:
    from ..llama import Llama

Method = TypeVar("Method", bound=Callable[..., Any])

_ANY = 1 << 62


class Call:
    """What a call found, and the way back there."""

    def __init__(self, llm: Llama) -> None:
        self.n_tokens = llm.n_tokens
        self.turn = replace(llm._turn)
        self.seed = llm._seed
        self.logits = llm._calls.logits or KeptLogits.of(llm)

    def undo(self, llm: Llama) -> int:
        """Takes everything back; returns how many tokens of the conversation have to be evaluated again."""
        llm._turn = replace(self.turn)
        llm._seed = self.seed
        llm._requires_eval = True
        return 0


class UnboundedCall(Call):
    """In llama.cpp's own cache: every tail can be taken out. Cached text that a prompt replaces is not kept."""

    def __init__(self, llm: Llama) -> None:
        super().__init__(llm)
        self._history = llm._input_ids.copy()

    def undo(self, llm: Llama) -> int:
        super().undo(llm)
        rewind_unbounded(llm, common_prefix(self._history, llm._input_ids))
        return self.n_tokens - llm.n_tokens


class BoundedCall(Call):
    """In a bounded cache: the tail is taken out where that is exact, and otherwise a copy of the state brought back."""

    def __init__(self, llm: Llama, copy: Optional[StateCopy]) -> None:
        super().__init__(llm)
        assert llm._cache is not None
        cache, native = llm._cache, api.get_stats(llm.ctx)
        self._copy = copy  # where there is none, the cache is emptied and the history evaluated again
        self._copied = False
        self._beyond = False  # more has been evaluated than can be taken out
        self._wanted_pin, self._pin = cache.wanted_pin, native.pin
        self._reevaluations = cache.reevaluations
        self._low = self.n_tokens  # the history before it has not been touched
        self._cut: npt.NDArray[np.intc] = np.empty(0, dtype=np.intc)  # what it was from there on
        if native.n_seen != self.n_tokens:
            self.logits = None  # the history has been moved by hand: they belong to another token
        evicts = llm.kv_options.policy != "full"
        room = int(native.budget_now) - int(native.memory_slots) - int(native.n_kept) if evicts else _ANY
        if native.span:
            room = min(room, int(native.span) - int(native.next_position))
        if cache.mixed:
            room = 0  # recurrent layers have no way back, and windows a short one
        self._reach = int(native.n_seen) + room  # tokens, until which nothing is evicted and no position renewed

    def before_growth(self, llm: Llama, n: int) -> None:
        """`n` tokens are about to be evaluated: the last moment for a copy, if they cannot be taken out again."""
        if llm.n_tokens + n > self._reach and not self._beyond:
            self._take(llm)
            self._beyond = True

    def before_cut(self, llm: Llama, start: int) -> None:
        """The history from `start` on is about to be replaced."""
        if start < self._low:
            self._take(llm)
            self._cut = np.concatenate([llm.input_ids[start : self._low], self._cut])
            self._low = start

    def _take(self, llm: Llama) -> None:
        if self._copy is not None and not self._copied:
            self._copied = self._copy.take(llm.ctx)

    def undo(self, llm: Llama) -> int:
        super().undo(llm)
        cache, memory = llm._cache, llama_lib.llama_get_memory(llm.ctx)
        assert cache is not None
        back = True
        if self._copied:
            assert self._copy is not None
            back = self._copy.give_back(llm.ctx)
            llama_lib.llama_memory_seq_rm(memory, 0, self.n_tokens, -1)  # appended before the copy was made
        elif self._beyond or not llama_lib.llama_memory_seq_rm(memory, 0, self._low, -1):
            back = False
        if not back:
            llama_lib.llama_memory_clear(memory, True)
        llm.input_ids[self._low : self.n_tokens] = self._cut
        llm.n_tokens = self.n_tokens
        with contextlib.suppress(BudgetError):  # something had been evicted: then it has not changed
            if api.get_stats(llm.ctx).pin != self._pin:
                api.set_pin(llm.ctx, self._pin)
        cache.wanted_pin = self._wanted_pin
        cache.reevaluations = self._reevaluations
        lost = max(self.n_tokens - cache.length(), 0)
        if lost:
            cache.lose(lost, "a call was cancelled, and the cache could not be brought back to what it had been")
        return lost


def one_call(method: Method) -> Method:
    """A method of `Llama` that is one call, with the iterator that it returns."""

    @functools.wraps(method)
    def call(self: Llama, *args: Any, **kwargs: Any) -> Any:
        return self._calls.run(lambda: method(self, *args, **kwargs))

    return call  # type: ignore[return-value]


class Calls:
    """The calls of one `Llama`.

    `cancel` may come from any thread, all else from one at a time. A cancel counts if it returned True: the call in
    progress then raises `Cancelled`, sooner or later, and no other call does.
    """

    def __init__(self, llm: Llama, keep: bool) -> None:
        self._llm = llm
        self._copy = StateCopy() if keep else None
        self._flag = ctypes.c_int32(0)  # the library reads it after every node
        self._lock = threading.RLock()  # reentrant, because signal handlers call cancel
        self._call: Optional[Call] = None
        self.logits: Optional[KeptLogits] = None  # after the last token, if a cancelled call has overwritten them
        self.watcher: Optional[Callable[[int, int], None]] = None  # is told of every batch of a prompt
        self._inside = False  # its code is running, or, between two items of a stream, the application's

    def attach(self) -> None:
        """The context is there."""
        with contextlib.suppress(LibraryError):  # somebody's own library without a bounded cache: batches end first
            api.set_cancel(self._llm.ctx, self._flag)

    @property
    def nbytes(self) -> int:
        """Bytes kept for the way back."""
        return self._copy.nbytes if self._copy is not None else 0

    @property
    def keep(self) -> bool:
        """Whether there is a copy where it is needed."""
        return self._copy is not None

    def cancel(self) -> bool:
        """See `Llama.cancel`."""
        with self._lock:
            if self._call is None:
                return False
            self._flag.value = 1
            return True

    # what calls are made of

    def run(self, work: Callable[[], Any]) -> Any:
        """Does `work` as one call; an iterator that it returns goes on with that call."""
        if self._inside:
            return work()
        call = self._begin()
        result = self._step(call, work)
        if isinstance(result, Iterator):
            return self.stream(result, call)
        self._finish(call)
        return result

    def stream(self, items: Iterator[Any], call: Optional[Call] = None) -> Generator[Any, Any, None]:
        """Hands out `items` as one call, or as the rest of `call`; after another call they go on as a new one."""
        advance = items.send if isinstance(items, Generator) else lambda _: next(items)
        sent = None
        try:
            while True:
                if not self._inside and (call is None or self._call is not call):
                    call = self._begin()
                try:
                    item = self._step(call, lambda: advance(sent))
                except StopIteration:
                    self._finish(call)
                    return
                sent = yield item
        finally:
            if isinstance(items, Generator):
                items.close()
            self._end(call)

    def check(self) -> None:
        """Raises Cancelled if the call in progress is to stop."""
        if self._inside and self._flag.value:
            raise Cancelled("the call was cancelled")

    def evaluated(self) -> None:
        """A batch has been evaluated: tells the watcher, if it was of a prompt, how much of that is done."""
        turn = self._llm._turn
        ahead = turn.prompt - self._llm.n_tokens
        if self.watcher is not None and 0 <= ahead < turn.evaluated:
            self.watcher(turn.evaluated - ahead, turn.evaluated)

    @property
    def in_progress(self) -> bool:
        """Whether the code of a call is running."""
        return self._inside

    def overtake(self) -> None:
        """Something too short to be stopped happens: a stream that was left unfinished is no longer in progress."""
        if not self._inside:
            self._end(self._call)

    def before_growth(self, n: int) -> None:
        """See `BoundedCall.before_growth`."""
        if self._inside and isinstance(self._call, BoundedCall):
            self._call.before_growth(self._llm, n)

    def before_cut(self, start: int) -> None:
        """See `BoundedCall.before_cut`."""
        if self._inside and isinstance(self._call, BoundedCall):
            self._call.before_cut(self._llm, start)

    def _begin(self) -> Call:
        self._end(self._call)
        bounded = self._llm._cache is not None
        call = BoundedCall(self._llm, self._copy) if bounded else UnboundedCall(self._llm)
        with self._lock:
            self._call = call
        return call

    def _end(self, call: Optional[Call]) -> bool:
        """Whether the call, which is over now, was cancelled."""
        with self._lock:
            if call is None or self._call is not call:
                return False
            cancelled = self._flag.value != 0
            self._call = None
            self._flag.value = 0
            return cancelled

    def _step(self, call: Optional[Call], work: Callable[[], Any]) -> Any:
        if self._inside:
            return work()
        assert call is not None
        self._inside = True
        try:
            self.check()
            return work()
        except StopIteration:
            raise
        except (Cancelled, KeyboardInterrupt) as error:
            if self._end(call):
                self._undo(call, error)
            raise
        except BaseException:
            self._end(call)
            raise
        finally:
            self._inside = False

    def _finish(self, call: Optional[Call]) -> None:
        """The end, in which a cancel may still have come."""
        if call is not None and self._end(call):
            self._undo(call)

    def _undo(self, call: Call, error: Optional[BaseException] = None) -> None:
        try:
            lost = call.undo(self._llm)
        except KeyboardInterrupt:  # once more: it can be done twice
            call.undo(self._llm)
            raise
        self.logits = call.logits if lost == 0 else None
        self._llm._requires_eval = self.logits is None
        if not isinstance(error, KeyboardInterrupt):
            again = f", {lost:,} tokens of which have to be evaluated again" if lost else ""
            raise Cancelled(f"the call was cancelled: the conversation is as it was before it{again}") from None
