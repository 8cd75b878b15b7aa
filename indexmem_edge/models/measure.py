"""How fast a model reads and writes here: a random text through the model itself, for as long as one wants to wait."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from ..errors import DecodeError
from ..files.modelfile import loaded_model
from ..native import api
from ..options import CacheOptions
from ..runtime.contexts import context_of

Progress = Callable[[float, float], None]  # seconds that went by, seconds in all

_WRITTEN = 64  # tokens, which are as many as are evicted at once
_FEW = 32  # tokens, with which reading begins: nobody knows yet how long that takes
_READING = 0.6  # of the time of one cache, at most
_ABORTED = 2  # llama_decode: the time is over


@dataclass(frozen=True)
class Speed:
    """What was measured with one cache. Rates are tokens per second; None: there was no time for it."""

    read: Optional[float] = None  # of a prompt
    read_tokens: int = 0  # that it had
    write: Optional[float] = None  # tokens one by one, as an answer is generated
    kept: int = 0  # entries that were in the cache while they were written, per KV head
    full: bool = False  # whether these were all that the budget has room for


class Clock:
    """A time that is to be divided among several caches.

    Args:
        seconds: from now on.
        progress: called every now and then.
    """

    def __init__(self, seconds: float, progress: Optional[Progress] = None) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._progress = progress

    @property
    def spent(self) -> float:
        """Seconds that went by."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds."""
        return self._seconds - self.spent

    def tick(self) -> None:
        """Lets people know."""
        if self._progress is not None:
            self._progress(min(self.spent, self._seconds), self._seconds)


class Measured:
    """A model with its weights, for caches to be measured one after the other. The time of the first has begun with the load."""

    def __init__(self, path: str, model: int, clock: Clock) -> None:
        self._path = path
        self._model = model
        self._clock = clock
        vocabulary = api.llama_lib.llama_model_get_vocab(model)
        self._n_vocab = int(api.llama_lib.llama_vocab_n_tokens(vocabulary))

    def speed(self, options: CacheOptions, keywords: Mapping[str, Any], share: float = 1.0) -> Optional[Speed]:
        """That with one cache: read until it is full, then written.

        Args:
            keywords: those of `Llama` that are not options of the cache.
            share: of the time that is left.

        Returns:
            None if no time is left, or the model does not generate.

        Raises:
            what `context_of` does; DecodeError: evaluating fails.
        """
        seconds = self._clock.left * share
        if seconds <= 0 or api.llama_lib.llama_model_has_encoder(self._model):
            return None
        with context_of(self._path, self._model, options, keywords) as context:
            if not api.llama_lib.llama_get_memory(context):
                return None
            run = _Run(context, self._n_vocab, self._clock, seconds)
            try:
                return run.measure()
            finally:
                run.end()


class _Run:
    """One context, until its time is over."""

    def __init__(self, context: int, n_vocab: int, clock: Clock, seconds: float) -> None:
        llama = api.llama_lib
        self._context = context
        self._clock = clock
        self._end = clock.spent + seconds
        self._seconds = seconds
        self._step = int(llama.llama_n_ubatch(context))
        self._room = int(llama.llama_n_ctx(context))
        self._text = np.random.default_rng(0).integers(n_vocab, size=1 << 16, dtype=np.int32)
        self._seen = 0
        self._flag = ctypes.c_int32(0)
        api.set_cancel(context, self._flag)
        self._timer = threading.Timer(seconds, self._over)
        self._timer.daemon = True
        self._timer.start()

    def _over(self) -> None:
        self._flag.value = 1

    def end(self) -> None:
        """The context may be freed."""
        self._timer.cancel()

    def measure(self) -> Speed:
        bounded = api.is_bounded(self._context)
        wanted = self._room - _WRITTEN
        if bounded:
            stats = api.get_stats(self._context)
            wanted = min(wanted, stats.n_slots + self._step)  # one ubatch that evicts
        until = self._end - self._seconds * (1 - _READING)
        read = self._rate(self._pieces(wanted, until), until)
        read_tokens = self._seen
        write = self._rate((1 for _ in range(_WRITTEN)), self._end)
        if not bounded:
            return Speed(read, read_tokens, write, self._seen)
        stats = api.get_stats(self._context)
        return Speed(read, read_tokens, write, stats.n_kept, stats.n_evicted > 0)

    def _pieces(self, wanted: int, until: float) -> Iterator[int]:
        """How many tokens to read at once: few first, and as many as are evaluated at once where that does not take long."""
        n, began = min(_FEW, self._step), self._clock.spent
        while self._seen < wanted:
            yield min(n, wanted - self._seen)
            took, began = self._clock.spent - began, self._clock.spent
            if n < self._step and self._step / n * took < (until - began) / 4:
                n = self._step

    def _rate(self, pieces: Iterator[int], until: float) -> Optional[float]:
        """Tokens per second. The first piece prepares what the others use, and counts if there is no other."""
        done: list[tuple[int, float]] = []
        for n in pieces:
            began = self._clock.spent
            if not self._decode(n):
                break
            done.append((n, self._clock.spent - began))
            self._clock.tick()
            if self._clock.spent + done[-1][1] >= until:
                break
        counted = done[1:] or done
        seconds = sum(took for _, took in counted)
        return sum(n for n, _ in counted) / seconds if seconds > 0 else None

    def _decode(self, n: int) -> bool:
        """Evaluates the next `n` tokens; False: the time is over."""
        if self._flag.value:
            return False
        tokens = self._next(n)
        batch = api.llama_lib.llama_batch_get_one(tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), n)
        code = api.llama_lib.llama_decode(self._context, batch)
        if code == _ABORTED:
            return False
        if code != 0:
            raise DecodeError(f"evaluating {n:,} tokens after {self._seen:,} failed with code {code}: {api.last_error()}")
        self._seen += n
        return True

    def _next(self, n: int) -> npt.NDArray[np.int32]:
        return np.ascontiguousarray(np.take(self._text, np.arange(self._seen, self._seen + n), mode="wrap"))


def measured(
    path: str, caches: Sequence[tuple[CacheOptions, Mapping[str, Any]]], seconds: float, progress: Optional[Progress] = None
) -> Iterator[Optional[Speed]]:
    """The speed with each of some caches, in their order: what comes first gets half of the time that is left, the last one all.

    Args:
        path: the model, which has to fit into the memory with any of them.
        caches: options of the cache, and other keywords of `Llama`.
        seconds: that all of it may take, loading included.

    Raises:
        ModelFileError: the model cannot be loaded; and what `Measured.speed` raises.
    """
    clock = Clock(seconds, progress)
    clock.tick()
    with loaded_model(path, as_used=True) as model:
        machine = Measured(path, model, clock)
        for i, (options, keywords) in enumerate(caches):
            yield machine.speed(options, keywords, 1.0 if i == len(caches) - 1 else 0.5)
