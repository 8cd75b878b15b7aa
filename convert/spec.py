"""The one table of what a sidecar holds: constants and tensors of every kind, as in docs/sidecar.md.

Readers of source formats fill it, `model.Checkpoint.validated` checks against it, writers write what it lists. Shapes
are in PyTorch order (`[out, in]`); GGUF names the same bytes in the opposite order. A tensor of which a dimension is
zero does not exist: that is how options such as `mid_dim = 0` leave tensors out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, TypeVar

import numpy as np

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.untrusted import check_text, show

U32, F32, BOOL, STRING, F32S, BOOLS = "u32", "f32", "bool", "string", "f32 array", "bool array"
MAX_U32 = 2**32 - 1
LIMITS = {  # far above any model; they keep absurd files from reaching an allocation
    "block_count": 4096, "embedding_length": 1 << 20, "head_count_kv": 4096, "head_count": 65536, "key_length": 65536,
}  # fmt: skip

SHARE_KEY = "indexmem.budget_share"
LEAST_KEY = "indexmem.budget_least"
SHARES = 1 / 64, 64.0  # least and most of a budget that a KV head may get
MAX_LEAST = 1 << 20  # entries of a budget that one may get before the rest is shared
DIFFERENT_NEEDS = 4  # how many different pairs of the two there may be

Sizes = dict[str, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Constant:
    """One key. `low` and `high` bound a u32; `positive` asks every f32 to be above 0; arrays have one value a layer."""

    name: str
    type: str
    low: int = 0
    high: int = MAX_U32
    positive: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Tensor:
    """One tensor of every layer; `shape` names entries of the kind's sizes. Matrices may be stored in 16 or 8 bits."""

    name: str
    shape: tuple[str, ...]
    matrix: bool = False


