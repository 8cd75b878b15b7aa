"""Which models training knows, why not the others, and which tensors their files must and may have.

PyTorch is not needed here: `trainable` is for whoever asks before a training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import ModelFileError, ModelNotSupported
from ...files.untrusted import quote, some
from ...models import families

if TYPE_CHECKING:
    from .decoder import Config

Shape = tuple[int, ...]
ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS = (f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short"))
LONGROPE = "longrope"


@dataclass(frozen=True)
class Architecture:
    """What sets one of them apart. Tensors are named without `blk.<layer>.`"""

    interleaved: bool  # the order of rotated pairs in its GGUF files
    rope_factors: bool = False  # its files may have divisors of rotary frequencies
    long_factors: bool = False  # always two sets of them, for short and long contexts; else only with the scaling `longrope`
    partly_rotated: bool = False  # heads may be rotated in their first dimensions alone
    unrotated_every: int = 0  # every so many-th layer is not rotated
    needed: frozenset[str] = frozenset()  # in every layer, besides what all of them have
    optional: frozenset[str] = frozenset()  # in a layer
    output_bias: bool = False
    fused_gate: bool = False  # the gate is the first half of `ffn_up`
    gelu: bool = False
    scaled_embedding: bool = False  # by the root of its length
    sections: str = ""  # how pairs are shared out among the dimensions of a position (M-RoPE): in "runs", or in "turns"
    window_every: int = 0  # of so many layers, all but the last have a sliding window, unless the file says otherwise
    reads: frozenset[str] = frozenset()  # keys that mean nothing to the others, or what these do not compute


_QKV_BIAS = frozenset(f"attn_{x}.bias" for x in "qkv")
_OTHER_BIAS = frozenset(f"{x}.bias" for x in ("attn_output", "ffn_gate", "ffn_up", "ffn_down"))
_HEAD_NORMS = frozenset({"attn_q_norm.weight", "attn_k_norm.weight"})
_POST_NORMS = frozenset({"post_attention_norm.weight", "post_ffw_norm.weight"})
_MULTIPLIERS = frozenset({"embedding_scale", "residual_scale", "attention.scale", "logit_scale"})
ARCHITECTURES = {  # what llama.cpp loads and computes with
    "llama": Architecture(True, rope_factors=True, optional=_QKV_BIAS | _OTHER_BIAS),
    "qwen2": Architecture(False, optional=_QKV_BIAS, output_bias=True),
    "qwen3": Architecture(False, needed=_HEAD_NORMS, optional=_QKV_BIAS),
    "qwen3moe": Architecture(False, needed=_HEAD_NORMS, optional=_QKV_BIAS, reads=frozenset({"expert_count"})),
    "qwen2vl": Architecture(False, optional=_QKV_BIAS, output_bias=True, sections="runs"),
    "qwen3vl": Architecture(False, needed=_HEAD_NORMS, optional=_QKV_BIAS, sections="turns"),
    "qwen3vlmoe": Architecture(
        False, needed=_HEAD_NORMS, optional=_QKV_BIAS, sections="turns", reads=frozenset({"expert_count"})
    ),
    "phi3": Architecture(  # llama.cpp does not use the window that its files name
        False, rope_factors=True, long_factors=True, partly_rotated=True, optional=_QKV_BIAS, fused_gate=True,
        reads=frozenset({"attention.sliding_window"}),
    ),
    "smollm3": Architecture(True, unrotated_every=4, optional=_QKV_BIAS),
    "granite": Architecture(True, rope_factors=True, optional=_QKV_BIAS | _OTHER_BIAS, reads=_MULTIPLIERS),
    "gemma": Architecture(False, partly_rotated=True, optional=_QKV_BIAS, gelu=True, scaled_embedding=True),
    "gemma3": Architecture(
        False, partly_rotated=True, needed=_HEAD_NORMS | _POST_NORMS, optional=_QKV_BIAS, gelu=True, scaled_embedding=True,
        window_every=6, reads=frozenset({"attention.sliding_window", "final_logit_softcapping"}),
    ),
}  # fmt: skip
KNOWN = ", ".join(sorted(ARCHITECTURES))

_GRAPH = f"its graph is not among those that training computes ({KNOWN})"
_REASONS = {  # why nothing can be trained for an architecture, where more can be said than that
    "it has recurrent layers beside its attention, which training does not compute": families.HYBRID,
    "its attention is latent (MLA), one vector for the keys and values of all heads, which training does not compute":
        families.LATENT,
    "its attention has sinks, logits beside those of keys, which training does not compute": families.SINKS,
    "its positions have several dimensions (M-RoPE), which training knows in Qwen2-VL and Qwen3-VL alone":
        "hunyuan_vl paddleocr qwen3tts",
    "some of its layers read the keys and values of others, which training does not compute": families.SHARED,
    "its attention logits have a soft cap, which training does not compute": "gemma2 grok",
    "its layers attend in chunks, which training does not compute": "llama4",
}  # fmt: skip
_NO_BUDGET = {  # the same of those that no budget works for, so that neither another engine nor a policy is of use
    "it is recurrent: there are no keys and values to choose from": families.RECURRENT,
    "it has sparse attention with an indexer of its own": families.SPARSE,
    "its attention is biased by distance (ALiBi), and no budget can bound that": families.ALIBI,
    "it is an encoder or a diffusion model, without a cache to bound":
        " ".join((families.ENCODERS, families.DIFFUSION, families.BUCKETS, families.EMBEDDING, "wavtokenizer-dec")),
    "it is a draft head that works with the cache of another model": families.DRAFT,
}  # fmt: skip
_UNTRAINABLE = {name: reason for reason, names in {**_REASONS, **_NO_BUDGET}.items() for name in names.split()}
WITHOUT_TRAINING = "train with --engine native, or take a policy that needs no training, such as --kv-policy keydiff"


def trainable(name: str) -> str:
    """Why nothing can be trained for an architecture, by its name in GGUF files; "" if training knows it."""
    return "" if name in ARCHITECTURES else _UNTRAINABLE.get(name, _GRAPH)


def architecture(where: str, name: str) -> Architecture:
    """
    Raises:
        ModelNotSupported: training does not know it.
    """
    if reason := trainable(name):
        advice = "" if reason in _NO_BUDGET else f"; {WITHOUT_TRAINING}"
        raise ModelNotSupported(f"{where} has the architecture {quote(name)}: {reason}{advice}")
    return ARCHITECTURES[name]


def unsupported(where: str, feature: str) -> ModelNotSupported:
    return ModelNotSupported(f"{where} has {feature}, which training does not compute in this architecture; {WITHOUT_TRAINING}")


def check_config(where: str, c: Config) -> None:
    """
    Raises:
        ModelFileError: numbers that contradict each other.
        ModelNotSupported: a head is not rotated as a whole where llama.cpp does not run that.
    """
    if c.n_head % c.n_head_kv:
        raise ModelFileError(f"{where} is damaged: {c.n_head} query heads cannot share {c.n_head_kv} KV heads")
    if c.head_dim % 2 or c.rope.n_dim % 2:
        raise ModelFileError(
            f"{where} is damaged: heads of {c.head_dim} dimensions, {c.rope.n_dim} rotated, cannot be rotated in pairs"
        )
    for rope in (c.rope, c.window_rope):
        if rope is not None and rope.base <= 1:
            raise ModelFileError(f"{where} is damaged: the base of its rotary frequencies is {rope.base}")
    if c.rope.n_dim > c.head_dim:
        raise ModelFileError(f"{where} is damaged: {c.rope.n_dim} rotated dimensions of {c.head_dim}")
    if c.rope.n_dim < c.head_dim and not ARCHITECTURES[c.architecture].partly_rotated:
        raise unsupported(where, f"{c.rope.n_dim} rotated dimensions of {c.head_dim}")
    if c.n_expert_used > c.n_expert:
        raise ModelFileError(f"{where} is damaged: {c.n_expert_used} of {c.n_expert} experts for each token")


def factor_names(name: str, scaling: str) -> tuple[str, ...]:
    """The tensors with divisors of rotary frequencies that llama.cpp reads in an architecture, by the kind of scaling."""
    arch = ARCHITECTURES[name]
    if not arch.rope_factors:
        return ()
    return (LONG_FACTORS, SHORT_FACTORS) if arch.long_factors or scaling == LONGROPE else (ROPE_FACTORS,)


def shapes(c: Config) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Tensors that a model must and may have, by name, in PyTorch's order of dimensions [out, in]."""
    arch = ARCHITECTURES[c.architecture]
    d, q, kv = c.n_embd, c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    matrices: dict[str, Shape] = {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q)}
    dense: dict[str, Shape] = {"ffn_gate": (c.n_ff, d), "ffn_up": (c.n_ff, d), "ffn_down": (d, c.n_ff)}
    if c.n_expert:
        matrices |= {f"{name}_exps": (c.n_expert, *shape) for name, shape in dense.items()}
        matrices["ffn_gate_inp"] = (c.n_expert, d)
    else:
        matrices |= dense
    layer: dict[str, Shape] = {f"{name}.weight": shape for name, shape in matrices.items()}
    layer |= {"attn_norm.weight": (d,), "ffn_norm.weight": (d,)}
    layer |= {name: (c.head_dim,) if name in _HEAD_NORMS else (d,) for name in arch.needed}
    extra: dict[str, Shape] = {name: matrices[name.removesuffix(".bias")][:1] for name in arch.optional}
    must: dict[str, Shape] = {"token_embd.weight": (c.n_vocab, d), "output_norm.weight": (d,)}
    may: dict[str, Shape] = {"output.weight": (c.n_vocab, d)}
    if arch.output_bias:
        may["output.bias"] = (c.n_vocab,)
    for il in range(c.n_layer):
        must |= {f"blk.{il}.{name}": shape for name, shape in layer.items()}
        may |= {f"blk.{il}.{name}": shape for name, shape in extra.items()}
    return must, may


