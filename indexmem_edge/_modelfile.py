"""The model file as a file: is it there, is it GGUF, and which one is it."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Union

from .errors import ModelFileError

_MAGIC = b"GGUF"
_HEAD = 16 << 20  # covers the header and the metadata, tokenizer included, of every common model
_BLOCK = 64 << 10
_BLOCKS = 64


def check_model_file(path: Union[str, os.PathLike[str]]) -> str:
    """Returns the path as text after checking that it names a readable GGUF file.

    Raises:
        ModelFileError: it does not; the message says what was found.
    """
    name = os.fspath(path)
    try:
        if stat.S_ISDIR(os.stat(name).st_mode):
            raise ModelFileError(f"{name} is a folder: name a GGUF file in it")
        with open(name, "rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelFileError(f"Model path does not exist: {name}") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"cannot read the model {name}: {getattr(error, 'strerror', None) or error}") from None
    if magic != _MAGIC:
        found = "an empty file" if not magic else f"a file that begins with {magic!r}"
        raise ModelFileError(f"{name} is not a GGUF model: expected a file that begins with {_MAGIC!r}, found {found}")
    return name


def fingerprint(path: Union[str, os.PathLike[str]]) -> str:
    """Identifies a model file without reading all of it: size, first 16 MiB and 64 blocks spread over the rest."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            file.seek(0)
            digest.update(file.read(_HEAD))
            span = max(size - _HEAD - _BLOCK, 0)
            for i in range(_BLOCKS if span else 0):
                file.seek(_HEAD + span * i // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    except OSError as error:
        raise ModelFileError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from None
    return f"{size:x}-{digest.hexdigest()}"
