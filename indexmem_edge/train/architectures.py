"""Which models training knows, and which tensors their files must and may have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..convert.text import quote, some
from ..errors import ModelFileError, ModelNotSupported
from .decoder import Config

Shape = tuple[int, ...]
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """What sets one of them apart. Tensors are named without `blk.<layer>.`"""

    interleaved: bool  # the order of rotated pairs in its GGUF files
    rope_factors: bool = False  # its files may have divisors of rotary frequencies
    needed: frozenset[str] = frozenset()  # in every layer, besides what all of them have
    optional: frozenset[str] = frozenset()  # in a layer
    output_bias: bool = False


_QKV_BIAS = frozenset(f"attn_{x}.bias" for x in "qkv")
_OTHER_BIAS = frozenset(f"{x}.bias" for x in ("attn_output", "ffn_gate", "ffn_up", "ffn_down"))
ARCHITECTURES = {  # what llama.cpp loads and computes with
    "llama": Architecture(True, rope_factors=True, optional=_QKV_BIAS | _OTHER_BIAS),
    "qwen2": Architecture(False, optional=_QKV_BIAS, output_bias=True),
    "qwen3": Architecture(False, needed=frozenset({"attn_q_norm.weight", "attn_k_norm.weight"}), optional=_QKV_BIAS),
}
KNOWN = "llama, qwen2 and qwen3 models with dense layers, full attention and plain softmax"


def architecture(where: str, name: str) -> Architecture:
    """
    Raises:
        ModelNotSupported: training does not know it.
    """
    if name not in ARCHITECTURES:
        raise ModelNotSupported(f"{where} has the architecture {quote(name)}: training supports {KNOWN}")
    return ARCHITECTURES[name]


def unsupported(where: str, feature: str) -> ModelNotSupported:
    return ModelNotSupported(f"{where} has {feature}: training supports {KNOWN}")


def check_config(where: str, c: Config) -> None:
    """
    Raises:
        ModelFileError: numbers that contradict each other.
        ModelNotSupported: a head is not rotated as a whole, which llama.cpp does not run in these architectures.
    """
    if c.n_head % c.n_head_kv:
        raise ModelFileError(f"{where} is damaged: {c.n_head} query heads cannot share {c.n_head_kv} KV heads")
    if c.head_dim % 2:
        raise ModelFileError(f"{where} is damaged: heads of {c.head_dim} dimensions cannot be rotated in pairs")
    if c.rope.base <= 1:
        raise ModelFileError(f"{where} is damaged: the base of its rotary frequencies is {c.rope.base}")
    if c.rope.n_dim != c.head_dim:
        raise unsupported(
            where, f"{c.rope.n_dim} rotated dimensions of {c.head_dim}, and llama.cpp runs {c.architecture} only with all"
        )  # fmt: skip


def shapes(c: Config) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Tensors that a model must and may have, by name, in PyTorch's order of dimensions [out, in]."""
    arch = ARCHITECTURES[c.architecture]
    d, q, kv = c.n_embd, c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    matrices = {
        "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q),
        "ffn_gate": (c.n_ff, d), "ffn_up": (c.n_ff, d), "ffn_down": (d, c.n_ff),
    }  # fmt: skip
    layer: dict[str, Shape] = {f"{name}.weight": shape for name, shape in matrices.items()}
    layer |= {"attn_norm.weight": (d,), "ffn_norm.weight": (d,)}
    layer |= {name: (c.head_dim,) for name in arch.needed}
    extra: dict[str, Shape] = {name: matrices[name.removesuffix(".bias")][:1] for name in arch.optional}
    must: dict[str, Shape] = {"token_embd.weight": (c.n_vocab, d), "output_norm.weight": (d,)}
    may: dict[str, Shape] = {"output.weight": (c.n_vocab, d)}
    if arch.output_bias:
        may["output.bias"] = (c.n_vocab,)
    if arch.rope_factors:
        may[ROPE_FACTORS] = (c.head_dim // 2,)
    for il in range(c.n_layer):
        must |= {f"blk.{il}.{name}": shape for name, shape in layer.items()}
        may |= {f"blk.{il}.{name}": shape for name, shape in extra.items()}
    return must, may


def check_tensors(where: str, c: Config, found: Mapping[str, Shape]) -> None:
    """Compares the tensors of a file, by their GGUF names, with what its architecture computes with.

    Raises:
        ModelFileError: some are missing, or of another shape.
        ModelNotSupported: some are left over, so the model computes something else.
    """
    if c.n_layer > len(found):  # said before a list of them is made
        raise ModelFileError(f"{where} is damaged: {c.n_layer} layers and only {len(found)} tensors")
    must, may = shapes(c)
    if missing := [name for name in must if name not in found]:
        fused = [name for name in found if name.endswith("attn_qkv.weight")]
        hint = f"; it has {quote(fused[0])} instead, which training does not split" if fused else ""
        raise ModelFileError(f"{where} lacks the tensors {some(missing)} of a {c.architecture} model{hint}")
    if surplus := [name for name in found if name not in must and name not in may]:
        raise unsupported(where, f"the tensors {some(surplus)}, which training would leave out")
    for name, shape in found.items():
        expected = must.get(name) or may[name]
        if shape != expected:
            raise ModelFileError(
                f"{where} is damaged: tensor {quote(name)} is {list(shape)} (output, input), expected {list(expected)}"
            )


def check_factors(where: str, values: Iterable[float]) -> tuple[float, ...]:
    """The content of rope_freqs.weight.

    Raises:
        ModelFileError: some are not positive.
    """
    factors = tuple(values)
    if not all(0 < v < math.inf for v in factors):
        raise ModelFileError(f"{where} is damaged: {ROPE_FACTORS} must have positive numbers only")
    return factors
