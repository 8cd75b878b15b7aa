"""Budgets in bytes: the parts add up to what the library reports, and nothing larger would have fitted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.bench import synthetic
from indexmem_edge.bench.quality.arms import FULL_ARM, Arm, Sidecars
from indexmem_edge.bench.quality.byte_budget import LEAST_ENTRIES, Budgets, DoesNotFit
from indexmem_edge.bench.runner import F16, BenchError, Model, Setup, System, kv_types
from indexmem_edge.native import api
from support.architectures import TABLE
from support.bench_data import sidecar_shape

BASE = Setup(ubatch=64, threads=1)
TOKENS = 3000


@pytest.fixture(scope="module")
def model(tiny: Any) -> Iterator[Model]:
    loaded = Model(tiny("llama")[0])
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def sidecars(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Sidecars:
    folder, shape = tmp_path_factory.mktemp("sidecars"), sidecar_shape(tiny("llama")[0])
    paths = [folder / "retention.gguf", folder / "pairwise.gguf", folder / "memory.gguf"]
    synthetic.random_sidecar(paths[0], shape, "retention", mid_dim=16)
    synthetic.random_sidecar(paths[1], shape, "pairwise")
    synthetic.random_memory(paths[2], shape)
    return Sidecars.open(paths)


def test_one_name_stands_for_both_types_and_a_slash_for_two() -> None:
    assert kv_types("q8_0") == ("q8_0", "q8_0") and kv_types("q8_0/q4_0") == ("q8_0", "q4_0")
    for wrong in ("q2_k", "q8_0/", "/f16", ""):
        with pytest.raises(BenchError, match="q8_0/q4_0"):
            kv_types(wrong)


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q8_0/q4_0"])
@pytest.mark.parametrize(
    ("policy", "memory"),
    [
        ("streaming", "off"),
        ("snapkv", "off"),
        ("expected", "off"),
        ("knorm", "centroid"),
        ("streaming", "centroid:20"),
        ("knorm", "residual"),
        ("retention retention", "off"),
        ("retention retention", "centroid"),
        ("pairwise pairwise", "off"),
    ],
)
def test_the_parts_add_up_and_the_budget_is_the_largest(
    model: Model, sidecars: Sidecars, policy: str, memory: str, cache_type: str
) -> None:
    budgets = Budgets(model, BASE, sidecars)
    arm = Arm(policy, 0.5, memory, cache_type)
    setup = budgets.setup(arm, TOKENS, 99)
    cost, limit = budgets.cost(setup), 0.5 * TOKENS * model.token_bytes(F16)
    assert cost.used(setup.budget - setup.memory_slots) <= limit
    assert budgets.cost(replace(setup, budget=setup.budget + 1)).used(setup.budget - setup.memory_slots + 1) > limit
    with System(model, setup) as system:
        stats, counted = system.stats(), budgets.count(system, TOKENS)
    whole = stats["kv_bytes"] + stats["meta_bytes"] + stats["sidecar_bytes"]
    assert whole == cost.fixed + cost.slot * stats["slots"]  # at another ubatch than that it was measured with
    assert counted["used_bytes"] + counted["room_bytes"] == whole
    assert counted["room_bytes"] == cost.slot * (stats["slots"] - (setup.budget - setup.memory_slots)) >= 64 * cost.slot
    assert counted["used_bytes"] >= stats["sidecar_bytes"] + stats["memory_bytes"]
    assert counted["bytes_share"] == counted["used_bytes"] / (TOKENS * model.token_bytes(F16)) <= 0.5


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4-shared", "qwen35", "falcon-h1", "kimi-linear"])
def test_what_does_not_grow_counts_on_both_sides(tiny: Any, name: str, cache_type: str) -> None:
    """Windows and recurrent states are bytes of the bounded cache and of the full one."""
    model = Model(tiny(name)[0])
    budgets = Budgets(model, BASE, Sidecars())
    setup = budgets.setup(Arm("streaming", 0.5, cache_type=cache_type), TOKENS, 99)
    cost = budgets.cost(setup)
    with System(model, setup) as system:
        stats, counted = system.stats(), budgets.count(system, TOKENS)
    others = stats["window_bytes"] + stats["recurrent_bytes"]
    assert others > 0 and model.has_fixed()
    assert counted["used_bytes"] + counted["room_bytes"] == stats["kv_bytes"] + stats["meta_bytes"] + others
    full = budgets.full_bytes(TOKENS)
    assert full > TOKENS * model.token_bytes(F16)
    assert cost.used(setup.budget) <= 0.5 * full < cost.used(setup.budget + 1)
    unbounded = Setup(n_ctx=1024, ubatch=64, threads=1, cache_type=cache_type)
    with System(model, unbounded) as system:
        stats, counted = system.stats(), budgets.count(system, 1000)
        whole = api.cache_bytes(system.ctx)
    assert whole == sum(stats[key] for key in ("kv_bytes", "window_bytes", "recurrent_bytes"))
    assert counted["used_bytes"] < whole and (stats["recurrent_bytes"] > 0) == TABLE[name].recurrent
    assert (stats["window_bytes"] > 0) == ("window" in TABLE[name].steps)
    model.close()


def test_what_waits_to_be_scored_counts_in_small_budgets_too(model: Model, sidecars: Sidecars) -> None:
    """The state of the smallest budget has a few rows of hidden states, that of a large one has 32."""
    budgets, shape = Budgets(model, BASE, sidecars), synthetic.shape_of(model)
    setup = budgets.setup(Arm("retention retention", 0.5), TOKENS, 0)
    state = 2 * 4 * shape.n_head_kv  # behind the slots, for sequences with fewer
    row = shape.n_layer * (2 * shape.n_embd + state)  # the matrices that read them are f16, and so are they
    fixed = [budgets.cost(replace(setup, budget=b, window=8)).fixed for b in (64, 640, 1024, 5000)]
    weights = Budgets(model, BASE, sidecars).cost(setup).fixed - budgets.cost(setup).fixed
    assert weights == 0
    assert [(f - fixed[0]) // row for f in fixed] == [0, 16, 28, 28]


@pytest.mark.parametrize(("outtype", "bytes_of_32"), [("f32", 128), ("f16", 64), ("q8_0", 34)])
def test_hidden_states_wait_in_the_type_of_the_matrices_that_read_them(
    model: Model, sidecars: Sidecars, tmp_path: Path, outtype: str, bytes_of_32: int
) -> None:
    path, shape = tmp_path / "retention.gguf", synthetic.shape_of(model)
    synthetic.random_sidecar(path, sidecar_shape(model.path), "retention", outtype=outtype, mid_dim=16)
    budgets = Budgets(model, BASE, Sidecars.open([path]))
    setup = budgets.setup(Arm("indexer", 0.5), TOKENS, 0)
    few, many = (budgets.cost(replace(setup, budget=b, window=8)).fixed for b in (64, 640))  # 4 rows, and 20
    assert many - few == 16 * shape.n_layer * (shape.n_embd // 32 * bytes_of_32 + 8 * shape.n_head_kv)


def test_a_slot_is_the_bytes_of_a_token_and_a_position_for_each_head(model: Model, sidecars: Sidecars) -> None:
    budgets, shape = Budgets(model, BASE, sidecars), synthetic.shape_of(model)
    for cache_type in ("f16", "q8_0", "q4_0", "q8_0/q4_0"):
        cost = budgets.cost(budgets.setup(Arm("streaming", 0.5, cache_type=cache_type), TOKENS, 0))
        positions = 1 if cache_type.startswith("q4_0") else 2  # keys of 4 bits have no span
        assert cost.slot == model.token_bytes(cache_type) + 4 * positions * shape.n_layer * shape.n_head_kv and cost.fixed == 0


def test_smaller_entries_buy_more_of_them(model: Model, sidecars: Sidecars) -> None:
    budgets = Budgets(model, BASE, sidecars)
    f16, q8, q4 = (budgets.setup(Arm("knorm", 0.25, cache_type=t), TOKENS, 0).budget for t in ("f16", "q8_0", "q4_0"))
    assert 1.8 < q8 / f16 < 64 / 34 < 3.2 < q4 / f16 < 64 / 18


def test_small_memories_of_small_budgets_are_a_quarter_at_most(model: Model, sidecars: Sidecars) -> None:
    budgets = Budgets(model, BASE, sidecars)
    slots = []
    for tokens in (300, 600, 1200, 2400):
        setup = budgets.setup(Arm("knorm", 0.25, "centroid"), tokens, 0)
        slots.append(setup.memory_slots)
        assert setup.memory_slots == 8 or setup.memory_slots <= setup.budget / 4
        assert setup.memory_slots == 64 or setup.memory_slots % 8 == 0
    assert slots == sorted(slots) and slots[0] < slots[-1] == 64


def test_full_caches_are_counted_by_the_tokens_of_the_context(model: Model) -> None:
    budgets = Budgets(model, BASE, Sidecars())
    for arm, share in ((FULL_ARM, 1.0), (FULL_ARM._replace(cache_type="q8_0"), 34 / 64)):
        with System(model, budgets.setup(arm, 1000, 24)) as system:
            counted = budgets.count(system, 1000)
            assert counted["bytes_share"] == share and counted["room_bytes"] == 24 / 1000 * counted["used_bytes"]


def test_what_does_not_fit_is_an_error_that_says_so(model: Model, sidecars: Sidecars) -> None:
    with pytest.raises(DoesNotFit, match=f"0 entries, and {LEAST_ENTRIES} are needed: choose larger"):
        Budgets(model, BASE, sidecars).setup(Arm("snapkv", 0.1), 300, 0)
    with pytest.raises(DoesNotFit, match="12 entries"):
        Budgets(model, BASE, sidecars, "entries").setup(Arm("knorm", 0.1), 120, 0)
    with pytest.raises(BenchError, match="bytes or entries"):
        Budgets(model, BASE, sidecars, "tokens")


def test_budgets_in_entries_are_shares_of_the_tokens(model: Model, sidecars: Sidecars) -> None:
    budgets = Budgets(model, BASE, sidecars, "entries")
    setup = budgets.setup(Arm("knorm", 0.5), 1000, 0)
    with System(model, setup) as system:
        assert setup.budget == 500 and budgets.count(system, 1000)["bytes_share"] > 0.5  # positions are in it
