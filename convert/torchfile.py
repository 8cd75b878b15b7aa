"""Reads `.pt` files of unknown origin: tensors and plain values, never code.

`torch.load` in its restricted mode is one lock, and it has been picked: CVE-2025-32434 runs code in releases before
2.6. So older releases are refused, and so is every file that is not an uncompressed zip archive of weights.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from typing import Any, Union

import numpy as np

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.untrusted import quote

from .model import Array

_HOW = "pip install --upgrade torch"
_MIN_TORCH = (2, 6)
_MAX_PICKLE = 64 << 20  # names and shapes of tensors, not their data


def is_torch_file(path: Union[str, os.PathLike[str]]) -> bool:
    """Whether a file begins like the zip archives that torch.save writes."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load(path: Union[str, os.PathLike[str]]) -> Any:
    """What torch.save stored, with tensors on the CPU.

    Raises:
        ConvertError: torch is missing or too old, or the file is not one of torch.save, is damaged, or holds something
            else than tensors and plain values.
    """
    name = os.fspath(path)
    _check_archive(name)
    torch = _torch(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(name, weights_only=True, map_location="cpu")
    except MemoryError:
        raise ConvertError(f"there is not enough memory to read {name}") from None
    except Exception as error:  # damaged archives fail in as many ways as there are bytes
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"Unsupported \w+:? ([\w.]+)", str(error))
        if refused:
            raise ConvertError(
                f"{name} holds {quote(refused.group(1))}, which is not a tensor or a plain value and could run code: "
                "it was not loaded. Save only tensors, numbers and texts in it"
            ) from None
        raise ConvertError(f"{name} is not a readable PyTorch file: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return quote(text.splitlines()[0], 200) if text else type(error).__name__


def _torch(name: str) -> Any:
    try:
        import torch
    except ImportError:
        raise ConvertError(f"reading {name} takes PyTorch: {_HOW}") from None
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < _MIN_TORCH:
        raise ConvertError(
            f"PyTorch {torch.__version__} can run code out of a file even in its restricted mode (CVE-2025-32434): "
            f"2.6 or newer is needed, {_HOW}"
        )
    return torch


def _check_archive(name: str) -> None:
    """A zip archive that holds a pickle and raw storages, and nothing that grows when it is read."""
    if not is_torch_file(name):
        raise ConvertError(
            f"{name} is not a PyTorch file of 1.6 or newer: expected a zip archive, as torch.save writes it"
        )
    try:
        with zipfile.ZipFile(name) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise ConvertError(f"{name} is truncated or damaged: {error}") from None
    pickles = [e for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ConvertError(f"{name} is not a PyTorch file: expected one data.pkl in it, found {len(pickles)}")
    if any(e.filename.rpartition("/")[2] == "constants.pkl" for e in entries):
        raise ConvertError(f"{name} is a TorchScript program, which is code: a checkpoint of weights is needed")
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise ConvertError(f"{name} is compressed, which torch.save never does")
    if sum(e.file_size for e in entries) > os.path.getsize(name) or pickles[0].file_size > _MAX_PICKLE:
        raise ConvertError(f"{name} is damaged: its parts are larger than they can be")


def to_array(name: str, value: Any) -> Array:
    """A dense floating-point tensor as float32; float16 and bfloat16 are widened exactly.

    Raises:
        ConvertError: it is something else.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise ConvertError(f"{quote(name)} must be a tensor, found a {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise ConvertError(f"{quote(name)} is not an ordinary dense tensor")
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ConvertError(f"{quote(name)} is {value.dtype}, expected floating-point numbers")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ConvertError(f"{quote(name)} claims {list(value.shape)}, more than is stored for it")  # a view, stride 0
    return np.array(value.detach().to(torch.float32).numpy(), order="C")
