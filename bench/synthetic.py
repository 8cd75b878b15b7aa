"""Random weights of real shapes, for measurements of cost: models that nobody has to download, sidecars that nobody has
to train. What they compute is noise; how long it takes is not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from indexmem_edge.convert import read_base_model
from indexmem_edge.convert.model import Checkpoint, Geometry, Provenance
from indexmem_edge.convert.writer import write_sidecar

from .cached import cache_folder, write_once
from .runner import BenchError, Model, llama_cpp

N_VOCAB = 512
_WEIGHTS = {"q4_0": (2 + 16, 4.61), "q8_0": (2 + 32, 73.9)}  # bytes of 32 values, deviation of random bytes as values

_MIXTURES = {"q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
WEIGHTS = (*_WEIGHTS, *_MIXTURES)


@dataclass(frozen=True)
class Shape:
    """What of a model decides the cost of its cache and its indexer."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int = 0  # needed to write a model


GEOMETRIES = {
    "qwen3-4b": Shape("qwen3", 36, 2560, 32, 8, 128, 9728),
    "qwen3-8b": Shape("qwen3", 36, 4096, 32, 8, 128, 12288),
    "llama-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192),
    "demo": Shape("llama", 30, 576, 9, 3, 64, 1536),  # SmolLM2-135M
}

_RETENTION: dict[str, Any] = {"norm_eps": 1e-5, "pos_slope": 1e-3, "age_scale": 4096.0, "decay": True}

_RESIDUAL: dict[str, Any] = {"gate_logit": 0.0, "eta_raw": 0.0, "decay_logit": 5.0, "enabled": True}

