"""The decoder of a model, whatever it comes as."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional, Union

import torch

from .decoder import Decoder
from .gguf_weights import load_gguf
from .safetensors_weights import load_safetensors


def load_decoder(
    path: Union[str, os.PathLike[str]],
    dtype: torch.dtype = torch.bfloat16,
    device: Union[str, torch.device] = "cpu",
    n_ctx: Optional[int] = None,
) -> Decoder:
    """A GGUF file, or a folder with config.json and safetensors files. Numbers are those of the same model either way.

    Args:
        n_ctx: as of `load_gguf`.

    Raises:
        ModelFileError: it is neither, or damaged.
        ModelNotSupported: it is fine, but nothing that training knows.
    """
    return load_safetensors(path, dtype, device, n_ctx) if Path(path).is_dir() else load_gguf(path, dtype, device, n_ctx)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where there are instructions for it, which is four times as fast as float32; float32 elsewhere."""
    known = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.type != "cpu" or known else torch.float32
