"""What becomes of llama.cpp's log: collected, to put its reason into our error, or kept from the terminal.

llama.cpp has one callback for the whole process, and calls it in the thread that has something to say. So ours is one for the
life of the process, which can never be called after it has been freed, and what it does is each thread's own affair.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from dataclasses import dataclass, field
from typing import Any, Iterator

from .._vendor.llama_cpp import _logger as base_logger, llama_cpp as llama_lib

_ERROR, _CONTINUATION = 4, 5


@dataclass
class _Listener:
    """What a part of a program wants done with the log, while it runs in this thread."""

    print: bool
    errors: list[str] = field(default_factory=list)
    level: int = 0  # of the last line: a continuation has the level of what it continues

    def hear(self, level: int, text: bytes) -> None:
        self.level = level if level != _CONTINUATION else self.level
        if self.level == _ERROR:
            self.errors.append(text.decode("utf-8", "replace").strip())


class _Listeners(threading.local):
    """Of this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Listener] = []


_listeners = _Listeners()


@llama_lib.llama_log_callback
def _log(level: int, text: bytes, user_data: Any) -> None:
    stack = _listeners.stack
    if stack:
        stack[-1].hear(level, text)
    if not stack or stack[-1].print:
        base_logger.llama_log_callback(level, text, user_data)


@contextlib.contextmanager
def _listening(listener: _Listener) -> Iterator[None]:
    with _interrupt_waits():
        llama_lib.llama_log_set(_log, ctypes.c_void_p(0))  # llama-cpp-python, or the application, may have set another
        _listeners.stack.append(listener)
        try:
            yield
        finally:
            _listeners.stack.remove(listener)


@contextlib.contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt at the end of the block. While the library is talking, Python would raise it in the
    callback, from where an exception goes nowhere but to the terminal.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if heard:
        raise KeyboardInterrupt


@contextlib.contextmanager
def collected_errors(verbose: bool) -> Iterator[list[str]]:
    """Yields a list that receives llama.cpp's error lines of this thread; they reach the terminal only if `verbose`."""
    listener = _Listener(print=verbose)
    with _listening(listener):
        yield listener.errors


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Nothing reaches the terminal unless `verbose`: an exception says what failed, and that a call was cancelled.

    llama-cpp-python's own filter takes llama.cpp's warnings for errors, and prints them whatever `verbose` is.
    """
    with contextlib.nullcontext() if verbose else _listening(_Listener(print=False)):
        yield


def reason(lines: list[str]) -> str:
    """The most telling of the collected lines, without llama.cpp's function names."""
    for line in lines:
        text = line.split(": ", 1)[1] if ": " in line else line
        if text:
            return text
    return ""
