"""The session file: bytes on disk, without any knowledge of models.

    magic "IMEMSESS" | u32 version | u32 header bytes | header: JSON | token ids: i32 each | extra: JSON | KV state
    | logits after the last token: f32 each | of every checkpoint: token ids, KV state, logits | SHA-256 of everything before it

Of a checkpoint the tokens that it begins with as the conversation does are not written again. Version 1 had no logits, version 2 no
checkpoints; both are read, too.

All numbers are little-endian. The header says how long the other parts are, so the size of the file is known before
anything is read, and nothing larger than the file is ever allocated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Optional, TypeGuard, Union

import numpy as np
import numpy.typing as npt

from ..errors import SessionError
from ..files.atomic import replacing_private
from ..runtime.align import common_prefix

MAGIC = b"IMEMSESS"
VERSION = 3
_OLDEST = 1
_FIXED = struct.Struct("<8sII")
_DIGEST = hashlib.sha256().digest_size
_MAX_HEADER = 1 << 20
_TOKEN = np.dtype("<i4")
_LOGIT = np.dtype("<f4")
State = Union[bytes, memoryview]


_MAX_CHECKPOINTS = 4096
_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class SavedCheckpoint:
    """The state after some tokens, of this conversation or another one."""

    tokens: npt.NDArray[np.int32]
    state: State
    logits: Optional[npt.NDArray[np.single]] = None  # after the last of them


@dataclass(frozen=True)
class SessionData:
    """What a session file carries. `header` holds plain JSON values."""

    header: dict[str, Any]
    tokens: npt.NDArray[np.int32]
    extra: Any
    state: State
    logits: Optional[npt.NDArray[np.single]] = None  # after the last token, one per token of the vocabulary
    checkpoints: tuple[SavedCheckpoint, ...] = ()


@dataclass(frozen=True)
class _CheckpointSize:
    """Lengths of the parts of a checkpoint: `same` tokens of the conversation, `n_tokens` after them."""

    same: int
    n_tokens: int
    state_bytes: int
    n_logits: int

    @property
    def nbytes(self) -> int:
        return _TOKEN.itemsize * self.n_tokens + self.state_bytes + _LOGIT.itemsize * self.n_logits


@dataclass(frozen=True)
class Head:
    """What the beginning of a session file says of the rest."""

    version: int
    header: dict[str, Any]
    n_tokens: int
    extra_bytes: int
    state_bytes: int
    n_logits: int
    checkpoints: tuple[_CheckpointSize, ...]
    raw: bytes  # the bytes themselves
    nbytes: int  # of the file

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes that the checkpoints take."""
        return sum(size.nbytes for size in self.checkpoints)


