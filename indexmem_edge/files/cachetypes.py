"""Types that the entries of a cache can have, by the names of the command line. Their numbers and sizes are gguf's."""

from __future__ import annotations

NAMES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
PLAIN = ("f32", "f16", "bf16")  # not quantised


def ggml_type(name: str) -> int:
    """The number of one of `NAMES` in enum ggml_type."""
    from gguf import GGMLQuantizationType  # here, because --help needs only the names

    return int(GGMLQuantizationType[name.upper()])


def nbytes(name: str, n: int) -> int:
    """Bytes of a row of `n` values, a multiple of the block of that type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    return n * size // values
