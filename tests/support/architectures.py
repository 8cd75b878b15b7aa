"""Which models of more than plain attention a budget is accepted for, and what their layers are.

One table for all tests of them. A model's `steps` are what a bounded cache has to know for it; it is accepted if all of
them are in `ON`, and refused with the reason of the first that is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

ON: frozenset[str] = frozenset({"mrope", "hybrid", "window", "sinks", "shared", "latent"})

# In the order in which a refusal names them: what the words of the reason contain.
REASONS = {
    "latent": "MLA",
    "sinks": "sink logits",
    "shared": "cache of others",
    "hybrid": "hybrid",
    "window": "sliding-window",
    "mrope": "M-RoPE",
    "bounded already": "windows in all its layers",
}


class Architecture(NamedTuple):
    steps: frozenset[str]
    single: dict[str, Any]  # overrides that leave one layer that is bounded, with one KV head
    window: int = 0  # of its window layers
    rotation: str = "all"  # of the bounded layers: "all", "none" or "some"; "unlike": in other dimensions than windows

    @property
    def on(self) -> bool:
        return self.steps <= ON

    @property
    def reason(self) -> Optional[str]:
        """What the refusal says, None if it is accepted."""
        return next((REASONS[step] for step in REASONS if step in self.steps and step not in ON), None)

    @property
    def recurrent(self) -> bool:
        return "hybrid" in self.steps


def _of(
    *steps: str, full: tuple[int, ...] = (1,), window: int = 0, rotation: str = "all", **single: Any
) -> Architecture:
    return Architecture(frozenset(steps), {"n_head_kv": 1, "full_layers": full, **single}, window, rotation)


TABLE: dict[str, Architecture] = {
    "qwen2vl": _of("mrope", full=(0,), n_layer=1),
    "qwen3vl": _of("mrope", full=(0,), n_layer=1),
    "qwen35": _of("hybrid", "mrope"),
    "qwen35-draft": _of("hybrid", "mrope"),
    "qwen35moe": _of("hybrid", "mrope"),
    "qwen3next": _of("hybrid"),
    "nemotron_h": _of("hybrid", rotation="none"),
    "nemotron_h_moe": _of("hybrid", rotation="none"),
    "granitehybrid": _of("hybrid", rotation="none"),
    "falcon-h1": _of("hybrid", full=(0,), n_layer=1),
    "jamba": _of("hybrid", rotation="none"),
    "lfm2": _of("hybrid"),
    "lfm2moe": _of("hybrid"),
    "minimax-01": _of("hybrid"),
    "plamo2": _of("hybrid"),
    "gemma2": _of("window", window=16),
    "gemma3": _of("window", window=16),
    "gemma3n": _of("window", window=16),
    "gemma3n-shared": _of("window", "shared", window=16, full=(19, 21)),
    "gemma4": _of("window", window=16),
    "gemma4-shared": _of("window", "shared", window=16, full=(3, 5)),
    "gpt-oss": _of("window", "sinks", window=16),
    "mimo2": _of("window", "sinks", window=16),
    "afmoe": _of("window", window=16, rotation="some"),
    "step35": _of("window", window=16, rotation="unlike"),
    "olmo2": _of("window", window=16),
    "exaone4": _of("window", window=16, full=(3,), rotation="none"),
    "exaone-moe": _of("window", window=16, rotation="none"),
    "granite_swa": _of("window", "sinks", window=16, rotation="some"),
    "cohere2": _of("window", window=16, rotation="none"),
    "llama4": _of("window", window=8192, full=(3,), rotation="some"),
    "deepseek2": _of("latent", full=(0,), n_layer=1),
    "deepseek2-draft": _of("latent", full=(0,), n_layer=1),
    "deepseek2-old": _of(full=(0,), n_layer=1, n_head=1),
    "mistral4": _of("latent", full=(0,), n_layer=1),
    "kimi-linear": _of("latent", "hybrid", rotation="none"),
    "kimi-k3": _of("latent", "hybrid", rotation="none"),
    "bailingmoe3": _of("latent", "hybrid"),
    "lfm2-window": _of("hybrid", "window", "bounded already", window=16),
    "gemma3-window": _of("window", "bounded already", window=16),
}
BOUNDED = [name for name, architecture in TABLE.items() if architecture.on]
REFUSED_YET = [name for name, architecture in TABLE.items() if not architecture.on]
