"""GGUF files as files: is it there, is it GGUF, what does it say it is, and which model is it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import stat
import threading
from typing import Callable, Iterable, Iterator, Union

from ..errors import IndexMemError, ModelFileError, SidecarError
from .fingerprint import norms_fingerprint

_MAGIC = b"GGUF"
_HEAD = 16 << 20  # covers the header and the metadata, tokenizer included, of every common model
_BLOCK = 64 << 10
_BLOCKS = 64
_GGUF_STRING = 8  # enum gguf_type
_GGUF_NUMBERS: dict[int, tuple[str, type]] = {2: ("u16", ctypes.c_uint16), 4: ("u32", ctypes.c_uint32), 5: ("i32", ctypes.c_int32)}
_F32 = 0  # enum ggml_type


def check_model_file(path: Union[str, os.PathLike[str]]) -> str:
    """Returns the path as text after checking that it names a readable GGUF file.

    Raises:
        ModelFileError: it does not; the message says what was found.
    """
    return _check(path, "model", "Model path", ModelFileError)


def check_sidecar_file(path: Union[str, os.PathLike[str]]) -> str:
    """The same for a sidecar. Whether it is one, and whole, is for the library to say.

    Raises:
        SidecarError: it does not; the message says what was found.
    """
    return _check(path, "sidecar", "Sidecar path", SidecarError)


def check_lora_file(path: Union[str, os.PathLike[str]]) -> str:
    """The same for a LoRA. Whether it is one, and for this model, is for the library to say.

    Raises:
        ModelFileError: it does not; the message says what was found.
    """
    return _check(path, "LoRA", "LoRA path", ModelFileError)


def check_gguf_file(path: Union[str, os.PathLike[str]]) -> str:
    """The same for a file that may be either.

    Raises:
        ModelFileError: it does not; the message says what was found.
    """
    return _check(path, "model or sidecar", "Path", ModelFileError)


def _check(path: Union[str, os.PathLike[str]], what: str, what_path: str, kind: Callable[[str], IndexMemError]) -> str:
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
        if stat.S_ISDIR(mode):
            raise kind(f"{name} is a folder: name a GGUF file in it")
        if not stat.S_ISREG(mode):
            raise kind(f"{name} is not a regular file: name a GGUF file")
        with open(name, "rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise kind(f"{what_path} does not exist: {name}") from None
    except OSError as error:
        raise kind(f"cannot read the {what} {name}: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, IndexMemError):
            raise
        raise kind(f"cannot read the {what} {name!r}: {error}") from None
    if magic != _MAGIC:
        found = "an empty file" if not magic else f"a file that begins with {magic!r}"
        raise kind(f"{name} is not a GGUF {what}: expected a file that begins with {_MAGIC!r}, found {found}")
    return NativePath(name)


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


def fingerprint_aside(path: Union[str, os.PathLike[str]]) -> Callable[[], str]:
    """Begins to read the `fingerprint` of a file as it is now, beside what the caller goes on with.

    What is returned waits for it; "" if the file could not be read.
    """
    found: list[str] = []

    def read() -> None:
        with contextlib.suppress(ModelFileError):
            found.append(fingerprint(path))

    reader = threading.Thread(target=read, name="fingerprint", daemon=True)
    reader.start()

    def known() -> str:
        reader.join()
        return found[0] if found else ""

    return known


class NativePath(str):
    """A path whose `encode()`, which llama-cpp-python calls, gives the bytes that the system knows the file by.

    They are not its text in UTF-8 where the locale is another, or where a name is not text at all.
    """

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


class _InitParams(ctypes.Structure):
    """struct gguf_init_params"""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@contextlib.contextmanager
def _parsed(path: str) -> Iterator[int]:
    """The header of a GGUF file, as ggml has it. It is at home with hostile files, and fast with large vocabularies."""
    from ..native.ggml import ggml_function
    from ..native.logs import collected_errors, reason

    init = ggml_function("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _InitParams)
    with collected_errors(False) as log:
        parsed = init(os.fsencode(path), _InitParams(no_alloc=True, ctx=None))
    if not parsed:
        raise ModelFileError(
            f"{path} is damaged: {reason(log) or 'its metadata cannot be read'}. Is the file complete?"
        )
    try:
        yield parsed
    finally:
        ggml_function("gguf_free", None, ctypes.c_void_p)(parsed)


def gguf_values(path: str, keys: Iterable[str]) -> dict[str, Union[str, int]]:
    """Those keys of a GGUF file that are there and hold text or a whole number of 16 or 32 bits.

    Raises:
        ModelFileError: the file is damaged.
    """
    from ..native.ggml import ggml_function

    pointer, index = ctypes.c_void_p, ctypes.c_int64
    find_key = ggml_function("gguf_find_key", index, pointer, ctypes.c_char_p)
    type_of = ggml_function("gguf_get_kv_type", ctypes.c_int, pointer, index)
    text_of = ggml_function("gguf_get_val_str", ctypes.c_char_p, pointer, index)
    found: dict[str, Union[str, int]] = {}
    with _parsed(path) as parsed:
        for key in keys:
            i = find_key(parsed, key.encode())
            kind = type_of(parsed, i) if i >= 0 else None
            if kind == _GGUF_STRING:
                found[key] = text_of(parsed, i).decode("utf-8", "replace")
            elif kind in _GGUF_NUMBERS:
                name, as_c = _GGUF_NUMBERS[kind]
                found[key] = int(ggml_function(f"gguf_get_val_{name}", as_c, pointer, index)(parsed, i))
    return found


def gguf_strings(path: str, keys: Iterable[str]) -> dict[str, str]:
    """Those keys of a GGUF file that are there and hold text.

    Raises:
        ModelFileError: the file is damaged.
    """
    return {key: value for key, value in gguf_values(path, keys).items() if isinstance(value, str)}


def model_fingerprint(path: str) -> str:
    """Identity of a model whatever its quantisation, as sidecars record it; of a model in one file, without loading it.

    Raises:
        ModelFileError: the file is damaged.
    """
    from ..native.ggml import ggml_function

    pointer, index = ctypes.c_void_p, ctypes.c_int64
    count = ggml_function("gguf_get_n_tensors", index, pointer)
    name_of = ggml_function("gguf_get_tensor_name", ctypes.c_char_p, pointer, index)
    type_of = ggml_function("gguf_get_tensor_type", ctypes.c_int, pointer, index)
    offset_of = ggml_function("gguf_get_tensor_offset", ctypes.c_size_t, pointer, index)
    size_of = ggml_function("gguf_get_tensor_size", ctypes.c_size_t, pointer, index)
    start = ggml_function("gguf_get_data_offset", ctypes.c_size_t, pointer)
    norms = []
    with _parsed(path) as parsed, open(path, "rb") as file:
        for i in range(count(parsed)):
            name = name_of(parsed, i).decode("utf-8", "surrogateescape")
            if name.endswith("norm.weight") and type_of(parsed, i) == _F32:
                file.seek(start(parsed) + offset_of(parsed, i))
                norms.append((name, file.read(size_of(parsed, i))))
    return norms_fingerprint(norms)


@contextlib.contextmanager
def loaded_model(
    path: str, vocab_only: bool = False, as_used: bool = False, dry: bool = False, offload: bool = False
) -> Iterator[int]:
    """The model as the library sees it, weights mapped and not copied, for as long as the block runs.

    Args:
        vocab_only: the vocabulary without the weights: enough to tokenize, in a moment.
        as_used: with the copies of weights in another order that a CPU may want, as `Llama` has them.
        offload: layers lie on the devices that there are; else in the host's memory.
        dry: without weights and without memory for caches, to learn what they would take.

    Raises:
        ModelFileError: it does not load.
    """
    from ..native import api
    from ..native.logs import collected_errors, reason

    llama = api.llama_lib
    params = llama.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = -1 if offload else 0, vocab_only
    params.use_extra_bufts, params.no_alloc = as_used, dry
    if dry:
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE  # there is nothing to map
    with collected_errors(False) as log:
        llama.llama_backend_init()
        api.require_cpu()
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ModelFileError(f"cannot load the model {path}: {reason(log) or 'llama.cpp gave no reason'}")
    try:
        yield model
    finally:
        llama.llama_model_free(model)
