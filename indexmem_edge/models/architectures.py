"""What works with which architecture of model: data for docs/models.md, `indexmem doctor -m` and `indexmem inspect`.

An architecture is what a GGUF file calls itself (`general.architecture`). The library decides by the model and not by this
table (`indexmem_model_supported`); tests compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..train.model.architectures import trainable
from . import families

# What layers keep of the past. A budget bounds the first; the size of the others does not depend on the text.
BOUNDED, WINDOW, RECURRENT = "bounded", "window", "recurrent"
WINDOW_BY_FILE = "window, if the file says so"

_LAYERS: dict[tuple[str, ...], str] = {
    (BOUNDED,):
        "apertus arcee arctic baichuan bailingmoe bailingmoe2 bitnet chameleon chatglm codeshell cogvlm command-r dbrx deci "
        "deepseek deepseek2 deepseek2-ocr dots1 ernie4_5 ernie4_5-moe exaone falcon gemma glm4 glm4moe gpt2 gptneox granite "
        "granitemoe grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 llama maincoder minicpm "
        "minicpm3 minimax-m2 mistral3 mistral4 nanbeige nemotron olmo olmoe openelm orion paddleocr pangu-embedded phi2 "
        "phi3 phimoe plamo plm pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3tts qwen3vl qwen3vlmoe seed_oss "
        "smollm3 stablelm starcoder starcoder2 talkie xverse",
    (BOUNDED, WINDOW_BY_FILE): "exaone4 gemma3 laguna llama4 mellum olmo2 plamo3 smallthinker",
    (BOUNDED, WINDOW):
        "afmoe cohere2 cohere2moe exaone-moe gemma2 gemma3n gemma4 gpt-oss granite_swa maple mimo2 muse-glimmer spark2_5 "
        "step35",
    (BOUNDED, RECURRENT): families.HYBRID,
}  # fmt: skip
_REFUSED = {  # in the words of the library, where it has some
    "sparse attention with an indexer of its own": families.SPARSE,
    "a recurrent model: its state has a fixed size already": families.RECURRENT,
    "ALiBi position biases, which need the distance to every key": families.ALIBI,
    "a scale and a soft cap on its attention that flash attention does not have": "grok",
    "a router layer behind its last layer, with a cache of its own": "graniteswitch",
    "a draft head that shares the cache of another model": families.DRAFT,
    "a diffusion model without a KV cache": families.DIFFUSION,
    "an encoder and relative position buckets": families.BUCKETS,
    "attention without a cache (an encoder)": families.EMBEDDING,
    "attention that is not causal (an encoder)": families.ENCODERS,
    "no layer with a KV cache": "clip gptj wavtokenizer-dec",
}  # fmt: skip
_LATENT = "latent attention (MLA): one row for all heads; no memory of what was evicted"
_TEXT = "text only: images are refused"
_NOTES = {
    **dict.fromkeys(f"{families.LATENT} {families.LATENT_HYBRID}".split(), _LATENT),
    **dict.fromkeys("paddleocr qwen2vl qwen35 qwen35moe qwen3tts qwen3vl qwen3vlmoe".split(), _TEXT),
    **dict.fromkeys("glm4 glm4moe hunyuan_vl".split(), "files with M-RoPE: " + _TEXT),
    **dict.fromkeys(families.SHARED.split(), "the last layers may read the entries of others"),
    **dict.fromkeys(families.SINKS.split(), "attention sinks"),
    **dict.fromkeys("lfm2 lfm2moe".split(), "files whose attention has windows need no budget, and are refused"),
    "baichuan": "the 13B has ALiBi and is refused",
    "gemma2": "soft cap",
    "llama4": "windows are chunks of the text",
    "phi3": "llama.cpp does not use its window",
    "phimoe": "llama.cpp does not use its window",
}
_MODELS = {  # what people know it by
    "afmoe": "Trinity", "apertus": "Apertus", "bailingmoe2": "Ling 2, Ring 2", "chatglm": "ChatGLM 3, GLM-4 (2024)",
    "cohere2": "Command R7B, Command A", "command-r": "Command R", "deepseek2": "DeepSeek V2/V3/R1, Kimi K2, GLM-4.7-Flash",
    "deepseek32": "DeepSeek V3.2", "deepseek4": "DeepSeek V4", "ernie4_5": "ERNIE 4.5", "ernie4_5-moe": "ERNIE 4.5 MoE",
    "exaone4": "EXAONE 4.0", "falcon-h1": "Falcon-H1", "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3": "Gemma 3",
    "gemma3n": "Gemma 3n", "gemma4": "Gemma 4", "glm-dsa": "GLM-5", "glm4": "GLM-4 (2025)",
    "glm4moe": "GLM-4.5, 4.6, 4.7", "gpt-oss": "gpt-oss", "granite": "Granite 3, 4 (dense)", "granitehybrid": "Granite 4-H",
    "granitemoe": "Granite 3 MoE", "hunyuan-dense": "Hunyuan", "hunyuan-moe": "Hunyuan A13B", "jamba": "Jamba",
    "kimi-linear": "Kimi Linear", "lfm2": "LFM2, LFM2.5", "lfm2moe": "LFM2 MoE",
    "llama": "Llama 1 to 3, Mistral, Mixtral, SmolLM2, Yi, ...", "llama4": "Llama 4", "mimo2": "MiMo-V2",
    "minimax-m2": "MiniMax-M2", "mistral3": "Ministral 3, Devstral 2", "mistral4": "Mistral Small 4",
    "nemotron_h": "Nemotron-H, Nemotron 3", "nemotron_h_moe": "Nemotron 3 Nano", "olmo2": "OLMo 2, OLMo 3", "phi2": "Phi-2",
    "phi3": "Phi-3, Phi-4", "phimoe": "Phi-3.5-MoE", "qwen2": "Qwen2, Qwen2.5", "qwen2moe": "Qwen2-57B-A14B",
    "qwen2vl": "Qwen2-VL, Qwen2.5-VL", "qwen3": "Qwen3", "qwen35": "Qwen3.5, Qwen3.6", "qwen35moe": "Qwen3.5, Qwen3.6 MoE",
    "qwen3moe": "Qwen3 MoE, Qwen3-Coder-30B", "qwen3next": "Qwen3-Next, Qwen3-Coder-Next", "qwen3vl": "Qwen3-VL",
    "qwen3vlmoe": "Qwen3-VL MoE", "seed_oss": "Seed-OSS", "smollm3": "SmolLM3", "starcoder2": "StarCoder2",
    "step35": "Step-3.5",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One row of the table."""

    name: str
    models: str  # well-known ones, "" without any
    layers: tuple[str, ...]  # what they keep, () if no budget is possible
    refused: str  # why not, "" if it is
    note: str
    untrainable: str  # why no indexer can be trained, "" if one can; those trained elsewhere need the budget alone


