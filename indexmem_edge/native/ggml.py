"""Functions of ggml that llama-cpp-python does not wrap."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from ..errors import LibraryError
from . import api, find


def ggml_function(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of ggml, typed.

    Raises:
        LibraryError: none of the libraries has it.
    """
    for library in _libraries():
        function = getattr(library, name, None)
        if function is not None:
            function.restype, function.argtypes = restype, list(argtypes)
            return function
    raise LibraryError(f"the libraries in {find.library_dir()} have no {name}: rebuild them from one source tree")


def _libraries() -> Iterator[Any]:
    """Linux and macOS look for a symbol in the libraries that one needs, too. Windows does not."""
    yield api.llama_lib._lib
    for name in ("ggml", "ggml-base", "ggml-cpu", f"ggml-cpu-{api.cpu_variant()}"):
        file = find.library_file(name=name)
        if file is not None:
            yield ctypes.CDLL(str(file))