@dataclass(frozen=True)
class Kind:
    """An indexer or a memory. `sizes` maps geometry and constants to numbers, and may refuse a combination. `ranks_heads`: an indexer
    ranks each KV head by itself."""

    name: str
    what: str
    constants: tuple[Constant, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    sizes: Callable[[Sizes, Mapping[str, Any]], Sizes] = lambda geometry, constants: {}
    ranks_heads: bool = True

    def shapes(self, geometry: Sizes, constants: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Tensors that every layer must have: name -> (shape in PyTorch order, whether it is a matrix)."""
        sizes = {**geometry, **self.sizes(geometry, constants)}
        found = {t.name: (tuple(sizes[s] for s in t.shape), t.matrix) for t in self.tensors}
        return {name: (shape, matrix) for name, (shape, matrix) in found.items() if 0 not in shape}


def _vector(name: str, size: str) -> Tensor:
    return Tensor(name, (size,))


def _affine(name: str, size: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a LayerNorm."""
    return _vector(f"{name}.weight", size), _vector(f"{name}.bias", size)


def _retention(g: Sizes, c: Mapping[str, Any]) -> Sizes:
    mid = c["mid_dim"]
    if (c["trunk"] == "mlp") != (mid > 0):
        raise ConvertError(f"a trunk {c['trunk']!r} with mid_dim {mid}: expected a width above 0 for mlp, 0 for linear")
    return {"m": mid, "w": mid or g["d"], "lambda": g["H"] if c["decay"] else 0}


def _fast_kvzip(g: Sizes, c: Mapping[str, Any]) -> Sizes:
    groups, dim = c["group_count"], c["dim"]
    return {"g": groups, "dim": dim, "n": c["base_count"], "k": g["H"] * dim, "q": g["H"] * groups * dim}


def _pairwise(g: Sizes, c: Mapping[str, Any]) -> Sizes:
    return {"n_i": c["head_count"], "d_i": c["head_dim"], "q": c["head_count"] * c["head_dim"]}


_EPS = Constant("norm_eps", F32, positive=True)
_NONE = Kind("none", "nothing")

INDEXERS = {kind.name: kind for kind in (
    Kind(
        "retention", "retention scorer of IndexMem++",
        (
            Constant("trunk", STRING, choices=("mlp", "linear")), Constant("mid_dim", U32, high=65536), _EPS,
            Constant("pos_slope", F32), Constant("age_scale", F32, positive=True), Constant("decay", BOOL),
            Constant("gate_scale", F32S, optional=True),
        ),
        (
            *_affine("in_norm", "d"), Tensor("input_proj.weight", ("m", "d"), True), *_affine("mid_norm", "m"),
            Tensor("magnitude_proj.weight", ("H", "w")), Tensor("retention_proj.weight", ("lambda", "w")),
            _vector("retention_proj.bias", "lambda"),
        ),
        _retention,
    ),
    Kind(
        "kvzap", "KVzap, arXiv 2601.07891",
        (Constant("mid_dim", U32, high=65536),),
        (
            Tensor("in_proj.weight", ("m", "d"), True), _vector("in_proj.bias", "m"),
            Tensor("out_proj.weight", ("H", "w")), _vector("out_proj.bias", "H"),
        ),
        lambda g, c: {"m": c["mid_dim"], "w": c["mid_dim"] or g["d"]},
    ),
    Kind(
        "fast_kvzip", "Fast-KVzip, arXiv 2601.17668",
        (
            Constant("group_count", U32, 1, 1024), Constant("dim", U32, 1, 1024), Constant("base_count", U32, 1, 4096),
            _EPS,
        ),
        (
            Tensor("q_proj.weight", ("q", "d"), True), _vector("q_proj.bias", "q"),
            Tensor("k_proj.weight", ("k", "d"), True), _vector("q_norm.weight", "dim"), _vector("k_norm.weight", "dim"),
            Tensor("k_base", ("H", "n", "dim")), Tensor("b", ("H", "g")),
        ),
        _fast_kvzip,
    ),
    Kind(
        "pairwise", "indexer of IndexMem v1, arXiv 2605.25475",
        (
            Constant("head_count", U32, 1, 1024), Constant("head_dim", U32, 1, 1024), _EPS,
            Constant("reduce", STRING, choices=("mean", "max")), Constant("query_count", U32, 1, 1024),
        ),
        (
            Tensor("w_q.weight", ("q", "d"), True), _vector("w_q.bias", "q"),
            Tensor("w_k.weight", ("d_i", "d"), True), _vector("w_k.bias", "d_i"),
            Tensor("weights_proj.weight", ("n_i", "d")), _vector("weights_proj.bias", "n_i"),
            *_affine("q_norm", "d_i"), *_affine("k_norm", "d_i"),
        ),
        _pairwise,
        ranks_heads=False,
    ),
    _NONE,
)}  # fmt: skip

MEMORIES = {kind.name: kind for kind in (
    Kind(
        "centroid", "centroid memory of IndexMem++",
        (Constant("slot_count", U32, 1, 4096), Constant("enabled", BOOLS), Constant("gate", F32S, positive=True)),
    ),
    Kind(
        "residual", "residual memory of IndexMem v1, arXiv 2605.25475",
        (
            Constant("feature_dim", U32, 1, 65536), Constant("head_dim", U32, 1, LIMITS["key_length"]),
            Constant("eps", F32, positive=True), Constant("gate_logit", F32S), Constant("eta_raw", F32S),
            Constant("decay_logit", F32S), Constant("enabled", BOOLS),
        ),
        (Tensor("phi_proj.weight", ("d_f", "D")),),
        lambda g, c: {"d_f": c["feature_dim"], "D": c["head_dim"]},
    ),
    _NONE,
)}  # fmt: skip


def find(table: Mapping[str, Kind], what: str, name: Any) -> Kind:
    """The kind of that name.

    Raises:
        ConvertError: there is none.
    """
    if not isinstance(name, str) or name not in table:
        raise ConvertError(f"unknown {what} kind {show(name)}: expected one of {', '.join(table)}")
    return table[name]


def check_u32(what: str, value: Any, low: int = 0, high: int = MAX_U32) -> int:
    """Returns an integer within bounds; ConvertError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ConvertError(f"{what} must be an integer from {low} to {high}, found {show(value)}")
    return int(value)


def check_f32(what: str, value: Any, positive: bool = False) -> float:
    """Returns the number as the nearest float32, which is what files hold; ConvertError if it is not finite there."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ConvertError(f"{what} must be a number, found {show(value)}")
    try:
        with np.errstate(over="ignore"):
            number = float(np.float32(float(value)))
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (positive and number <= 0):
        raise ConvertError(f"{what} must be a finite number{' above 0' if positive else ''}, found {show(value)}")
    return number


def _check_bool(what: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ConvertError(f"{what} must be true or false, found {show(value)}")
    return bool(value)


def _check_array(what: str, value: Any, n: int, item: Callable[[str, Any], Any]) -> list[Any]:
    if not isinstance(value, (list, tuple)) or len(value) != n:
        found = f"{len(value)} values" if isinstance(value, (list, tuple)) else show(value)
        raise ConvertError(f"{what} must have one value for each of {n} layers, found {found}")
    return [item(f"{what}[{i}]", v) for i, v in enumerate(value)]


def check_constants(kind: Kind, constants: Mapping[str, Any], n_layer: int) -> dict[str, Any]:
    """Returns the constants in the order of the table, checked and as exact as a file holds them.

    Raises:
        ConvertError: one is missing, unknown, of another type or out of range.
    """
    names = [c.name for c in kind.constants]
    for name in constants:
        if name not in names:
            raise ConvertError(f"unknown constant {show(name)} of {kind.name}: expected {', '.join(names) or 'none'}")
    out: dict[str, Any] = {}
    for c in kind.constants:
        if c.name not in constants:
            if c.optional:
                continue
            raise ConvertError(f"{kind.name}.{c.name} is missing: it cannot be recovered from the weights")
        out[c.name] = _check_constant(f"{kind.name}.{c.name}", c, constants[c.name], n_layer)
    return out


def _check_constant(what: str, c: Constant, value: Any, n_layer: int) -> Any:
    if c.type == U32:
        return check_u32(what, value, c.low, c.high)
    if c.type == F32:
        return check_f32(what, value, c.positive)
    if c.type == BOOL:
        return _check_bool(what, value)
    if c.type == F32S:
        return _check_array(what, value, n_layer, lambda item, v: check_f32(item, v, c.positive))
    if c.type == BOOLS:
        return _check_array(what, value, n_layer, _check_bool)
    text = check_text(what, value)
    if text not in c.choices:
        raise ConvertError(f"{what} must be one of {', '.join(c.choices)}, found {show(text)}")
    return text


def check_needs(
    shares: Any, least: Any, n_layer: int, n_head_kv: int, numbers: Sequence[int], ranks_heads: bool = True
) -> tuple[Optional[tuple[float, ...]], Optional[tuple[int, ...]]]:
    """What of a budget each KV head gets, and how many entries before the rest is shared, as exact as a file holds it; None stays None.
    Each is one number a layer, or one a KV head, layer by layer. `numbers` are the layers that a file is for; `ranks_heads` is whether
    the indexer ranks each head by itself.

    Raises:
        ConvertError: not so many numbers, out of range, too many different pairs of them, or different ones for heads that are ranked
            together.
    """
    if shares is not None:
        shares = tuple(_check_needs("budget_share", shares, n_layer, n_head_kv, lambda item, v: check_f32(item, v, True)))
        for i, share in enumerate(shares):
            if not SHARES[0] <= share <= SHARES[1]:
                raise ConvertError(f"budget_share[{i}] must be from {SHARES[0]:g} to {SHARES[1]:g}, found {share:g}")
    if least is not None:
        least = tuple(_check_needs("budget_least", least, n_layer, n_head_kv, lambda item, v: check_u32(item, v, 0, MAX_LEAST)))
    pairs = list(zip(needs_of_heads(shares, n_layer, n_head_kv, 1.0), needs_of_heads(least, n_layer, n_head_kv, 0)))
    of_layers = {il: pairs[il * n_head_kv : (il + 1) * n_head_kv] for il in numbers}
    if (n := len({pair for heads in of_layers.values() for pair in heads})) > DIFFERENT_NEEDS:
        raise ConvertError(f"budget_share and budget_least have {n} different pairs of values: expected at most {DIFFERENT_NEEDS}")
    for il, heads in of_layers.items():
        if not ranks_heads and len(set(heads)) > 1:
            raise ConvertError(
                f"budget_share and budget_least tell KV heads of layer {il} apart, and this indexer ranks for all heads of a layer "
                "together: give them the same, or one value a layer"
            )
    return shares, least


def _check_needs(what: str, value: Any, n_layer: int, n_head_kv: int, check: Callable[[str, Any], Any]) -> list[Any]:
    of_heads = isinstance(value, Sequence) and len(value) == n_layer * n_head_kv
    return _check_array(what, value, n_layer * n_head_kv if of_heads else n_layer, check)


def needs_of_heads(values: Optional[Sequence[T]], n_layer: int, n_head_kv: int, default: T) -> list[T]:
    """One value a KV head, layer by layer: `values` has one for each layer or each head, or is None."""
    values = [default] * n_layer if values is None else values
    times = n_layer * n_head_kv // len(values)
    return [value for value in values for _ in range(times)]


def constant(kind: Kind, name: str) -> Optional[Constant]:
    """The entry of that name, if the kind has one."""
    return next((c for c in kind.constants if c.name == name), None)
