"""The centroid memory of a cache with a span: its slots move with the newest tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Tiny
from reference.memories import Centroid, random_centroid, write_memory_sidecar
from reference.rotary import ROTARY_KINDS
from support.comparing import EVICTING, tokens_of
from support.native_context import open_model
from support.spanned import KINDS_AND_CACHES, SIZES, both, follow

# As in spanned.py. What attention reads of a slot is turned as it is rounded, the mean itself exactly: the next eviction
# copies that again, the reference does so at once.
NEAR = {"f32": 2e-5, "f16": 2e-3, "bf16": 5e-3, "q8_0": 2e-2}


@pytest.mark.parametrize("kind,cache", KINDS_AND_CACHES)
def test_kinds_of_rotation(tiny: Tiny, tmp_path: Path, kind: str, cache: str) -> None:
    arch, overrides = ROTARY_KINDS[kind]
    path, config = tiny(arch, **overrides)
    memory = random_centroid(config.n_layer, 8)
    write_memory_sidecar(tmp_path / "m.gguf", memory, n_embd=config.n_embd, n_head_kv=config.n_head_kv)
    with open_model(path) as model:
        native, reference = both(
            model, config, cache, memory=memory, native=dict(sidecar=tmp_path / "m.gguf"), policy="random", budget=40, seed=7
        )
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(SIZES), seed=1))
    assert reference.n_rebases >= 4 and worst == 0
    assert error < NEAR[cache] * spread


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("sizes", [SIZES, [1] * 150], ids=["mixed", "single"])
def test_policies(tiny: Tiny, policy: str, sizes: list[int]) -> None:
    """Asked for without a sidecar."""
    path, config = tiny("llama")
    memory = Centroid(8, [True] * config.n_layer, [1.0] * config.n_layer)
    with open_model(path) as model:
        asked = dict(memory="centroid", memory_slots=8)
        native, reference = both(model, config, memory=memory, native=asked, policy=policy, budget=40)
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(sizes), seed=2), sizes)
    assert reference.n_rebases >= 3
    assert worst < 2e-2 and error < NEAR["f16"] * spread


def test_layers_without_memory(tiny: Tiny, tmp_path: Path) -> None:
    """And one that is not rotated."""
    path, config = tiny("smollm3")
    memory = replace(random_centroid(config.n_layer, 8), enabled=[True, False, True, True])
    write_memory_sidecar(tmp_path / "m.gguf", memory, n_embd=config.n_embd, n_head_kv=config.n_head_kv)
    with open_model(path) as model:
        native, reference = both(
            model, config, memory=memory, native=dict(sidecar=tmp_path / "m.gguf"), policy="knorm", budget=40
        )
        with native:
            worst, error, spread = follow(native, reference, tokens_of(config, sum(SIZES), seed=3))
    assert reference.n_rebases >= 4
    assert worst < 2e-2 and error < NEAR["f16"] * spread
