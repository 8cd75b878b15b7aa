"""A copy of a model whose quantised weights are written out as bf16 or f16.

What a quantised model computes is the same but for the rounding of weights to 8 (bf16) or 11 bits; on CPUs that multiply such
numbers, long prompts take a fraction of the time. A measurement of quality is mostly long prompts.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from indexmem_edge.files.modelfile import check_model_file, fingerprint

from ..cached import cache_folder, write_once
from ..runner import BenchError

KINDS = {"bf16": gguf.GGMLQuantizationType.BF16, "f16": gguf.GGMLQuantizationType.F16}
_PLAIN = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")}
_FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "f16": gguf.LlamaFileType.MOSTLY_F16}


def converted(path: Path, kind: str, folder: Path | None = None) -> Path:
    """The copy, written once and then found again in a folder for temporary files. What is not quantised stays as it is.

    Raises:
        ModelFileError: there is no such model.
        BenchError: the kind is unknown, a type of weights cannot be read, or the copy cannot be written.
    """
    if kind not in KINDS:
        raise BenchError(f"unknown type of weights {kind!r}: choose one of {', '.join(KINDS)}")
    check_model_file(path)
    folder = folder or cache_folder()
    target = folder / f"{path.stem}-{fingerprint(path).partition('-')[2][:12]}-{kind}.gguf"
    try:
        return write_once(target, lambda draft: _write(draft, gguf.GGUFReader(path), kind))
    except OSError as error:
        raise BenchError(f"cannot write a copy of {path.name} to {folder}: {error.strerror or error}") from None
    except NotImplementedError as error:
        raise BenchError(f"cannot write out the weights of {path.name}: {error}; leave --weights out") from None


def _write(path: Path, model: gguf.GGUFReader, kind: str) -> None:
    """One tensor in memory at a time."""
    writer = gguf.GGUFWriter(path, model.fields["general.architecture"].contents())
    writer.data_alignment = model.alignment
    for field in model.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of_items)
    writer.add_file_type(_FILE_TYPES[kind])
    try:
        for tensor in model.tensors:
            if tensor.tensor_type in _PLAIN:
                data = tensor.data
                writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
            else:
                shape = [int(n) for n in reversed(tensor.shape)]
                size = 2 * int(np.prod(shape))
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.float16), size, KINDS[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in model.tensors:
            data = tensor.data
            if tensor.tensor_type not in _PLAIN:
                data = gguf.quants.quantize(gguf.quants.dequantize(data, tensor.tensor_type), KINDS[kind])
            writer.write_tensor_data(data)
    finally:
        writer.close()