def fused_parts(c: Config, name: str) -> dict[str, int]:
    """What a fused tensor holds, in its order: the rows of each tensor. {} if it is none."""
    layer, _, kind = name.rpartition("attn_qkv.")
    if kind in ("weight", "bias"):
        q, kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
        return {f"{layer}attn_{x}.{kind}": n for x, n in (("q", q), ("k", kv), ("v", kv))}
    layer, _, kind = name.rpartition("ffn_up.")
    if kind == "weight" and ARCHITECTURES[c.architecture].fused_gate:
        return {f"{layer}ffn_gate.weight": c.n_ff, f"{layer}ffn_up.weight": c.n_ff}
    return {}


def check_tensors(where: str, c: Config, found: Mapping[str, Shape], factors: Iterable[str] = ()) -> None:
    """Compares the tensors of a file, by their GGUF names, with what its architecture computes with.

    Args:
        factors: those that may hold divisors of rotary frequencies.

    Raises:
        ModelFileError: some are missing, or of another shape.
        ModelNotSupported: some are left over, so the model computes something else.
    """
    if c.n_layer > len(found):  # said before a list of them is made
        raise ModelFileError(f"{where} is damaged: {c.n_layer} layers and only {len(found)} tensors")
    must, may = shapes(c)
    may |= dict.fromkeys(factors, (c.rope.n_dim // 2,))
    whole = _split(where, c, found)
    if missing := [name for name in must if name not in whole]:
        raise ModelFileError(f"{where} lacks the tensors {some(missing)} of a {c.architecture} model")
    if surplus := [name for name in whole if name not in must and name not in may]:
        raise ModelNotSupported(
            f"{where} has the tensors {some(surplus)}, which training would leave out; {WITHOUT_TRAINING}"
        )
    for name, shape in whole.items():
        expected = must.get(name) or may[name]
        if shape != expected:
            raise ModelFileError(
                f"{where} is damaged: tensor {quote(name)} is {list(shape)} (output, input), expected {list(expected)}"
            )


def _split(where: str, c: Config, found: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors as they are when those that are fused have been taken apart."""
    whole: dict[str, Shape] = {}
    for name, shape in found.items():
        parts = fused_parts(c, name)
        if parts and shape[:1] != (sum(parts.values()),):
            raise ModelFileError(
                f"{where} is damaged: tensor {quote(name)} is {list(shape)} (output, input), expected "
                f"{sum(parts.values())} rows: {', '.join(f'{n} of {part}' for part, n in parts.items())}"
            )
        for part, n in (parts or {name: shape[0] if shape else 0}).items():
            if part in whole or (part != name and part in found):
                raise ModelFileError(f"{where} is damaged: it has {quote(part)} twice, once in {quote(name)}")
            whole[part] = (n, *shape[1:]) if parts else shape
    return whole


def check_factors(where: str, name: str, values: Iterable[float]) -> tuple[float, ...]:
    """The content of a tensor with divisors of rotary frequencies.

    Raises:
        ModelFileError: some are not positive.
    """
    factors = tuple(values)
    if not all(0 < v < math.inf for v in factors):
        raise ModelFileError(f"{where} is damaged: {name} must have positive numbers only")
    return factors