def _table() -> dict[str, Architecture]:
    kept = {name: layers for layers, names in _LAYERS.items() for name in names.split()}
    refused = {name: reason for reason, names in _REFUSED.items() for name in names.split()}
    return {
        name: Architecture(
            name, _MODELS.get(name, ""), kept.get(name, ()), refused.get(name, ""), _NOTES.get(name, ""), trainable(name)
        )
        for name in sorted({**kept, **refused})
    }


ARCHITECTURES: dict[str, Architecture] = _table()


def kinds(flags: Sequence[int]) -> dict[str, int]:
    """How many layers of a model keep what, by the library's flags for each: words for people, in their order."""
    from ..native.api import LAYER_BOUNDED, LAYER_READS, LAYER_RECURRENT, LAYER_WINDOW

    words = {
        LAYER_BOUNDED: "bounded", LAYER_WINDOW: "with a window", LAYER_RECURRENT: "recurrent",
        LAYER_READS: "reading the entries of others", 0: "without attention",
    }  # fmt: skip
    found = {word: sum(bool(f & flag) if flag else f == 0 for f in flags) for flag, word in words.items()}
    return {word: n for word, n in found.items() if n}


def in_words(flags: Sequence[int]) -> str:
    """ "12 of 48 layers are bounded, 36 recurrent" """
    found = kinds(flags)
    bounded = found.pop("bounded", 0)
    if not found and bounded == len(flags):
        return f"all {bounded} layers are bounded"
    return ", ".join([f"{bounded} of {len(flags)} layers are bounded", *(f"{n} {word}" for word, n in found.items())])
