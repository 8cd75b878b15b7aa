"""What ranks and what remembers: the policy and the latent memory that options and a sidecar come to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Optional

from ..errors import LatentMemoryError, ModelFileError, PolicyError
from ..files.modelfile import gguf_strings

DEFAULT_POLICY = "streaming"  # without an indexer
INDEXER_POLICY = "indexer"  # with one
MEMORY_OFF = "off"
SLOTTED_MEMORY = "centroid"  # the kind whose slots are part of the budget
DEFAULT_MEMORY_SLOTS = 64

_NONE = "none"


@dataclass(frozen=True)
class SidecarKinds:
    """What a sidecar says it holds; "none" without it."""

    indexer: str = _NONE
    memory: str = _NONE


def sidecar_kinds(path: Optional[str]) -> SidecarKinds:
    """The kinds in a sidecar, or none of both without one. A damaged file is left to the library, which says more."""
    if path is None:
        return SidecarKinds()
    try:
        found = gguf_strings(path, ["indexmem.indexer.kind", "indexmem.memory.kind"])
    except ModelFileError:
        found = {}
    return SidecarKinds(found.get("indexmem.indexer.kind", INDEXER_POLICY), found.get("indexmem.memory.kind", _NONE))


def choose_memory(memory: Optional[str], slots: Optional[int], kinds: SidecarKinds, known: dict[str, str]) -> tuple[str, int]:
    """The latent memory that is meant, by default that of the sidecar, and its slots (0: as the sidecar says).

    Raises:
        LatentMemoryError: there is no such kind, it would need trained weights, or slots were given for none.
    """
    of_sidecar = kinds.memory if kinds.memory != _NONE else MEMORY_OFF
    kind = memory or of_sidecar
    if kind != MEMORY_OFF and kind not in known and kind != of_sidecar:
        raise LatentMemoryError(f"unknown memory {kind!r}: choose one of {', '.join([MEMORY_OFF, *sorted(known)])}")
    if kind != SLOTTED_MEMORY:
        if slots is not None:
            raise LatentMemoryError(
                f"memory_slots are for the memory {SLOTTED_MEMORY!r}, and the memory is {kind!r}: leave them out, or "
                f"choose that memory"
            )
        if kind == "residual" and of_sidecar != kind:
            raise LatentMemoryError(
                "the memory 'residual' needs trained weights: name a sidecar that has them with --indexmem FILE "
                f"(indexmem= in Python), or choose the memory {SLOTTED_MEMORY!r}, which needs none"
            )
        return kind, 0
    if slots is not None:
        return kind, slots
    return kind, 0 if of_sidecar == kind else DEFAULT_MEMORY_SLOTS


def choose_policy(policy: Optional[str], memory: str, sidecar: Optional[str], kinds: SidecarKinds) -> str:
    """The policy that is meant: by default the indexer of the sidecar, if that has one.

    Raises:
        PolicyError: the policy and the sidecar contradict each other.
    """
    if kinds.indexer == _NONE:
        if policy != INDEXER_POLICY:
            return policy or DEFAULT_POLICY
        if sidecar is not None:
            raise PolicyError(
                f"kv_policy {INDEXER_POLICY!r} needs an indexer, and the sidecar {os.path.basename(sidecar)} holds a memory "
                "only: choose another kv_policy, or another sidecar"
            )
        raise PolicyError(
            f"kv_policy {INDEXER_POLICY!r} needs a sidecar with a trained indexer: name one with --indexmem FILE "
            "(indexmem= in Python), or choose another kv_policy"
        )
    if policy and policy != INDEXER_POLICY and (memory == MEMORY_OFF or memory != kinds.memory):
        raise PolicyError(
            f"kv_policy {policy!r} contradicts the sidecar {os.path.basename(sidecar or '')}, of which nothing would be "
            "used: leave kv_policy out, or the sidecar"
        )
    return policy or INDEXER_POLICY
