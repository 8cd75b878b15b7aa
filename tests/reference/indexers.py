"""The indexers of docs/sidecar.md in plain NumPy, random ones to test with, and a writer of sidecars.

Letters in shapes: T tokens, N tokens so far, n entries of a cache, d embedding length, H KV heads, w width of the
trunk, c floats of state, Hs heads of the state (H, or 1 if all heads share a score).

Weights are [out, in] as in PyTorch, by the names of docs/sidecar.md; GGUF names the same dimensions in the opposite
order. `indexers_torch.py` has the same networks again, as PyTorch modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import gguf
import numpy as np

Weights = dict[str, np.ndarray]

# everything that docs/sidecar.md marks M; all else is F32
MATRICES = {"input_proj.weight", "in_proj.weight", "q_proj.weight", "k_proj.weight", "w_q.weight", "w_k.weight"}

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact form."""
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def softplus(x: np.ndarray) -> np.ndarray:
    """The identity above 20, as in PyTorch."""
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """[..., n] -> [..., n]"""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight + bias


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """[..., n] -> [..., n]"""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


@dataclass(frozen=True)
class Indexer:
    """One sidecar's indexer: constants and weights."""

    kind: str
    n_embd: int
    n_head_kv: int
    constants: dict[str, Any]  # the keys indexmem.<kind>.*
    layers: list[Weights]  # the tensors blk.<layer>.indexmem.*

    def state(self, il: int, hidden: np.ndarray) -> np.ndarray:
        """hidden [T, d] -> float64 [T, Hs, c]

        retention: m and, with decay, lambda; pairwise: the key; the others: the score
        """
        return STATES[self.kind](self, self.layers[il], hidden.astype(np.float64))

    def queries(self, il: int, hidden: np.ndarray) -> Optional[np.ndarray]:
        """What ranks need of recent tokens: hidden [T, d] -> float64 [T, n_i*d_i + n_i] for pairwise, q and c."""
        return pairwise_queries(self, self.layers[il], hidden.astype(np.float64)) if self.kind == "pairwise" else None

    def rank(
        self, state: np.ndarray, positions: np.ndarray, last: int, queries: Optional[np.ndarray] = None
    ) -> np.ndarray:
        """Ranks [n] of the entries of one head, of which the newest token is at `last`.

        state [n, c], positions [n], queries [N, ...] of all tokens
        """
        c = self.constants
        if self.kind == "retention":
            magnitude, decay = state[:, 0], (state[:, 1] if c["decay"] else np.zeros(len(state)))
            return intercept(magnitude, decay, positions, c) + decay * last / c["age_scale"]
        if self.kind == "pairwise":
            assert queries is not None
            return pairwise_rank(state, queries[-c["query_count"] :], c["head_count"], c["reduce"])
        return state[:, 0]


def intercept(magnitude: np.ndarray, decay: np.ndarray, positions: np.ndarray, constants: dict[str, Any]) -> np.ndarray:
    """e_j = m_j + pos_slope*j - lambda_j*j/T, the paper's stored form. The rank at position i is e_j + lambda_j*i/T."""
    return magnitude + constants["pos_slope"] * positions - decay * positions / constants["age_scale"]


def retention_trunk(indexer: Indexer, w: Weights, hidden: np.ndarray) -> np.ndarray:
    """[T, d] -> [T, w]"""
    eps = indexer.constants["norm_eps"]
    x = layer_norm(hidden, w["in_norm.weight"], w["in_norm.bias"], eps)
    if indexer.constants["trunk"] == "linear":
        return x
    return gelu(layer_norm(x @ w["input_proj.weight"].T, w["mid_norm.weight"], w["mid_norm.bias"], eps))


def retention_state(indexer: Indexer, w: Weights, hidden: np.ndarray) -> np.ndarray:
    x = retention_trunk(indexer, w, hidden)
    state = [x @ w["magnitude_proj.weight"].T]
    if indexer.constants["decay"]:
        state.append(-softplus(x @ w["retention_proj.weight"].T + w["retention_proj.bias"]))
    return np.stack(state, axis=-1)


def kvzap_state(indexer: Indexer, w: Weights, hidden: np.ndarray) -> np.ndarray:
    x = hidden
    if indexer.constants["mid_dim"]:
        x = gelu(x @ w["in_proj.weight"].T + w["in_proj.bias"])
    return (x @ w["out_proj.weight"].T + w["out_proj.bias"])[..., None]


