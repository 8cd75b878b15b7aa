"""Signals while the library computes, and those that ask a program to end.

Python's own handlers have to wait until a call of the library returns, which takes a whole batch: so a thread hears of signals as
they arrive, and cancels the call.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Optional, Protocol

# of a system that shuts down, and of a terminal that is closed; Windows has the first, and nobody sends it
_LEAVE = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Cancellable(Protocol):
    """A `Llama`."""

    def cancel(self) -> bool:
        """Stops the call in progress; False if there is none."""


class Leave(SystemExit):
    """The program was asked to end. A SystemExit, which event loops and `except Exception` let through."""


class Leaving:
    """What `asked_to_leave` gives: `status` is set once the program was asked to end, to the exit status for it."""

    status: Optional[int] = None


_instead: Optional[Callable[[], Any]] = None  # of raising Leave; if that returns False, it is raised


@contextlib.contextmanager
def asked_to_leave() -> Iterator[Leaving]:
    """While this lasts, SIGTERM and SIGHUP raise Leave, so that what is at stake can be saved; what `ctrl_c_cancels` and
    `signals_call` are about ends in its own way. Only the first signal counts. Those that are ignored, as under nohup, stay so.
    """
    leaving = Leaving()

    def handle(number: int, _: Any) -> None:
        if leaving.status is None:
            leaving.status = 128 + number  # what shells say of a program that a signal has ended
            if _instead is None or _instead() is False:
                raise Leave(leaving.status)

    main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    taken = [number for number in _LEAVE if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, handle)
    try:
        yield leaving
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def ctrl_c_ends() -> Iterator[None]:
    """While this lasts, Ctrl-C ends the process at once, whatever the library is busy with: where nothing is at stake yet."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """While this lasts, Ctrl-C and whoever asks the program to end are not heard: for what is short, and must be whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_LEAVE)}
    changed = [number for number, handler in before.items() if handler not in (None, signal.SIG_IGN)]
    try:
        for number in changed:
            signal.signal(number, lambda *_: None)
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])


@contextlib.contextmanager
def signals_call(ctrl_c: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
    """While this lasts, Ctrl-C and whoever asks the program to end call these, and nothing is raised: for code that an exception
    at any place would leave in disorder.
    """
    global _instead
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    _instead = leave
    signal.signal(signal.SIGINT, lambda *_: ctrl_c())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _instead = None


@contextlib.contextmanager
def ctrl_c_cancels(llm: Cancellable) -> Iterator[None]:
    """While this lasts, Ctrl-C cancels the call in progress, which raises Cancelled. Without one: KeyboardInterrupt.

    For one call at a time. The interpreter writes each signal to a socket as it arrives, where a thread waits for it.
    """
    global _instead
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return

    def handle(*_: Any) -> None:
        if not llm.cancel():
            raise KeyboardInterrupt

    def watch() -> None:
        while signals := reader.recv(16):
            if any(number in signals for number in (signal.SIGINT, *_LEAVE)):
                llm.cancel()

    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        before = signal.signal(signal.SIGINT, handle)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        _instead = llm.cancel
        try:
            yield
        finally:
            _instead = None
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGINT, before)
            writer.shutdown(socket.SHUT_RDWR)
            watcher.join()  # what it has heard is not for the next call
