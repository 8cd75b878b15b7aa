"""Types that the entries of a cache can have, by the names of the command line. Their numbers and sizes are gguf's."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

from ..errors import BudgetError

NAMES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
PLAIN = ("f32", "f16", "bf16")  # not quantised


def ggml_type(name: str) -> int:
    """The number of one of `NAMES` in enum ggml_type."""
    from gguf import GGMLQuantizationType  # here, because --help needs only the names

    return int(GGMLQuantizationType[name.upper()])


def number_of(name: object, option: str) -> int:
    """The number of a type that a person names with an option.

    Raises:
        BudgetError: there is no such type.
    """
    if not isinstance(name, str) or name not in NAMES:
        raise BudgetError(f"{option} {name!r:.40} is not a cache type: choose one of {', '.join(NAMES)}")
    return ggml_type(name)


def numbered(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the types of K and V as numbers: they may be named.

    Raises:
        BudgetError: there is no such type.
    """
    from .._vendor.llama_cpp import llama_cpp as llama_lib  # here, because the command line speaks without a library, too

    ready = dict(keywords)
    for option in ("type_k", "type_v"):
        given = ready.get(option)
        if isinstance(given, SupportsIndex) and 0 <= operator.index(given) < llama_lib.GGML_TYPE_COUNT:
            ready[option] = operator.index(given)
        elif given is not None:
            ready[option] = number_of(given, option)
    return ready


def nbytes(name: str, n: int) -> int:
    """Bytes of a row of `n` values, a multiple of the block of that type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    return n * size // values
