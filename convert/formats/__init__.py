"""The source formats: a file each, with `detect` and `read`, and one table of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional, Union

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.untrusted import quote, some

from ..basemodel import bind
from ..model import Checkpoint
from ..sources import ReadOptions, Sources, open_sources
from . import edge, fast_kvzip, indexmem, kvzap, legacy, v1


class Format(NamedTuple):
    """A source format. `detect` looks at names only; `read` returns a checkpoint that is not yet validated."""

    name: str
    what: str
    detect: Callable[[Sources], bool]
    read: Callable[[Sources, ReadOptions], Checkpoint]


FORMATS = {f.name: f for f in (
    Format("indexmem", "native .pt of IndexMem++", indexmem.detect, indexmem.read),
    Format("indexmem-legacy", "legacy .pt of IndexMem++ with scorer.json", legacy.detect, legacy.read),
    Format("v1", "state dict of IndexMem v1: pairwise indexer, residual memory", v1.detect, v1.read),
    Format("kvzap", "folder of KVzap: config.json and safetensors", kvzap.detect, kvzap.read),
    Format("fast-kvzip", ".pt of Fast-KVzip", fast_kvzip.detect, fast_kvzip.read),
    Format("indexmem-edge", "safetensors of this project", edge.detect, edge.read),
)}  # fmt: skip


def read_source(
    paths: Sequence[Union[str, os.PathLike[str]]], options: Optional[ReadOptions] = None, format: Optional[str] = None
) -> Checkpoint:
    """Reads a checkpoint of any format, and compares it with the base model if `options` has one.

    Args:
        paths: its files, or a folder; companions such as scorer.json are found beside them.
        format: a name of FORMATS, or None to detect it.

    Raises:
        ConvertError: nothing can be made of the files, or they do not belong to the base model.
    """
    options = options or ReadOptions()
    if format is not None and format not in FORMATS:
        raise ConvertError(f"unknown format {quote(format)}: expected {', '.join(FORMATS)}")
    sources = open_sources(paths)
    chosen = FORMATS[format] if format else detect(sources)
    if chosen.name != "v1" and (options.reduce is not None or options.query_count is not None):
        raise ConvertError(f"--reduce and --query-count are for v1 checkpoints, this is {chosen.name}")
    checkpoint = chosen.read(sources, options).validated()
    if options.kv_heads not in (None, checkpoint.geometry.head_count_kv):
        raise ConvertError(f"--kv-heads {options.kv_heads}: this is for {checkpoint.geometry.head_count_kv} KV heads")
    return bind(checkpoint, options.base).validated() if options.base else checkpoint


def detect(sources: Sources) -> Format:
    """The format of the files, by the names in them.

    Raises:
        ConvertError: it is none of them, or more than one.
    """
    found = [f for f in FORMATS.values() if f.detect(sources)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConvertError(f"this could be {' or '.join(f.name for f in found)}: choose with --format")
    keys = [key for file in sources.files for key in file.keys]
    raise ConvertError(
        f"no known checkpoint: found {some(keys, 3) if keys else 'no names'}, expected "
        + "; ".join(f"{f.name} ({f.what})" for f in FORMATS.values())
    )


__all__ = ["FORMATS", "Format", "ReadOptions", "detect", "read_source"]
