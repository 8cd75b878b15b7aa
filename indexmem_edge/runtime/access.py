"""Who may use a `Llama` now: threads wait for each other, and nobody gets hold of one that is closed.

Three ways to use it, each for a `with`:
    alone     for what computes or changes the conversation: one thread at a time, which may enter again and again
    between   for what reads counts and positions: while nobody computes, or between two batches of who does
    beside    for what needs nothing but the vocabulary: at any time, but the model is not freed meanwhile

Who wants to be alone goes before who wants to read, and who wanted to read when that one leaves, or ends a batch, before
whoever comes then: neither can keep the other waiting for ever.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Optional

from ..errors import ModelClosed

_CLOSED = "this Llama has been closed: make another one"
_FORKED = (
    "this Llama was made in another process, from which this one was forked without its threads: make one here, or start "
    "processes with the method `spawn`"
)


class _Alone:
    """What `alone` gives. A class, because it is asked for several times a token, and a generator costs as much as the rest."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def __enter__(self) -> None:
        self._access._enter()

    def __exit__(self, *_: object) -> None:
        self._access._leave()


class Access:
    """The lock of one `Llama`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # reentrant, because finalizers of streams may run anywhere
        self._owner: Optional[int] = None  # the thread that is alone with it
        self._depth = 0
        self._wanting_alone = 0  # threads that wait to be
        self._reading = 0
        self._wanting_to_read = 0
        self._admitted = 0  # of those that want to read, how many may: not all, or one that looks all the time would stop work
        self._beside = 0
        self._closed = False
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is another process than that of the `Llama`."""
        return os.getpid() != self._process

    def require_open(self) -> None:
        """Raises ModelClosed if the model is gone. Before any lock is asked for: in a fork nobody will release it."""
        if self.forked:
            raise ModelClosed(_FORKED)
        if self._closed:
            raise ModelClosed(_CLOSED)

    @property
    def mine(self) -> bool:
        """Whether this thread is alone with it."""
        return self._owner == threading.get_ident()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Waits until no other thread computes or reads."""
        return _Alone(self)

    def _enter(self) -> None:
        if self.mine and not self.forked:
            self._depth += 1
            return
        self.require_open()
        with self._changed:
            self._wanting_alone += 1
            try:
                self._changed.wait_for(lambda: self._owner is None and not self._reading and not self._admitted)
                self.require_open()
            except BaseException:
                self._changed.notify_all()  # those that let this one go first
                raise
            finally:
                self._wanting_alone -= 1
            self._owner, self._depth = threading.get_ident(), 1

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            with self._changed:
                self._owner = None
                self._admitted = self._wanting_to_read
                self._changed.notify_all()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[bool]:
        """Like `alone`, but without waiting: False if another thread computes or reads. For finalizers, which run anywhere."""
        if self.mine or self.forked or not self._changed.acquire(blocking=False):
            yield self.mine and not self.forked
            return
        try:
            free = self._owner is None and not self._reading and not self._admitted and not self._closed
            if free:
                self._owner, self._depth = threading.get_ident(), 1
        finally:
            self._changed.release()
        try:
            yield free
        finally:
            if free:
                self._leave()

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """Waits until no other thread computes, or until that stands aside."""
        if self.mine and not self.forked:
            yield
            return
        self.require_open()
        with self._changed:
            self._wanting_to_read += 1
            try:
                self._changed.wait_for(lambda: self._admitted or (self._owner is None and not self._wanting_alone))
                self._admitted = max(self._admitted - 1, 0)
                self.require_open()
                self._reading += 1
            finally:
                self._wanting_to_read -= 1
                self._admitted = min(self._admitted, self._wanting_to_read)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()

    def stand_aside(self) -> None:
        """Between two batches: who wants to read may do so now."""
        if not self._wanting_to_read:
            return
        with self._changed:
            self._admitted = self._wanting_to_read
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: not self._admitted and not self._reading)
            except BaseException:  # an interrupt: who reads already is soon done
                self._admitted = 0
                self._changed.wait_for(lambda: not self._reading)
                raise

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Waits for nothing."""
        if self.mine and not self.forked:
            yield
            return
        self.require_open()
        with self._changed:
            self.require_open()
            self._beside += 1
        try:
            yield
        finally:
            with self._changed:
                self._beside -= 1
                self._changed.notify_all()

    def close(self) -> bool:
        """Lets nobody in any more, and waits until those who are have left; whether it was open."""
        with self._changed:
            if self._closed:
                return False
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: (self._owner is None or self.mine) and not self._reading and not self._beside)
            return True