# networks of the sizes that their authors released; constants that cost nothing are made up
VARIANTS: dict[str, Callable[[Shape], tuple[str, dict[str, Any]]]] = {
    "retention": lambda s: ("retention", {"trunk": "mlp", "mid_dim": 256, **_RETENTION}),
    "retention-linear": lambda s: ("retention", {"trunk": "linear", "mid_dim": 0, **_RETENTION}),
    "kvzap": lambda s: ("kvzap", {"mid_dim": max(s.n_embd // 8, 1)}),
    "fast_kvzip": lambda s: (
        "fast_kvzip",
        {"group_count": s.n_head // s.n_head_kv, "dim": 16, "base_count": 16, "norm_eps": 1e-6},
    ),
    "pairwise": lambda s: (
        "pairwise",
        {
            "head_count": max(s.n_head // 2, 1),
            "head_dim": max(s.head_dim // 4, 1),
            "norm_eps": 1e-6,
            "reduce": "mean",
            "query_count": 128,
        },
    ),
}


def shape_of(model: Model) -> Shape:
    """The shape of a loaded model."""
    base = read_base_model(model.path, False)
    g = base.geometry
    heads = g.head_count or llama_cpp.llama_model_n_head(model.raw.model)
    return Shape(
        architecture=base.architecture,
        n_layer=g.block_count,
        n_embd=g.embedding_length,
        n_head=heads,
        n_head_kv=g.head_count_kv,
        head_dim=g.key_length or g.embedding_length // max(heads, 1),
    )


def random_sidecar(
    path: Path,
    shape: Shape,
    variant: str,
    outtype: str = "f16",
    seed: int = 0,
    fingerprint: str | None = None,
    **constants: Any,
) -> Path:
    """Writes a sidecar with random weights; `constants` replace those of the variant."""
    kind, values = VARIANTS[variant](shape)
    empty = _checkpoint(shape, kind=kind, constants={**values, **constants}, fingerprint=fingerprint)
    return _write_drawn(path, empty, outtype, seed)


def random_memory(path: Path, shape: Shape, seed: int = 0) -> Path:
    """Writes a sidecar with a residual memory alone, of as many features as a head has dimensions."""
    layers = {name: [value] * shape.n_layer for name, value in _RESIDUAL.items()}
    constants = {"feature_dim": shape.head_dim, "head_dim": shape.head_dim, "eps": 1e-6, **layers}
    empty = _checkpoint(shape, kind="none", constants={}, memory="residual", memory_constants=constants)
    return _write_drawn(path, empty, "f32", seed)


def _checkpoint(shape: Shape, **values: Any) -> Checkpoint:
    return Checkpoint(
        geometry=Geometry(shape.n_layer, shape.n_embd, shape.n_head_kv, shape.n_head, shape.head_dim),
        layers=[],
        provenance=Provenance("indexmem-edge", ("random",), ("0" * 64,), tool="indexmem-edge, random weights"),
        architecture=shape.architecture,
        **values,
    )


def _write_drawn(path: Path, empty: Checkpoint, outtype: str, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    names = empty.shapes()
    count = empty.geometry.block_count
    layers = [{name: _draw(rng, name, size) for name, (size, _) in names.items()} for _ in range(count)]
    write_sidecar(path, replace(empty, layers=layers), outtype, force=True)
    return path


def has_matrices(shape: Shape, variant: str) -> bool:
    """Whether the type of the matrices makes a difference."""
    kind, values = VARIANTS[variant](shape)
    geometry = Geometry(shape.n_layer, shape.n_embd, shape.n_head_kv)
    tensors = Checkpoint(geometry, kind, values, [], Provenance("indexmem-edge")).shapes()
    return any(matrix for _, matrix in tensors.values())


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.1) * values
    return values * np.float32(0.1 if len(shape) == 1 else shape[-1] ** -0.5)


def cached_model(shape: Shape, weights: str = "q4_0", folder: Path | None = None) -> Path:
    """A model with random weights of that shape; written once, then found again in a folder for temporary files."""
    if weights not in WEIGHTS:
        raise BenchError(f"unknown type of weights {weights!r}: choose one of {', '.join(WEIGHTS)}")
    folder = folder or cache_folder()
    name = f"{shape.architecture}-{shape.n_layer}x{shape.n_embd}-{shape.n_head}-{shape.n_head_kv}-{shape.n_ff}"

    def write(path: Path) -> None:
        if weights in _WEIGHTS:
            _write_model(path, shape, weights)
        else:
            _quantise(cached_model(shape, "q8_0", folder), path, weights)

    try:
        return write_once(folder / f"random-{name}-{weights}.gguf", write)
    except OSError as error:
        raise BenchError(
            f"cannot write a model to {folder}: {error.strerror or error}; name a folder with --cache"
        ) from None


def _quantise(source: Path, path: Path, weights: str) -> None:
    """`path`: the same model in one of llama.cpp's mixtures of types, by its own quantiser."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = _MIXTURES[weights], True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)) != 0:
        raise BenchError(f"{source.name} cannot be made {weights}: llama.cpp's quantiser refused it, its message is above")


def _write_model(path: Path, shape: Shape, weights: str) -> None:
    """All layers have the same weights, each its own copy in the file."""
    rng = np.random.default_rng(0)
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    d, one = shape.n_embd, np.ones
    layer = {
        "attn_norm": one(d, np.float32),
        "attn_q": _blocks(rng, weights, n_q, d),
        "attn_k": _blocks(rng, weights, n_kv, d),
        "attn_v": _blocks(rng, weights, n_kv, d),
        "attn_output": _blocks(rng, weights, d, n_q),
        "ffn_norm": one(d, np.float32),
        "ffn_gate": _blocks(rng, weights, shape.n_ff, d),
        "ffn_up": _blocks(rng, weights, shape.n_ff, d),
        "ffn_down": _blocks(rng, weights, d, shape.n_ff),
    }
    if shape.architecture == "qwen3":
        layer |= {"attn_q_norm": one(shape.head_dim, np.float32), "attn_k_norm": one(shape.head_dim, np.float32)}
    tensors = {
        "token_embd": _blocks(rng, weights, N_VOCAB, d),
        "output_norm": one(d, np.float32),
        "output": _blocks(rng, weights, N_VOCAB, d),
        **{f"blk.{il}.{name}": a for il in range(shape.n_layer) for name, a in layer.items()},
    }
    kind = gguf.GGMLQuantizationType[weights.upper()]
    writer = gguf.GGUFWriter(path, shape.architecture)
    _metadata(writer, shape)
    for name, a in tensors.items():
        writer.add_tensor(f"{name}.weight", a, raw_dtype=kind if a.dtype == np.uint8 else None)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name("random weights")
    writer.add_context_length(40960)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    # one token a byte; spaces have one of their own
    kind = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581"]
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256, kind.NORMAL]
    tokens += [f"[{i}]" for i in range(N_VOCAB - len(tokens))]
    types += [kind.NORMAL] * (N_VOCAB - len(types))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)


def _blocks(rng: np.random.Generator, weights: str, n_out: int, n_in: int) -> np.ndarray:
    """Random bytes whose scales make a matrix that keeps the size of what it is applied to."""
    size, deviation = _WEIGHTS[weights]
    if n_in % 32:
        raise BenchError(f"rows of {n_in} values cannot be {weights}: it takes multiples of 32")
    blocks = np.frombuffer(rng.bytes(n_out * n_in // 32 * size), np.uint8).reshape(-1, size).copy()
    blocks[:, :2] = np.frombuffer(np.float16(n_in**-0.5 / deviation).tobytes(), np.uint8)
    return blocks.reshape(n_out, -1)
