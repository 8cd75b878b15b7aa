"""The sidecar of a calibration: what it is made from, and how the measured memory gets into it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union

from indexmem_edge.convert import Checkpoint, ConvertError, Provenance, bind, read_base_model, read_sidecar
from indexmem_edge.convert.model import TOOL
from indexmem_edge.convert.sources import file_sha256
from indexmem_edge.convert.spec import MEMORIES, find
from indexmem_edge.convert.writer import Written, write_sidecar

from ..files.atomic import check_target, same_file

PathLike = Union[str, "os.PathLike[str]"]


@dataclass(frozen=True)
class Source:
    """The checkpoint that gets a memory, and a type that holds its matrices without loss."""

    checkpoint: Checkpoint
    outtype: str = "f32"


def check_output(out: PathLike, inputs: Sequence[PathLike], force: bool) -> None:
    """Refuses, before minutes are spent, an output that cannot be written or is to be read."""
    check_target(out, force)
    if any(same_file(path, out) for path in inputs):
        raise ConvertError(f"{os.fspath(out)} is to be read as well: name another file to write")


def open_source(model: str, sidecar: Optional[PathLike], fingerprint: bool) -> Source:
    """The sidecar, checked against its base model; without one, a checkpoint that holds nothing yet.

    Raises:
        ConvertError: the sidecar is damaged, or for another model.
    """
    if sidecar is None:
        base = read_base_model(model, fingerprint)
        empty: list[dict[str, Any]] = [{} for _ in range(base.geometry.block_count)]
        provenance = Provenance("indexmem-edge")
        return Source(bind(Checkpoint(base.geometry, "none", {}, empty, provenance), base))
    found = read_sidecar(sidecar)
    wanted = fingerprint and found.checkpoint.fingerprint is not None  # one without is meant for fine-tunes, too
    try:
        checkpoint = bind(found.checkpoint, read_base_model(model, wanted))
    except ConvertError as error:
        raise ConvertError(f"{os.fspath(sidecar)} does not fit {model}: {error}") from None
    return Source(checkpoint, _lossless(found.checkpoint, found.types))


def _lossless(checkpoint: Checkpoint, types: Mapping[str, str]) -> str:
    matrices = [name for name, (_, matrix) in checkpoint.shapes().items() if matrix]
    found = {types[f"blk.{i}.indexmem.{name}"] for i in checkpoint.numbers for name in matrices}
    return found.pop().lower() if len(found) == 1 else "f32"


def write_calibrated(
    path: PathLike,
    source: Source,
    layers: tuple[int, ...],
    memory: str,
    constants: Mapping[str, Any],
    texts: Sequence[str],
    defaults: Mapping[str, int],
    scores: Mapping[str, float],
    force: bool,
) -> Written:
    """Writes the source with that memory in place of any it had.

    Args:
        layers: those that a budget bounds. A source that holds nothing yet becomes a file for these.
        texts: the files it was measured on; their names and hashes join those of the source.
        defaults: written unless the source has its own.
    """
    c = source.checkpoint
    p = c.provenance
    measured_on = [(os.path.basename(text), file_sha256(Path(text))) for text in texts]
    sources = dict.fromkeys([*zip(p.source_files, p.source_sha256), *measured_on])
    tensors = {t.name for kind in (c.kinds[0], find(MEMORIES, "memory", memory)) for t in kind.tensors}
    calibrated = replace(
        c,
        memory=memory,
        memory_constants=constants,
        only=layers if c.kind == c.memory == "none" else c.only,
        layers=[{name: a for name, a in layer.items() if name in tensors} for layer in c.layers],
        defaults={**defaults, **c.defaults},
        scores={**c.scores, **scores},
        provenance=replace(
            p, tool=TOOL, source_files=tuple(s[0] for s in sources), source_sha256=tuple(s[1] for s in sources)
        ),
    )
    return write_sidecar(path, calibrated, source.outtype, force)
