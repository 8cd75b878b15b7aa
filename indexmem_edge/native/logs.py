"""What becomes of llama.cpp's log: collected, to put its reason into our error, or kept from the terminal."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, Iterator

from .._vendor.llama_cpp import _logger as base_logger
from .._vendor.llama_cpp import llama_cpp as llama_lib
from . import api  # noqa: F401  (chooses the library)

_ERROR, _CONTINUATION = 4, 5


@contextlib.contextmanager
def collected_errors(verbose: bool) -> Iterator[list[str]]:
    """Yields a list that receives llama.cpp's error lines; they reach the terminal only if `verbose`."""
    lines: list[str] = []
    last = [0]

    @llama_lib.llama_log_callback
    def collect(level: int, text: bytes, user_data: Any) -> None:
        last[0] = level if level != _CONTINUATION else last[0]
        if last[0] == _ERROR:
            lines.append(text.decode("utf-8", "replace").strip())
        if verbose:
            base_logger.llama_log_callback(level, text, user_data)

    llama_lib.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_lib.llama_log_set(base_logger.llama_log_callback, ctypes.c_void_p(0))


@llama_lib.llama_log_callback
def _drop(level: int, text: bytes, user_data: Any) -> None:
    pass


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Nothing reaches the terminal unless `verbose`: an exception says what failed, and that a call was cancelled.

    llama-cpp-python's own filter takes llama.cpp's warnings for errors, and prints them whatever `verbose` is.
    """
    if not verbose:
        llama_lib.llama_log_set(_drop, ctypes.c_void_p(0))
    try:
        yield
    finally:
        if not verbose:
            llama_lib.llama_log_set(base_logger.llama_log_callback, ctypes.c_void_p(0))


def reason(lines: list[str]) -> str:
    """The most telling of the collected lines, without llama.cpp's function names."""
    for line in lines:
        text = line.split(": ", 1)[1] if ": " in line else line
        if text:
            return text
    return ""
