"""The tokenizer of the model that is trained for: that of the native library, out of the model's own file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..._vendor.llama_cpp import llama_cpp as llama_lib
from ...calibrate.passages import tokenize
from ...files.modelfile import check_model_file, loaded_model


@dataclass(frozen=True)
class Tokenizer:
    """`tokenize` adds nothing at the beginning or end; `first` is what every sequence of this model begins with."""

    tokenize: Callable[[str], list[int]]
    first: tuple[int, ...]


@contextlib.contextmanager
def open_tokenizer(model: Path) -> Iterator[Tokenizer]:
    """Loads the vocabulary of a GGUF file, and no weights, for as long as the block runs.

    Raises:
        ModelFileError: the file does not load.
    """
    with loaded_model(check_model_file(model), vocab_only=True) as loaded:
        vocab = llama_lib.llama_model_get_vocab(loaded)
        first = (llama_lib.llama_vocab_bos(vocab),) if llama_lib.llama_vocab_get_add_bos(vocab) else ()
        yield Tokenizer(lambda text: tokenize(loaded, text), first)