def fast_kvzip_state(indexer: Indexer, w: Weights, hidden: np.ndarray) -> np.ndarray:
    c, H = indexer.constants, indexer.n_head_kv
    dim, eps = c["dim"], c["norm_eps"]
    q = (hidden @ w["q_proj.weight"].T + w["q_proj.bias"]).reshape(len(hidden), H, c["group_count"], dim)
    k = (hidden @ w["k_proj.weight"].T).reshape(len(hidden), H, dim)
    q, k = rms_norm(q, w["q_norm.weight"], eps), rms_norm(k, w["k_norm.weight"], eps)
    own = np.einsum("thgi,thi->thg", q, k) / math.sqrt(dim) + w["b"]
    base = np.einsum("thgi,hni->thgn", q, w["k_base"]) / math.sqrt(dim)
    return (1 / (1 + np.exp(base - own[..., None]).sum(axis=-1))).mean(axis=-1)[..., None]


def pairwise_state(indexer: Indexer, w: Weights, hidden: np.ndarray) -> np.ndarray:
    k = hidden @ w["w_k.weight"].T + w["w_k.bias"]
    return layer_norm(k, w["k_norm.weight"], w["k_norm.bias"], indexer.constants["norm_eps"])[:, None]


def pairwise_queries(indexer: Indexer, w: Weights, hidden: np.ndarray) -> np.ndarray:
    c = indexer.constants
    n_head, dim = c["head_count"], c["head_dim"]
    q = (hidden @ w["w_q.weight"].T + w["w_q.bias"]).reshape(len(hidden), n_head, dim)
    q = layer_norm(q, w["q_norm.weight"], w["q_norm.bias"], c["norm_eps"])
    weights = (hidden @ w["weights_proj.weight"].T + w["weights_proj.bias"]) / math.sqrt(n_head * dim)
    return np.concatenate([q.reshape(len(hidden), -1), weights], axis=-1)


def pairwise_rank(keys: np.ndarray, queries: np.ndarray, n_head: int, reduce: str) -> np.ndarray:
    """keys [n, d_i], queries [s, n_i*d_i + n_i] -> [n]"""
    q, weights = np.split(queries, [n_head * keys.shape[-1]], axis=-1)
    q = q.reshape(len(queries), n_head, -1)
    scores = np.einsum("sh,shn->sn", weights, np.maximum(np.einsum("shi,ni->shn", q, keys), 0))
    return scores.mean(axis=0) if reduce == "mean" else scores.max(axis=0)


STATES: dict[str, Callable[[Indexer, Weights, np.ndarray], np.ndarray]] = {
    "retention": retention_state,
    "kvzap": kvzap_state,
    "fast_kvzip": fast_kvzip_state,
    "pairwise": pairwise_state,
}


# ---------------------------------------------------------------------------------------------- random indexers

# Constants are none of the defaults that anything could have built in; the age scale is a length of the tests' texts.
_RETENTION = {"norm_eps": 3e-5, "pos_slope": 2e-3, "age_scale": 48.0}
_PAIRWISE = {"head_count": 3, "head_dim": 12, "norm_eps": 2e-5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "retention-mlp": ("retention", _RETENTION | {"trunk": "mlp", "mid_dim": 32, "decay": True}),
    "retention-mlp-nodecay": ("retention", _RETENTION | {"trunk": "mlp", "mid_dim": 32, "decay": False}),
    "retention-linear": ("retention", _RETENTION | {"trunk": "linear", "mid_dim": 0, "decay": True}),
    "retention-linear-nodecay": ("retention", _RETENTION | {"trunk": "linear", "mid_dim": 0, "decay": False}),
    "kvzap-mlp": ("kvzap", {"mid_dim": 32}),
    "kvzap-linear": ("kvzap", {"mid_dim": 0}),
    "fast_kvzip": ("fast_kvzip", {"group_count": 3, "dim": 8, "base_count": 5, "norm_eps": 2e-6}),
    "pairwise-mean": ("pairwise", _PAIRWISE | {"reduce": "mean", "query_count": 11}),
    "pairwise-max": ("pairwise", _PAIRWISE | {"reduce": "max", "query_count": 40}),
}


def random_indexer(variant: str, n_layer: int, n_embd: int, n_head_kv: int, seed: int = 0) -> Indexer:
    """An indexer whose ranks are spread widely: in units of their deviation few entries are close to each other."""
    kind, constants = VARIANTS[variant]
    draw = np.random.default_rng([seed, *variant.encode()])
    shapes = tensor_shapes(kind, constants, n_embd, n_head_kv)
    return Indexer(kind, n_embd, n_head_kv, dict(constants), [_random_layer(shapes, draw) for _ in range(n_layer)])


