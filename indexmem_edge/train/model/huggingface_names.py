"""What tensors are called in the folders of Hugging Face, and what they hold otherwise than in GGUF files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from indexmem_edge.convert.safefile import SafeTensor

from ...errors import ModelFileError
from ...files.untrusted import quote
from .architectures import ARCHITECTURES, fused_parts
from .decoder import Config

_IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # computed from the configuration
_IMAGES = re.compile(r"(model\.)?(visual|vision_tower|multi_modal_projector)\.")  # of the part that looks at them
_TEXT = re.compile(r"(model\.)?language_model\.(model\.)?")  # in front of the rest where there is such a part
_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_LAYER_OF = {  # of some architectures, besides and instead
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "qwen3moe": {"mlp.gate": "ffn_gate_inp"},
}  # fmt: skip
_EXPERT = re.compile(r"mlp\.experts\.(\d{1,6})\.(gate|up|down)_proj")
_ONE_MORE = ("gemma", "gemma3")  # whose norms multiply by 1 + w


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file, and what it is made of: one of the folder, or one for each expert."""

    pieces: tuple[SafeTensor, ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        one = self.pieces[0].shape
        return (len(self.pieces), *one) if self.stacked else one


def by_gguf_name(where: str, arch: str, tensors: Iterable[SafeTensor]) -> dict[str, Stored]:
    """The tensors of the text model. A name that has no counterpart stays as it is, and is refused as left over.

    Raises:
        ModelFileError: some experts of a layer are missing, or differ in shape.
    """
    found: dict[str, Stored] = {}
    experts: dict[str, dict[int, SafeTensor]] = {}
    for tensor in tensors:
        if tensor.name.endswith(_IGNORED) or _IMAGES.match(tensor.name):
            continue
        name, number = _gguf_name(arch, _text_name(tensor.name))
        if number is None:
            found[name] = Stored((tensor,))
        else:
            experts.setdefault(name, {})[number] = tensor
    for name, pieces in experts.items():
        if sorted(pieces) != list(range(len(pieces))):
            raise ModelFileError(f"{where} has the experts {_few(pieces)} of {quote(name)}: some are missing")
        if len({piece.shape for piece in pieces.values()}) > 1:
            raise ModelFileError(f"{where} is damaged: the experts of {quote(name)} differ in shape")
        found[name] = Stored(tuple(pieces[i] for i in range(len(pieces))), stacked=True)
    return found


def _text_name(name: str) -> str:
    """As in a model of text alone."""
    prefix = _TEXT.match(name)
    if prefix is None:
        return name
    rest = name[prefix.end() :]
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def _few(numbers: Iterable[int]) -> str:
    some = sorted(numbers)
    return ", ".join(map(str, some[:8])) + (", ..." if len(some) > 8 else "")


def _gguf_name(arch: str, name: str) -> tuple[str, int | None]:
    """With the number of the expert, if it belongs to one."""
    stem, _, kind = name.rpartition(".")
    if stem in _MODEL:
        return f"{_MODEL[stem]}.{kind}", None
    parts = stem.split(".", 3)
    if parts[:2] == ["model", "layers"] and len(parts) == 4:
        known = _LAYER | _LAYER_OF.get(arch, {})
        if parts[3] in known:
            return f"blk.{parts[2]}.{known[parts[3]]}.{kind}", None
        expert = _EXPERT.fullmatch(parts[3])
        if expert is not None and "expert_count" in ARCHITECTURES[arch].reads:
            return f"blk.{parts[2]}.ffn_{expert[2]}_exps.{kind}", int(expert[1])
    return name, None


def as_in_gguf(config: Config, name: str, w: Tensor) -> dict[str, Tensor]:
    """What a tensor, or that of one expert, is in the GGUF file: taken apart where it is fused, by the names of its parts.

    Rows of queries and keys are put so that halves of a head become neighbours, where the file has them so.
    """
    if parts := fused_parts(config, name):
        return dict(zip(parts, w.split(tuple(parts.values()))))
    kind = name.split(".")[-2]
    if config.architecture in _ONE_MORE and name.endswith("norm.weight"):
        w = w.to(torch.promote_types(w.dtype, torch.float32)) + 1
    if ARCHITECTURES[config.architecture].interleaved and kind in ("attn_q", "attn_k"):
        heads = config.n_head if kind == "attn_q" else config.n_head_kv
        w = w.unflatten(0, (heads, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return {name: w}


def sizes(found: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in found.items()}
