"""The files that a person named, opened once and without trust, for the formats to look at."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.atomic import same_file
from indexmem_edge.files.untrusted import check_text, quote, show

from . import safefile, torchfile
from .basemodel import BaseModel
from .model import Array, Provenance
from .safefile import SafeFile, SafeTensor

_MAX_JSON = 4 << 20
_CHUNK = 1 << 20

TORCH, SAFETENSORS, JSON = "a PyTorch file", "a safetensors file", "a JSON file"


@dataclass(frozen=True)
class ReadOptions:
    """What a person knows and a checkpoint does not say. None: not given."""

    base: Optional[BaseModel] = None
    kv_heads: Optional[int] = None
    reduce: Optional[str] = None
    query_count: Optional[int] = None


@dataclass(frozen=True)
class SourceFile:
    """One file: `content` is what torch.save stored, a SafeFile, or the value of a JSON file."""

    path: Path
    type: str
    content: Any

    @property
    def keys(self) -> list[str]:
        """Names at the top level that are texts; none if the content has no names."""
        content = self.content.tensors if isinstance(self.content, SafeFile) else self.content
        return [k for k in content if isinstance(k, str)] if isinstance(content, Mapping) else []


@dataclass
class Sources:
    """All files of one checkpoint."""

    files: list[SourceFile]

    def of(self, *types: str) -> list[SourceFile]:
        """Files of these types."""
        return [f for f in self.files if f.type in types]

    def one(self, what: str, *types: str) -> SourceFile:
        """The only file of these types; ConvertError if there is none, or more than one."""
        found = self.of(*types)
        if len(found) != 1:
            raise ConvertError(f"{what} is {' or '.join(types)}, one; found {len(found)} of them")
        return found[0]

    def expect_only(self, *used: SourceFile) -> None:
        """Raises ConvertError if a file was named that the format has no use for."""
        extra = [f for f in self.files if f not in used]
        if extra:
            raise ConvertError(f"{extra[0].path} does not belong to a checkpoint of this format")

    def add(self, path: Path) -> SourceFile:
        """Opens one more file, found beside the others."""
        self.files.append(_open(path))
        return self.files[-1]

    def provenance(self, source_format: str, step: Any = None, trained_on: Optional[str] = None) -> Provenance:
        """Names and hashes of all files."""
        names = tuple(f.path.name for f in self.files)
        hashes = tuple(file_sha256(f.path) for f in self.files)
        return Provenance(source_format, names, hashes, trained_on, step)


def open_sources(paths: Sequence[Union[str, os.PathLike[str]]]) -> Sources:
    """Opens files, and for a folder its config.json and its only .safetensors file.

    Raises:
        ConvertError: one is missing, damaged, or nothing that a checkpoint could be.
    """
    if not paths:
        raise ConvertError("name the checkpoint to convert")
    opened: list[SourceFile] = []
    for path in (p for given in paths for p in _expand(Path(given))):
        if any(same_file(path, other.path) for other in opened):
            raise ConvertError(f"{path} was named twice")
        opened.append(_open(path))
    return Sources(opened)


def _expand(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    weights = sorted(path.glob("*.safetensors"))
    if len(weights) != 1 or not (path / "config.json").is_file():
        raise ConvertError(
            f"{path} is a folder with {len(weights)} .safetensors files and {'a' if _has_config(path) else 'no'} "
            "config.json: expected one and one, as KVzap has them; or name the files"
        )
    yield weights[0]
    yield path / "config.json"


def _has_config(path: Path) -> bool:
    return (path / "config.json").is_file()


def _open(path: Path) -> SourceFile:
    check_text("the name of a source file", path.name)
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise ConvertError(f"{path} is not a regular file")
        if info.st_size == 0:
            raise ConvertError(f"{path} is empty")
        with open(path, "rb") as file:
            head = file.read(4)
        if head == b"GGUF":
            raise ConvertError(f"{path} is a GGUF file already: --export FILE.safetensors turns a sidecar back")
        if torchfile.is_torch_file(path):
            return SourceFile(path, TORCH, torchfile.load(path))
        if safefile.is_safetensors(path):
            return SourceFile(path, SAFETENSORS, safefile.load(path))
        if path.suffix == ".json" or head[:1] == b"{":
            return SourceFile(path, JSON, _json(path, info.st_size))
    except (OSError, ValueError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    raise ConvertError(
        f"{path} begins with {head!r}: expected a PyTorch file (a zip archive, as torch.save writes since 1.6), "
        "a safetensors file or a JSON file; it is something else, or truncated"
    )


def _json(path: Path, size: int) -> Any:
    if size > _MAX_JSON:
        raise ConvertError(f"{path} has {size} bytes, too many for a configuration")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is not JSON: {error}") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; ConvertError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                digest.update(chunk)
    except OSError as error:
        raise ConvertError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()


def to_array(name: str, value: Any) -> Array:
    """A tensor of a source as float32, widened exactly.

    Raises:
        ConvertError: it is no tensor of floating-point numbers.
    """
    return value.read() if isinstance(value, SafeTensor) else torchfile.to_array(name, value)


def mapping(what: str, value: Any) -> Mapping[str, Any]:
    """A dictionary with texts as keys; ConvertError otherwise."""
    if not isinstance(value, Mapping):
        raise ConvertError(f"{what} must be a dictionary, found {show(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ConvertError(f"{what} has a key that is no text: {show(key)}")
    return value


def expect_keys(what: str, value: Mapping[str, Any], required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises ConvertError, naming the key, if one of `required` is missing or one is in neither list."""
    for key in required:
        if key not in value:
            raise ConvertError(f"{what}: {key!r} is missing")
    for key in value:
        if key not in required and key not in optional:
            raise ConvertError(f"{what}: unexpected key {quote(key)}")