def tensor_shapes(kind: str, c: dict[str, Any], d: int, H: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer and their shapes."""
    if kind == "retention":
        w = c["mid_dim"] or d
        shapes = {"in_norm.weight": (d,), "in_norm.bias": (d,), "magnitude_proj.weight": (H, w)}
        if c["trunk"] == "mlp":
            shapes |= {"input_proj.weight": (w, d), "mid_norm.weight": (w,), "mid_norm.bias": (w,)}
        if c["decay"]:
            shapes |= {"retention_proj.weight": (H, w), "retention_proj.bias": (H,)}
    elif kind == "kvzap":
        w = c["mid_dim"] or d
        shapes = {"out_proj.weight": (H, w), "out_proj.bias": (H,)}
        if c["mid_dim"]:
            shapes |= {"in_proj.weight": (w, d), "in_proj.bias": (w,)}
    elif kind == "fast_kvzip":
        g, dim, n = c["group_count"], c["dim"], c["base_count"]
        shapes = {
            "q_proj.weight": (H * g * dim, d), "q_proj.bias": (H * g * dim,), "k_proj.weight": (H * dim, d),
            "q_norm.weight": (dim,), "k_norm.weight": (dim,), "k_base": (H, n, dim), "b": (H, g),
        }  # fmt: skip
    else:
        n, dim = c["head_count"], c["head_dim"]
        shapes = {
            "w_q.weight": (n * dim, d), "w_q.bias": (n * dim,), "w_k.weight": (dim, d), "w_k.bias": (dim,),
            "weights_proj.weight": (n, d), "weights_proj.bias": (n,),
        } | {f"{x}_norm.{part}": (dim,) for x in "qk" for part in ("weight", "bias")}  # fmt: skip
    return shapes


def _random_layer(shapes: dict[str, tuple[int, ...]], draw: np.random.Generator) -> Weights:
    """Matrices keep the size of what they are applied to; that of the retention rate doubles it: the rate matters."""
    layer = {}
    for name, shape in shapes.items():
        a = draw.standard_normal(shape)
        if name.endswith("norm.weight"):
            a = 1.2 + 0.2 * a
        elif name.endswith("bias"):
            a *= 0.3
        elif name.endswith("weight"):
            a *= (2 if name == "retention_proj.weight" else 1) * shape[-1] ** -0.5
        layer[name] = a.astype(np.float32)
    return layer


# ---------------------------------------------------------------------------------------------- the file


def write_sidecar(
    path: str | Path,
    indexer: Indexer,
    outtype: str = "f32",
    *,
    architecture: str = "unknown",
    keys: Optional[dict[str, Any]] = None,
) -> Indexer:
    """Writes a sidecar and returns the indexer that a reader of it has: the matrices are rounded to `outtype`.

    `keys` are further keys, or replace those that would be written; None leaves one out.
    """
    meta = {
        "general.type": "adapter", "adapter.type": "indexmem", "indexmem.schema_version": 1,
        "indexmem.block_count": len(indexer.layers), "indexmem.embedding_length": indexer.n_embd,
        "indexmem.attention.head_count_kv": indexer.n_head_kv, "indexmem.indexer.kind": indexer.kind,
        "indexmem.indexer.input": "attention_input", "indexmem.memory.kind": "none",
        "indexmem.provenance.tool": "tests", "indexmem.provenance.source_format": "indexmem-edge",
        "indexmem.provenance.source_files": ["random"], "indexmem.provenance.source_sha256": ["0" * 64],
    }  # fmt: skip
    meta |= {f"indexmem.{indexer.kind}.{key}": value for key, value in indexer.constants.items()}
    meta |= keys or {}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in meta.items():
        if value is not None:
            _PUT[type(value)](writer, key, value)

    kind = gguf.GGMLQuantizationType[outtype.upper()]
    layers = []
    for il, layer in enumerate(indexer.layers):
        read = {}
        for name, a in layer.items():
            packed = gguf.quants.quantize(a, kind) if name in MATRICES and outtype != "f32" else a
            read[name] = gguf.quants.dequantize(packed, kind) if packed is not a else a
            writer.add_tensor(f"blk.{il}.indexmem.{name}", packed, raw_dtype=kind if packed is not a else None)
        layers.append(read)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return replace(indexer, layers=layers)


_PUT: dict[type, Callable[[gguf.GGUFWriter, str, Any], None]] = {
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
}
