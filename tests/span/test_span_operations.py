"""Sequences of a cache with a span go through the same as their references, in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import Tiny
from reference.indexers import VARIANTS, random_indexer, write_sidecar
from reference.memories import Centroid
from reference.policies import BoundedReference
from reference.rotary import ROTARY_KINDS
from support.native_context import F32, Context, open_model
from support.operations import N_SEQ, Operation, follow, operations

often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Sidecar = Callable[..., Path]


@pytest.fixture(scope="session")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Sidecar:
    """sidecar(variant, geometry) -> path of a random indexer."""
    folder = tmp_path_factory.mktemp("indexers")

    def make(variant: str, geometry: tuple[int, int, int]) -> Path:
        path = folder / f"{variant}.gguf"
        if not path.exists():
            write_sidecar(path, random_indexer(variant, *geometry), "f32", architecture="llama")
        return path

    return make


@given(
    policy=st.sampled_from(["streaming", "random", "knorm", "tova"]),
    kind=st.sampled_from(["norm", "yarn-neox", "partial-neox"]),
    n_slots=st.sampled_from([0, 0, 5]),
    room=st.integers(6, 28),
    window=st.integers(1, 9),
    step=st.integers(0, 12),
    spare=st.integers(0, 30),
    n_ubatch=st.sampled_from([1, 7, 16, 32]),
    todo=operations,
)
@often
def test_policies(
    tiny: Tiny, policy: str, kind: str, n_slots: int, room: int, window: int, step: int, spare: int, n_ubatch: int,
    todo: list[Operation],
) -> None:  # fmt: skip
    arch, overrides = ROTARY_KINDS[kind]
    path, config = tiny(arch, n_layer=1, **overrides)
    memory = Centroid(n_slots, [True], [1.0]) if n_slots else None
    asked: dict[str, Any] = dict(memory="centroid", memory_slots=n_slots) if n_slots else {}
    budget = 3 + window + n_slots + room
    options: dict[str, Any] = dict(
        budget=budget, sinks=3, window=window, evict_step=step, policy=policy, span=budget + n_ubatch + spare
    )
    with open_model(path) as model:
        with Context(model, n_ubatch=n_ubatch, n_seq=N_SEQ, type_k=F32, type_v=F32, **asked, **options) as c:
            follow(c, BoundedReference(config, memory=memory, n_ctx=1024, **options), todo, n_ubatch, config.n_vocab)


@given(
    variant=st.sampled_from(list(VARIANTS)),
    room=st.integers(6, 40),
    window=st.integers(1, 9),
    step=st.integers(0, 20),
    ratio=st.sampled_from([0.0, 0.3]),
    spare=st.integers(0, 30),
    n_ubatch=st.sampled_from([1, 7, 16, 32]),
    todo=operations,
)
@often
def test_indexers(
    tiny: Tiny, sidecar: Sidecar, variant: str, room: int, window: int, step: int, ratio: float, spare: int, n_ubatch: int,
    todo: list[Operation],
) -> None:  # fmt: skip
    """What waits to be scored is held by its place in the text, whatever its rotary position."""
    path, config = tiny("llama", n_head=4, head_dim=32)
    budget = 3 + window + room
    options: dict[str, Any] = dict(
        budget=budget, sinks=3, window=window, evict_step=step, policy="indexer", budget_ratio=ratio,
        span=budget + n_ubatch + spare,
    )  # fmt: skip
    geometry = (config.n_layer, config.n_embd, config.n_head_kv)
    new = BoundedReference(config, indexer=random_indexer(variant, *geometry), **options)
    exact = dict(type_k=F32, type_v=F32, sidecar=sidecar(variant, geometry))
    with open_model(path) as model, Context(model, n_ubatch=n_ubatch, n_seq=N_SEQ, **exact, **options) as c:
        follow(c, new, todo, n_ubatch, config.n_vocab)
