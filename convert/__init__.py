"""Checkpoints of any known format to sidecars (docs/sidecar.md), and back.

    from indexmem_edge.convert import read_base_model, read_sidecar, read_source, write_sidecar, ReadOptions

    base = read_base_model("model.gguf")
    checkpoint = read_source(["final.pt"], ReadOptions(base=base))
    write_sidecar("model.indexmem.gguf", checkpoint, outtype="f16")
    read_sidecar("model.indexmem.gguf").tensors["blk.0.indexmem.in_norm.weight"]

The way through: `formats/` (one file a format) -> `model.Checkpoint`, checked against `spec.py` -> `writer.py`. Files
are untrusted throughout, and every failure is a ConvertError. Neither the native library nor llama_cpp is loaded.
"""

from __future__ import annotations

from indexmem_edge.errors import ConvertError

from .basemodel import BaseModel, bind, read_base_model
from .checkpoint import read_checkpoint, write_checkpoint
from .formats import FORMATS, read_source
from .model import Checkpoint, Geometry, Provenance
from .sidecar import Sidecar, read_sidecar
from .sources import ReadOptions
from .writer import OUTTYPES, Written, write_sidecar

__all__ = [
    "FORMATS",
    "OUTTYPES",
    "BaseModel",
    "Checkpoint",
    "ConvertError",
    "Geometry",
    "Provenance",
    "ReadOptions",
    "Sidecar",
    "Written",
    "bind",
    "read_base_model",
    "read_checkpoint",
    "read_sidecar",
    "read_source",
    "write_checkpoint",
    "write_sidecar",
]
