"""`indexmem-edge`: this project's own safetensors checkpoints, which `convert/checkpoint.py` defines."""

from __future__ import annotations

from dataclasses import replace

from ..checkpoint import METADATA_KEY, from_safefile
from ..model import Checkpoint
from ..safefile import SafeFile
from ..sources import SAFETENSORS, ReadOptions, Sources

NAME = "indexmem-edge"


def detect(sources: Sources) -> bool:
    """A safetensors file with our metadata."""
    return any(isinstance(f.content, SafeFile) and METADATA_KEY in f.content.metadata for f in sources.of(SAFETENSORS))


def read(sources: Sources, options: ReadOptions) -> Checkpoint:
    """Reads the file. What it says of data and training step stays; it is itself the source of what is written next.

    Raises:
        ConvertError: its metadata or a tensor is not as it should be.
    """
    file = sources.one("a checkpoint of indexmem-edge", SAFETENSORS)
    sources.expect_only(file)
    assert isinstance(file.content, SafeFile)
    checkpoint = from_safefile(file.content)
    was = checkpoint.provenance
    return replace(checkpoint, provenance=sources.provenance(NAME, was.step, was.trained_on))
