"""Calls: one at a time, which another thread can stop, and which the conversation can be taken back from.

A call is what an application asks of a `Llama`: one `prefill`, one completion, one stream of chunks from its creation to
its end. What it calls in turn belongs to it. `Calls` lets one thread compute at a time, and knows which call is in progress:
the one that `cancel` stops. `Call` holds what that call found, and, as soon as it does something that could not be taken back,
a copy of the KV state.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, Optional, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import BudgetError, Cancelled, GenerationSuperseded, LibraryError, ModelClosed
from ..native import api
from . import unbounded
from .access import Access
from .align import common_prefix
from .cache import BoundedCache, Turn
from .drafts import Drafts
from .inside import Inside
from .kept_logits import KeptLogits
from .statecopy import StateCopy

Method = TypeVar("Method", bound=Callable[..., Any])


class Call:
    """What a call found, and the way back there."""

    def __init__(self, llm: Inside, turn: Turn, kept: KeptLogits) -> None:
        self.n_tokens = llm.n_tokens
        self.turn = replace(turn)
        self.seed = llm.seed
        self.logits = kept.now()

    def undo(self, llm: Inside) -> int:
        """Takes the conversation back; returns how many tokens of it have to be evaluated again."""
        raise NotImplementedError


class UnboundedCall(Call):
    """In llama.cpp's own cache: every tail can be taken out. Cached text that a prompt replaces is not kept."""

    def __init__(self, llm: Inside, turn: Turn, kept: KeptLogits) -> None:
        super().__init__(llm, turn, kept)
        self._history = llm.history.copy()

    def undo(self, llm: Inside) -> int:
        unbounded.rewind(llm, common_prefix(self._history, llm.history))
        return self.n_tokens - llm.n_tokens


class BoundedCall(Call):
    """In a bounded cache: the tail is taken out where that is exact, and otherwise a copy of the state brought back."""

    def __init__(self, llm: Inside, turn: Turn, kept: KeptLogits, cache: BoundedCache, copy: Optional[StateCopy]) -> None:
        super().__init__(llm, turn, kept)
        native = api.get_stats(llm.ctx)
        self._cache = cache
        self._copy = copy  # where there is none, the cache is emptied and the history evaluated again
        self._copied = False
        self._beyond = False  # more has been evaluated than can be taken out
        self._wanted_pin, self._pin = cache.wanted_pin, native.pin
        self._reevaluations = cache.reevaluations
        self._background = cache.background
        self._low = self.n_tokens  # the history before it has not been touched
        self._cut: npt.NDArray[np.intc] = np.empty(0, dtype=np.intc)  # what it was from there on
        if native.n_seen != self.n_tokens:
            self.logits = None  # the history has been moved by hand: they belong to another token
        self._reach = cache.exact_until(native)

    def before_growth(self, llm: Inside, n: int) -> None:
        """`n` tokens are about to be evaluated: the last moment for a copy, if they cannot be taken out again."""
        if llm.n_tokens + n > self._reach and not self._beyond:
            self._take(llm)
            self._beyond = True

    def before_cut(self, llm: Inside, start: int) -> None:
        """The history from `start` on is about to be replaced."""
        if start < self._low:
            self._take(llm)
            self._cut = np.concatenate([llm.tokens[start : self._low], self._cut])
            self._low = start

    def _take(self, llm: Inside) -> None:
        if self._copy is not None and not self._copied:
            self._copied = self._copy.take(llm.ctx)

    def undo(self, llm: Inside) -> int:
        cache, memory = self._cache, llm.memory
        back = True
        if self._copied:
            assert self._copy is not None
            back = self._copy.give_back(llm.ctx)
            llama_lib.llama_memory_seq_rm(memory, 0, self.n_tokens, -1)  # appended before the copy was made
        elif self._beyond or not llama_lib.llama_memory_seq_rm(memory, 0, self._low, -1):
            back = False
        if not back:
            llama_lib.llama_memory_clear(memory, True)
        llm.tokens[self._low : self.n_tokens] = self._cut
        llm.n_tokens = self.n_tokens
        with contextlib.suppress(BudgetError):  # something had been evicted: then it has not changed
            if api.get_stats(llm.ctx).pin != self._pin:
                api.set_pin(llm.ctx, self._pin)
        cache.wanted_pin = self._wanted_pin
        cache.reevaluations = self._reevaluations
        cache.background = self._background
        lost = max(self.n_tokens - cache.length(), 0)
        if lost:
            cache.lose(lost, "a call was cancelled, and the cache could not be brought back to what it had been")
        return lost


class _Owner(Protocol):
    """A `Llama`, as far as `one_call` knows it."""

    _calls: Calls


def one_call(method: Method) -> Method:
    """A method of `Llama` that is one call, with the iterator that it returns."""

    @functools.wraps(method)
    def call(self: _Owner, *args: Any, **kwargs: Any) -> Any:
        return self._calls.run(lambda: method(self, *args, **kwargs), self)

    return call  # type: ignore[return-value]


