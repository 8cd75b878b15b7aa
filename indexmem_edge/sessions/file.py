"""The session file: bytes on disk, without any knowledge of models.

    magic "IMEMSESS" | u32 version | u32 header bytes | header: JSON | token ids: i32 each | extra: JSON | KV state
    | logits after the last token: f32 each | SHA-256 of everything before it

Version 1 had no logits, and is read, too.

All numbers are little-endian. The header says how long the other parts are, so the size of the file is known before
anything is read, and nothing larger than the file is ever allocated.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, Optional, Union

import numpy as np
import numpy.typing as npt

from ..errors import SessionError
from ..files.atomic import replacing_private

MAGIC = b"IMEMSESS"
VERSION = 2
_OLDEST = 1
_FIXED = struct.Struct("<8sII")
_DIGEST = hashlib.sha256().digest_size
_MAX_HEADER = 1 << 20
_TOKEN = np.dtype("<i4")
_LOGIT = np.dtype("<f4")


@dataclass(frozen=True)
class SessionData:
    """What a session file carries. `header` holds plain JSON values."""

    header: dict[str, Any]
    tokens: npt.NDArray[np.int32]
    extra: Any
    state: bytes
    logits: Optional[npt.NDArray[np.single]] = None  # after the last token, one per token of the vocabulary


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
    logits = b"" if data.logits is None else np.ascontiguousarray(data.logits, dtype=_LOGIT).tobytes()
    sizes = {"n_tokens": len(data.tokens), "extra_bytes": len(extra), "state_bytes": len(data.state)}
    sizes["n_logits"] = len(logits) // _LOGIT.itemsize
    header = json.dumps({**data.header, **sizes}).encode()
    if os.path.isdir(target):
        raise SessionError(f"cannot save the session to {target}: it is a folder; name a file in it")
    parts = (_FIXED.pack(MAGIC, VERSION, len(header)), header, tokens, extra, data.state, logits)
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


def read(path: Union[str, os.PathLike[str]]) -> SessionData:
    """Reads and verifies a session file.

    Raises:
        SessionError: it cannot be read, is not a session file, is of another version, is truncated or was altered.
    """
    name = _name(path)
    try:
        with open(name, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise SessionError(f"{name} is not a regular file")
            return _parse(name, file, info.st_size)
    except OSError as error:
        raise SessionError(f"cannot read the session {name}: {_why(error)}") from error
    except MemoryError:
        raise SessionError(f"there is not enough memory to read the session {name}") from None


def _parse(name: str, file: BinaryIO, size: int) -> SessionData:
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
    header = file.read(header_bytes)
    fields = _fields(name, header)
    lengths = [_TOKEN.itemsize * _size(name, fields, "n_tokens")]
    lengths += [_size(name, fields, key) for key in ("extra_bytes", "state_bytes")]
    lengths.append(_LOGIT.itemsize * _size(name, fields, "n_logits") if version > 1 else 0)
    if sum(lengths) != room - header_bytes:
        expected = sum(lengths) + size - (room - header_bytes)
        raise SessionError(f"{name} is truncated or damaged: expected {expected} bytes, found {size}")
    tokens, extra, state, logits = (file.read(n) for n in lengths)
    digest = hashlib.sha256()
    for part in (fixed, header, tokens, extra, state, logits):
        digest.update(part)
    if digest.digest() != file.read():
        raise SessionError(f"{name} is damaged: its checksum does not match its content")
    try:
        note = json.loads(extra.decode("utf-8", "surrogatepass"))
    except ValueError:
        raise SessionError(f"{name} is damaged: its extra part is not JSON") from None
    ids = np.frombuffer(tokens, dtype=_TOKEN).astype(np.int32)
    after = np.frombuffer(logits, dtype=_LOGIT).astype(np.single) if logits else None
    return SessionData({k: v for k, v in fields.items() if k not in _SIZES}, ids, note, state, after)


_SIZES = ("n_tokens", "extra_bytes", "state_bytes", "n_logits")


def _fields(name: str, header: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise SessionError(f"{name} is damaged: its header is not a JSON object")
    return fields


def _size(name: str, fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or value < 0:
        raise SessionError(f"{name} is damaged: {key} is {value!r}")
    return value
