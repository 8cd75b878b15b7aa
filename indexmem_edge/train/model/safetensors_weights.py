"""Decoders from a folder as Hugging Face has them: config.json and safetensors files, in one piece or in shards.

Weights get the names and the order of dimensions that the model's GGUF file has, because what is trained is run with
that file: Hugging Face rotates halves of a head in every architecture, a llama GGUF file neighbours, so the rows of its
queries and keys are in another order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from indexmem_edge.convert import safefile
from indexmem_edge.convert.safefile import SafeTensor

from ...errors import ConvertError, ModelFileError
from ...files.untrusted import quote, show
from .architectures import ARCHITECTURES, check_tensors
from .decoder import Config, Decoder, stored_dtype
from .huggingface import read_config

_TYPES = ("F64", "F32", "F16", "BF16")
_IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # computed from the configuration
_MAX_JSON = 64 << 20
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def load_safetensors(
    folder: Union[str, os.PathLike[str]], dtype: torch.dtype = torch.bfloat16, device: Union[str, torch.device] = "cpu"
) -> Decoder:
    """Reads a model, tensor by tensor, straight into `dtype` on `device`; norms stay float32.

    Raises:
        ModelFileError: a file is missing or damaged, or tensors and configuration contradict each other.
        ModelNotSupported: the model is fine, but nothing that training knows.
    """
    path = Path(folder)
    where = str(path)
    if not path.is_dir():
        raise ModelFileError(f"{where} is not a folder: name one with config.json and *.safetensors files")
    raw = _json(path / "config.json")
    try:
        found = {_gguf_name(t.name): t for t in _tensors(path) if not t.name.endswith(_IGNORED)}
    except ConvertError as error:
        raise ModelFileError(str(error)) from None
    if raw.get("tie_word_embeddings") is True:
        found.pop("output.weight", None)  # a copy of the embedding, if it was saved at all
    embedding = found.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(f"{where} lacks the matrix model.embed_tokens.weight: is it a language model?")
    config = read_config(where, raw, embedding.shape[0])
    check_tensors(where, config, {name: t.shape for name, t in found.items()})
    if "output.weight" not in found and raw.get("tie_word_embeddings") is not True:
        raise ModelFileError(f"{where} lacks lm_head.weight, and its config.json does not say tie_word_embeddings")
    for t in found.values():
        if t.dtype not in _TYPES:
            raise ModelFileError(
                f"{where}: tensor {quote(t.name)} has type {t.dtype}, expected one of {', '.join(_TYPES)}: name a folder "
                "with weights that are not quantised"
            )
    weights: dict[str, Tensor] = {}
    for name, tensor in _read(found):
        weights[name] = out = torch.empty(tensor.shape, dtype=stored_dtype(name, dtype), device=device)
        out.copy_(_in_gguf_order(config, name, tensor))
        if not torch.isfinite(out).all():
            raise ModelFileError(f"{where}: tensor {quote(found[name].name)} has values that are not finite in {out.dtype}")
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


def _gguf_name(name: str) -> str:
    """A name that has no counterpart stays as it is, and is refused as left over."""
    stem, _, kind = name.rpartition(".")
    if stem in _MODEL:
        return f"{_MODEL[stem]}.{kind}"
    parts = stem.split(".", 3)
    if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] in _LAYER:
        return f"blk.{parts[2]}.{_LAYER[parts[3]]}.{kind}"
    return name


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


def _read(found: Mapping[str, SafeTensor]) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time, out of one mapped file at a time."""
    for path in sorted({t.path for t in found.values()}):
        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                for name, t in found.items():
                    if t.path == path:
                        yield name, file.get_tensor(t.name)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"cannot read {path}: {quote(str(error), 200)}") from None


def _in_gguf_order(config: Config, name: str, w: Tensor) -> Tensor:
    """Rows of queries and keys so that halves of a head become neighbours, where the GGUF file has them so."""
    kind = name.split(".")[-2]
    if not ARCHITECTURES[config.architecture].interleaved or kind not in ("attn_q", "attn_k"):
        return w
    heads = config.n_head if kind == "attn_q" else config.n_head_kv
    return w.unflatten(0, (heads, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