def _name(path: Union[str, os.PathLike[str]]) -> str:
    name = os.fspath(path)
    if "\0" in name:
        raise SessionError(f"a path cannot have a NUL character in it: {name!r}")
    return name


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def write(path: Union[str, os.PathLike[str]], data: SessionData) -> int:
    """Writes a session atomically and returns its size: the file appears complete or not at all.

    Raises:
        SessionError: it could not be written; a file that was there before is intact.
    """
    target = os.path.realpath(_name(path))
    tokens = np.ascontiguousarray(data.tokens, dtype=_TOKEN).tobytes()
    try:
        extra = json.dumps(data.extra, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError) as error:
        raise SessionError(f"`extra` must be something that JSON can hold: {error}") from None
    logits = _logits_bytes(data.logits)
    sizes: dict[str, Any] = {"n_tokens": len(data.tokens), "extra_bytes": len(extra), "state_bytes": len(data.state)}
    sizes["n_logits"] = len(logits) // _LOGIT.itemsize
    sizes["checkpoints"], more = [], []
    for kept in data.checkpoints:
        same = common_prefix(kept.tokens, data.tokens)
        own = np.ascontiguousarray(kept.tokens[same:], dtype=_TOKEN).tobytes()
        after = _logits_bytes(kept.logits)
        sizes["checkpoints"].append([same, len(kept.tokens) - same, len(kept.state), len(after) // _LOGIT.itemsize])
        more += [own, kept.state, after]
    header = json.dumps({**data.header, **sizes}).encode()
    if os.path.isdir(target):
        raise SessionError(f"cannot save the session to {target}: it is a folder; name a file in it")
    parts = (_FIXED.pack(MAGIC, VERSION, len(header)), header, tokens, extra, data.state, logits, *more)
    try:
        with replacing_private(target) as temporary, open(temporary, "wb") as file:
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            return file.tell()
    except OSError as error:
        raise SessionError(f"cannot save the session to {target}: {_why(error)}") from error


def is_session(path: Union[str, os.PathLike[str]]) -> bool:
    """Whether a file begins as a session does."""
    try:
        with open(_name(path), "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _logits_bytes(logits: Optional[npt.NDArray[np.single]]) -> bytes:
    return b"" if logits is None else np.ascontiguousarray(logits, dtype=_LOGIT).tobytes()


def read(path: Union[str, os.PathLike[str]]) -> SessionData:
    """Reads and verifies a session file.

    Raises:
        SessionError: it cannot be read, is not a session file, is of another version, is truncated or was altered.
    """
    with _opened(path) as (name, file, size):
        return _parse(name, file, _head(name, file, size))


def look(path: Union[str, os.PathLike[str]], verify: bool = False) -> tuple[Head, Any]:
    """What a session file says of itself, and its `extra`; the state is not read, or, with `verify`, not kept.

    Raises:
        SessionError: as `read` does; that the rest of the file is as it was written is known only with `verify`.
    """
    with _opened(path) as (name, file, size):
        head = _head(name, file, size)
        file.seek(_TOKEN.itemsize * head.n_tokens, os.SEEK_CUR)
        extra = _note(name, file.read(head.extra_bytes))
        if verify:
            file.seek(0)
            digest, left = hashlib.sha256(), size - _DIGEST
            while left > 0 and (some := file.read(min(left, _HASHED_AT_ONCE))):
                digest.update(some)
                left -= len(some)
            _require_digest(name, digest.digest(), file.read())
        return head, extra


@contextlib.contextmanager
def _opened(path: Union[str, os.PathLike[str]]) -> Iterator[tuple[str, BinaryIO, int]]:
    """The name, the file and its size."""
    name = _name(path)
    try:
        with open(name, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise SessionError(f"{name} is not a regular file")
            yield name, file, info.st_size
    except OSError as error:
        raise SessionError(f"cannot read the session {name}: {_why(error)}") from error
    except MemoryError:
        raise SessionError(f"there is not enough memory to read the session {name}") from None


def _head(name: str, file: BinaryIO, size: int) -> Head:
    """Leaves the file where the tokens begin."""
    fixed = file.read(_FIXED.size)
    if fixed[: len(MAGIC)] != MAGIC:
        raise SessionError(f"{name} is not a session file: it does not begin with {MAGIC.decode()}")
    if len(fixed) < _FIXED.size:
        raise SessionError(f"{name} is truncated: {size} bytes")
    _, version, header_bytes = _FIXED.unpack(fixed)
    if not _OLDEST <= version <= VERSION:
        raise SessionError(
            f"{name} has session format {version}, this program reads formats {_OLDEST} to {VERSION}: "
            "use the version of indexmem-edge that saved it"
        )
    room = size - _FIXED.size - _DIGEST
    if header_bytes > min(_MAX_HEADER, max(room, 0)):
        raise SessionError(f"{name} is truncated or damaged: {size} bytes, with a header of {header_bytes}")
    raw = file.read(header_bytes)
    fields = _fields(name, raw)
    n_tokens, extra_bytes, state_bytes = (_size(name, fields, key) for key in ("n_tokens", "extra_bytes", "state_bytes"))
    n_logits = _size(name, fields, "n_logits") if version > 1 else 0
    checkpoints = _checkpoints(name, fields, n_tokens) if version > 2 else ()
    header = {k: v for k, v in fields.items() if k not in _SIZES}
    head = Head(version, header, n_tokens, extra_bytes, state_bytes, n_logits, checkpoints, fixed + raw, size)
    length = _TOKEN.itemsize * n_tokens + extra_bytes + state_bytes + _LOGIT.itemsize * n_logits + head.checkpoint_bytes
    if length != room - header_bytes:
        expected = length + size - (room - header_bytes)
        raise SessionError(f"{name} is truncated or damaged: expected {expected} bytes, found {size}")
    return head


def _parse(name: str, file: BinaryIO, head: Head) -> SessionData:
    digest = hashlib.sha256(head.raw)

    def part(n: int) -> bytes:
        data = file.read(n)
        if len(data) < n:
            raise SessionError(f"{name} has become shorter while it was read")
        digest.update(data)
        return data

    def logits(n: int) -> Optional[npt.NDArray[np.single]]:
        data = part(_LOGIT.itemsize * n)
        return np.frombuffer(data, dtype=_LOGIT).astype(np.single) if n else None

    tokens, extra = part(_TOKEN.itemsize * head.n_tokens), part(head.extra_bytes)
    state, after = part(head.state_bytes), logits(head.n_logits)
    ids = np.frombuffer(tokens, dtype=_TOKEN).astype(np.int32)
    checkpoints = []
    for size in head.checkpoints:
        own = np.frombuffer(part(_TOKEN.itemsize * size.n_tokens), dtype=_TOKEN).astype(np.int32)
        checkpoints.append(SavedCheckpoint(np.concatenate([ids[: size.same], own]), part(size.state_bytes), logits(size.n_logits)))
    _require_digest(name, digest.digest(), file.read())
    return SessionData(head.header, ids, _note(name, extra), state, after, tuple(checkpoints))


def _require_digest(name: str, found: bytes, expected: bytes) -> None:
    if found != expected:
        raise SessionError(f"{name} is damaged: its checksum does not match its content")


def _note(name: str, extra: bytes) -> Any:
    try:
        return json.loads(extra.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        raise SessionError(f"{name} is damaged: its extra part is not JSON") from None


_SIZES = ("n_tokens", "extra_bytes", "state_bytes", "n_logits", "checkpoints")


def _fields(name: str, header: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise SessionError(f"{name} is damaged: its header is not a JSON object")
    return fields


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _size(name: str, fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if not _is_size(value):
        raise SessionError(f"{name} is damaged: {key} is {value!r}")
    return value


def _checkpoints(name: str, fields: dict[str, Any], n_tokens: int) -> tuple[_CheckpointSize, ...]:
    listed = fields.get("checkpoints")
    if not isinstance(listed, list) or len(listed) > _MAX_CHECKPOINTS:
        raise SessionError(f"{name} is damaged: checkpoints is no list of at most {_MAX_CHECKPOINTS}")
    for sizes in listed:
        if not isinstance(sizes, list) or len(sizes) != 4 or not all(map(_is_size, sizes)) or sizes[0] > n_tokens:
            raise SessionError(f"{name} is damaged: the sizes of a checkpoint are {str(sizes)[:80]}")
    return tuple(_CheckpointSize(*sizes) for sizes in listed)
