"""The tables of docs/guide.md: bytes of a cache, as the library allocates them. People write the rest of the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from indexmem_edge.options import default_ubatch

PAD = 256  # slots are allocated in steps of so many
MIB = 1 << 20
BUDGETS = (1024, 2048, 4096, 8192)
LONG = 32768
ENOUGH = 131072  # as long as most models were trained for
SIZES = (256, 512, 1024, 2048, 4096)  # MiB


@dataclass(frozen=True)
class Shape:
    """What of a model decides about the bytes of its cache, as its authors publish it."""

    name: str
    layers: int
    kv_heads: int
    head: int  # values of a key of one head, and of a value
    window: int = 0  # of the layers that look at one
    bounded: int = 0  # layers that look at everything, 0: all

    def bytes_of(self, slots: int, layers: int, cache_type: str) -> int:
        """Keys and values of so many slots per KV head of so many layers."""
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[cache_type.upper()]]
        return 2 * slots * layers * self.kv_heads * self.head // block * size

    def bounded_bytes(self, budget: int, cache_type: str = "f16", ubatch: int = 0) -> int:
        """With a budget, whatever the length: budget and working room of the bounded layers, and the windows.

        `ubatch` 0: the one that goes with the budget.
        """
        ubatch = ubatch or default_ubatch(budget)
        windows = self.layers - self.bounded if self.bounded else 0
        everything = self.bytes_of(_padded(budget + ubatch), self.layers - windows, cache_type)
        return everything + self.bytes_of(_padded(self.window + ubatch), windows, cache_type)

    def unbounded_bytes(self, tokens: int, cache_type: str = "f16") -> int:
        """Without one: llama-cpp-python makes windows as long as the context."""
        return self.bytes_of(_padded(tokens), self.layers, cache_type)


SHAPES = (
    Shape("SmolLM2 135M (the demo model)", 30, 3, 64),
    Shape("Qwen3 0.6B, 1.7B", 28, 8, 128),
    Shape("Llama 3.2 1B", 16, 8, 64),
    Shape("Llama 3.2 3B", 28, 8, 128),
    Shape("Qwen3 4B, 8B", 36, 8, 128),
    Shape("Qwen2.5 7B", 28, 4, 128),
    Shape("Llama 3.1 8B, Mistral 7B", 32, 8, 128),
    Shape("Phi-4 14B", 40, 10, 128),
    Shape("Qwen3 14B, Mistral Small 3 24B", 40, 8, 128),
    Shape("Qwen3 30B-A3B", 48, 4, 128),
    Shape("Qwen3 32B", 64, 8, 128),
    Shape("Llama 3.3 70B", 80, 8, 128),
    Shape("Gemma 3 270M", 18, 1, 256, window=512, bounded=3),
    Shape("Gemma 3 4B", 34, 4, 256, window=1024, bounded=5),
    Shape("Gemma 3 12B", 48, 8, 256, window=1024, bounded=8),
    Shape("gpt-oss 20B", 24, 8, 64, window=128, bounded=12),
)


def _padded(slots: int) -> int:
    return -(-slots // PAD) * PAD


def page(text: str) -> str:
    """The page with its tables made anew: they stand between `<!-- NAME -->` and `<!-- end -->`."""
    for name, lines in {"bytes": _bytes_table(), "budgets": _budgets_table()}.items():
        table = "".join(line + "\n" for line in lines)
        text, found = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>\n{table}\n\g<2>", text, flags=re.S)
        if found != 1:
            raise ValueError(f"docs/guide.md has {found} places for the table {name!r}: one was expected")
    return text


def _bytes_table() -> Iterator[str]:
    yield "| model | " + " | ".join(f"{b}" for b in BUDGETS) + f" | 4096, q8_0 | no budget, {LONG} tokens |"
    yield "|---|" + "--:|" * (len(BUDGETS) + 2)
    for s in SHAPES:
        sizes = [*(s.bounded_bytes(b) for b in BUDGETS), s.bounded_bytes(4096, "q8_0"), s.unbounded_bytes(LONG)]
        yield f"| {s.name} | " + " | ".join(_size(n) for n in sizes) + " |"


def _budgets_table() -> Iterator[str]:
    yield "| model | " + " | ".join(_size(n * MIB) for n in SIZES) + " |"
    yield "|---|" + "--:|" * len(SIZES)
    for s in SHAPES:
        yield f"| {s.name} | " + " | ".join(_largest(s, n * MIB) for n in SIZES) + " |"


def _largest(shape: Shape, room: int) -> str:
    """The largest multiple of 256 whose cache is no larger than `room` bytes."""
    budget = 0
    step = 1 << 20
    while step >= PAD:
        while shape.bounded_bytes(budget + step) <= room:
            budget += step
        step //= 2
    return "-" if not budget else f"{budget:,}" if budget <= ENOUGH else f"{ENOUGH:,} and more"


def _size(n: int) -> str:
    return f"{n / MIB:.0f} MiB" if n < 1024 * MIB else f"{n / (1024 * MIB):.1f} GiB"
