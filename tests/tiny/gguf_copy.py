"""Copies of GGUF files with something changed: dequantised, fewer layers, other metadata, other tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import gguf
import numpy as np

Stored = tuple[np.ndarray, gguf.GGMLQuantizationType]  # as in the file: bytes where the type is quantised


def copy_model(
    source: Path,
    target: Path,
    *,
    metadata: Optional[Mapping[str, Any]] = None,
    tensor: Callable[[str, Stored], Optional[Stored]] = lambda name, stored: stored,
    more: Optional[Mapping[str, np.ndarray]] = None,
    per_file: int = 0,
) -> Path:
    """Metadata are named with their architecture; None takes one away, and so does `tensor` that returns None.

    Args:
        per_file: tensors of each file, if there are to be several; they are named after the target, and the first is returned.
    """
    reader = gguf.GGUFReader(source)
    metadata = dict(metadata or {})
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents(), split_max_tensors=per_file)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, kinds = metadata.pop(name, field.contents()), field.types
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value) if isinstance(value, (list, str)) else kinds[0]
            writer.add_key_value(name, value, kind, kinds[-1] if len(kinds) > 1 else None)
    for name, value in metadata.items():
        kind = gguf.GGUFValueType.UINT32 if isinstance(value, np.uint32) else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(name, value, kind)
    for t in reader.tensors:
        if (stored := tensor(t.name, (t.data, t.tensor_type))) is not None:
            writer.add_tensor(t.name, stored[0], raw_dtype=stored[1])
    for name, a in (more or {}).items():
        writer.add_tensor(name, a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}-00001-of-*.gguf"))[0] if per_file else target


def as_f32(name: str, stored: Stored) -> Stored:
    """The `tensor` that dequantises."""
    return gguf.quants.dequantize(*stored), gguf.GGMLQuantizationType.F32


def first_layers(n: int) -> Callable[[str, Stored], Optional[Stored]]:
    """The `tensor` that dequantises, and leaves out all layers from the n-th on."""

    def tensor(name: str, stored: Stored) -> Optional[Stored]:
        kept = not name.startswith("blk.") or int(name.split(".")[1]) < n
        return as_f32(name, stored) if kept else None

    return tensor
