"""Ctrl-C while the library computes. Python's own handler has to wait until that returns, which takes a whole batch."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any, Protocol


class Cancellable(Protocol):
    """A `Llama`."""

    def cancel(self) -> bool:
        """Stops the call in progress; False if there is none."""


@contextlib.contextmanager
def ctrl_c_cancels(llm: Cancellable) -> Iterator[None]:
    """While this lasts, Ctrl-C cancels the call in progress, which raises Cancelled. Without one: KeyboardInterrupt.

    For one call at a time. The interpreter writes each signal to a socket as it arrives, where a thread waits for it.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return

    def handle(*_: Any) -> None:
        if not llm.cancel():
            raise KeyboardInterrupt

    def watch() -> None:
        while signals := reader.recv(16):
            if signal.SIGINT in signals:
                llm.cancel()

    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        before = signal.signal(signal.SIGINT, handle)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGINT, before)
            writer.shutdown(socket.SHUT_RDWR)
            watcher.join()  # what it has heard is not for the next call
