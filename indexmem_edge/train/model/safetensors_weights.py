"""Decoders from a folder as Hugging Face has them: config.json and safetensors files, in one piece or in shards.

Weights get the names and the order of dimensions that the model's GGUF file has, because what is trained is run with
that file: Hugging Face rotates halves of a head in every architecture, a llama GGUF file neighbours, so the rows of its
queries and keys are in another order (`huggingface_names`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from indexmem_edge.convert import safefile
from indexmem_edge.convert.safefile import SafeTensor

from ...errors import ConvertError, ModelFileError
from ...files.untrusted import quote, show
from .architectures import check_tensors
from .decoder import Decoder, stored_dtype
from .huggingface import read_config, text_settings
from .huggingface_names import Stored, as_in_gguf, by_gguf_name, sizes

_TYPES = ("F64", "F32", "F16", "BF16")
_MAX_JSON = 64 << 20


def load_safetensors(
    folder: Union[str, os.PathLike[str]],
    dtype: torch.dtype = torch.bfloat16,
    device: Union[str, torch.device] = "cpu",
    n_ctx: Optional[int] = None,
) -> Decoder:
    """Reads a model, tensor by tensor, straight into `dtype` on `device`; norms stay float32.

    Args:
        n_ctx: as of `load_gguf`.

    Raises:
        ModelFileError: a file is missing or damaged, or tensors and configuration contradict each other.
        ModelNotSupported: the model is fine, but nothing that training knows.
    """
    path = Path(folder)
    where = str(path)
    if not path.is_dir():
        raise ModelFileError(f"{where} is not a folder: name one with config.json and *.safetensors files")
    arch, settings = text_settings(where, _json(path / "config.json"))
    try:
        found = by_gguf_name(where, arch, _tensors(path))
    except ConvertError as error:
        raise ModelFileError(str(error)) from None
    if settings.get("tie_word_embeddings") is True:
        found.pop("output.weight", None)  # a copy of the embedding, if it was saved at all
    embedding = found.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(f"{where} lacks the matrix model.embed_tokens.weight: is it a language model?")
    config = read_config(where, arch, settings, embedding.shape[0], n_ctx)
    check_tensors(where, config, sizes(found))
    if "output.weight" not in found and settings.get("tie_word_embeddings") is not True:
        raise ModelFileError(f"{where} lacks lm_head.weight, and its config.json does not say tie_word_embeddings")
    for piece in (piece for stored in found.values() for piece in stored.pieces):
        if piece.dtype not in _TYPES:
            raise ModelFileError(
                f"{where}: tensor {quote(piece.name)} has type {piece.dtype}, expected one of {', '.join(_TYPES)}: name a folder "
                "with weights that are not quantised"
            )
    weights: dict[str, Tensor] = {}
    for name, number, tensor in _read(found):
        stored = found[name]
        for part, w in as_in_gguf(config, name, tensor).items():
            if part not in weights:
                shape = (len(stored.pieces), *w.shape) if stored.stacked else w.shape
                weights[part] = torch.empty(shape, dtype=stored_dtype(part, dtype), device=device)
            out = weights[part][number] if stored.stacked else weights[part]
            out.copy_(w)
            if not torch.isfinite(out).all():
                of = quote(stored.pieces[number].name)
                raise ModelFileError(f"{where}: tensor {of} has values that are not finite in {out.dtype}")
    return Decoder(config, weights)


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelFileError(f"{path} has {path.stat().st_size} bytes: it is no configuration")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist: name a folder with a model in the format of Hugging Face") from None
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} is damaged: {quote(str(error), 200)}") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} is damaged: expected an object, found {show(content)}")
    return content


def _tensors(folder: Path) -> Iterator[SafeTensor]:
    """All tensors of the model, each once, as the headers of its files describe them."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = _json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(_is_plain(file) for file in shards.values()):
            raise ModelFileError(f"{index} is damaged: weight_map must name a file in the same folder for each tensor")
        for file in sorted(set(shards.values())):
            here = safefile.load(_present(folder / file, f"; {index.name} names it")).tensors
            wanted = [name for name in shards if shards[name] == file]
            if absent := [name for name in wanted if name not in here]:
                raise ModelFileError(f"{folder / file} lacks {quote(absent[0])}, which {index.name} says it has")
            yield from (here[name] for name in wanted)
        return
    single = folder / "model.safetensors"
    yield from safefile.load(_present(single, " and there is no index of shards")).tensors.values()


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _present(file: Path, why: str) -> Path:
    if not file.is_file():
        raise ModelFileError(f"{file} is missing{why}: is the folder complete?")
    return file


def _read(found: Mapping[str, Stored]) -> Iterator[tuple[str, int, Tensor]]:
    """One tensor at a time with the number of its expert, out of one mapped file at a time."""
    everything = [(name, i, piece) for name, stored in found.items() for i, piece in enumerate(stored.pieces)]
    for path in sorted({piece.path for _, _, piece in everything}):
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                for name, i, piece in everything:
                    if piece.path == path:
                        yield name, i, file.get_tensor(piece.name)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"cannot read {path}: {quote(str(error), 200)}") from None