class Calls:
    """The calls of one `Llama`.

    `cancel` may come from any thread, at any time. A cancel counts if it returned True: the call in progress then raises
    `Cancelled`, sooner or later, and no other call does.
    """

    def __init__(self, llm: Inside, access: Access, turn: Turn, kept: KeptLogits, keep: bool) -> None:
        self.keep = keep  # whether there is a copy where it is needed
        self._llm = llm
        self._access = access
        self._turn = turn
        self._kept = kept
        self._cache: Optional[BoundedCache] = None
        self._copy = StateCopy() if keep else None
        self._flag = ctypes.c_int32(0)  # the library reads it after every node
        self._lock = threading.RLock()  # of what cancel reads; reentrant, because signal handlers call it
        self._call: Optional[Call] = None
        self.drafts: Optional[Drafts] = None  # of the draft model, if there is one
        self.watcher: Optional[Callable[[int, int], None]] = None  # is told of every batch of a prompt
        self._inside = False  # its code is running, or, between two items of a stream, the application's
        self._closing: Optional[Callable[[], None]] = None  # to be done when the call has ended

    def attach(self, cache: Optional[BoundedCache] = None) -> None:
        """The context is there, and, with a budget, its cache."""
        self._cache = cache or self._cache
        with contextlib.suppress(LibraryError):  # somebody's own library without a bounded cache: batches end first
            api.set_cancel(self._llm.ctx, self._flag)

    @property
    def nbytes(self) -> int:
        """Bytes kept for the way back, in memory of the host and of devices."""
        return self._copy.nbytes if self._copy is not None else 0

    @property
    def device_nbytes(self) -> int:
        """Those of them in memory of devices."""
        return self._copy.device_nbytes if self._copy is not None else 0

    @property
    def in_progress(self) -> bool:
        """Whether this is the inside of a call. Only a thread that is alone with the `Llama` knows."""
        return self._inside

    def cancel(self) -> bool:
        """See `Llama.cancel`."""
        with self._lock:
            if self._call is None:
                return False
            self._flag.value = 1
            return True

    # what calls are made of

    def run(self, work: Callable[[], Any], owner: object) -> Any:
        """Does `work` as one call; an iterator that it returns goes on with that call, and keeps the owner alive."""
        with self._access.alone():
            if self._inside:
                return work()
            call = self._begin()
            result = self._step(call, work)
            if isinstance(result, Iterator):
                return self._stream(result, call, self._cache.wanted_pin if self._cache is not None else None, owner)
            self._finish(call)
            return result

    def _stream(self, items: Iterator[Any], call: Call, wanted_pin: Optional[int], owner: object) -> Generator[Any, Any, None]:
        """Hands out `items` as the rest of `call`.

        Between two items other threads may use the `Llama`. If one of them, or this one, makes a call, the conversation
        is another, and the next item is an error; but for the first, because nothing has been computed yet.
        """
        started, sent = False, None

        def advance() -> Any:
            return items.send(sent) if isinstance(items, Generator) else next(items)

        try:
            while True:
                with self._access.alone():
                    if self._call is not call:
                        if started:
                            raise GenerationSuperseded(
                                "another call has used this Llama since the last item of this stream, whose text is not in the "
                                "cache any more: read a stream to its end before the next call, or take a second Llama"
                            )
                        call = self._call if self._inside and self._call is not None else self._begin()
                        if self._cache is not None:
                            self._cache.wanted_pin = wanted_pin
                    started = True
                    try:
                        item = self._step(call, advance)
                    except StopIteration:
                        self._finish(call)
                        return
                sent = yield item
        finally:
            if isinstance(items, Generator):
                items.close()
            self._end(call)

    def check(self) -> None:
        """Between two batches: lets other threads read. Raises if the call in progress is to stop."""
        self._access.stand_aside()
        if self._closing is not None:
            raise ModelClosed("this Llama was closed by the call in progress, which ends here")
        if self._inside and self._flag.value:
            raise Cancelled("the call was cancelled")

    def evaluated(self) -> None:
        """A batch has been evaluated: tells the watcher, if it was of a prompt, how much of that is done."""
        ahead = self._turn.prompt - self._llm.n_tokens
        if self.watcher is not None and 0 <= ahead < self._turn.evaluated:
            self.watcher(self._turn.evaluated - ahead, self._turn.evaluated)

    def take_back_drafts(self) -> None:
        """What a draft model guessed and nobody has accepted leaves: a stream that goes on has it guessed again."""
        if self.drafts is not None:
            self.drafts.take_back()

    def overtake(self) -> None:
        """The conversation changes by something too short to be stopped: a stream that was left unfinished has ended."""
        if not self._inside:
            self._end(self._call)
            self.take_back_drafts()

    def close(self, free: Callable[[], None]) -> None:
        """Frees the model: now, or, if the call in progress asks for it, when that has ended."""
        if self._inside and self._access.mine:
            self._closing = free
            return
        if self._access.close():
            self._end(self._call)
            free()

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
        self.take_back_drafts()
        call: Call
        if self._cache is not None:
            call = BoundedCall(self._llm, self._turn, self._kept, self._cache, self._copy)
        else:
            call = UnboundedCall(self._llm, self._turn, self._kept)
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
        if self.drafts is not None:
            with self._access.at_once() as free:  # of a stream that is closed from outside; otherwise the next call does it
                if free:
                    self.take_back_drafts()
        return cancelled

    def _step(self, call: Call, work: Callable[[], Any]) -> Any:
        if self._inside:
            return work()
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
            free, self._closing = self._closing, None
            if free is not None:
                self.close(free)

    def _finish(self, call: Call) -> None:
        """The end, in which a cancel may still have come."""
        if self._end(call):
            self._undo(call)

    def _undo(self, call: Call, error: Optional[BaseException] = None) -> None:
        try:
            lost = self._take_back(call)
        except KeyboardInterrupt:  # once more: it can be done twice
            self._take_back(call)
            raise
        self._kept.restore(call.logits if lost == 0 else None)
        if not isinstance(error, KeyboardInterrupt):
            again = f", {lost:,} tokens of which have to be evaluated again" if lost else ""
            raise Cancelled(f"the call was cancelled: the conversation is as it was before it{again}") from None

    def _take_back(self, call: Call) -> int:
        self._turn.begin(call.turn.prompt, call.turn.evaluated)
        self._llm.seed = call.seed
        self._llm.fresh = False
        return call.undo(self._llm)
