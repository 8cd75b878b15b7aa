"""Budgets that differ by layer and by KV head, as a sidecar says: against the reference, whose heads have budgets of their own."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import Llama
from indexmem_edge.convert.spec import needs_of_heads
from indexmem_edge.errors import BudgetError
from indexmem_edge.native import api
from indexmem_edge.stats import LayerBudget, layer_budgets
from reference.decoder import forward
from reference.indexers import random_indexer, write_sidecar
from reference.memories import Centroid
from reference.policies import BoundedReference
from support.comparing import rms, tokens_of
from support.native_context import F16, Context, Refused, open_model
from support.spanned import CACHES, NEAR, compare, follow
from tiny.models import TinyConfig

N_LAYER = 4
SHARES = [1.0, 4.0, 1.0, 2.0]
HEADS = [1.0, 4.0, 1.0, 1.0, 4.0, 2.0, 1.0, 2.0]  # of models with two KV heads
BOTH = pytest.mark.parametrize("shares", [SHARES, HEADS], ids=["layers", "heads"])
SETTINGS: dict[str, Any] = dict(budget=60, sinks=2, window=8, policy="indexer")
SIZES = [24, 24, 24, 7, *[1] * 40, 24, 24, 13, *[1] * 30, 24, 5]

MAGIC = struct.pack("<I", 0x564B4D49)
N_SLICES = 7  # of HEADS: in the second layer both heads have the same
N_HEADER = 8 * 4 + 8 + (4 + len("indexer")) + (4 + len("off")) + N_SLICES * 4 * (8 + 6) + 4  # bytes of a state from the magic on


def sidecar(folder: Path, config: TinyConfig, variant: str = "retention-mlp", shares: Sequence[float] = SHARES) -> Any:
    path = folder / f"{variant}-{len(shares)}.gguf"
    indexer = random_indexer(variant, config.n_layer, config.n_embd, config.n_head_kv, 0)
    keys = {"indexmem.budget_share": [float(s) for s in shares]}
    return path, write_sidecar(path, indexer, "f32", architecture=config.arch, keys=keys)


def budgets_of(context: Context, config: TinyConfig, shares: Sequence[float] = SHARES) -> list[list[int]]:
    """Of each head of each layer, as the context says it of each class."""
    stats = context.stats()
    of_heads = needs_of_heads(shares, config.n_layer, config.n_head_kv, 1.0)
    classes = sorted(set(shares))
    assert stats.n_classes == len(classes)
    assert [stats.class_heads[i] for i in range(len(classes))] == [of_heads.count(s) for s in classes]
    budgets = [stats.class_budget[classes.index(s)] for s in of_heads]
    return [budgets[i : i + config.n_head_kv] for i in range(0, len(budgets), config.n_head_kv)]


def both(
    model: Any, config: TinyConfig, folder: Path, variant: str = "retention-mlp", native: Any = None, shares: Sequence[float] = SHARES,
    **settings: Any,
) -> tuple[Context, BoundedReference]:  # fmt: skip
    path, indexer = sidecar(folder, config, variant, shares)
    settings = SETTINGS | {"span": 0} | settings
    asked = settings | ({"memory": "centroid", "memory_slots": settings["memory"].n_slots} if settings.get("memory") else {})
    context = Context(model, sidecar=path, n_ubatch=24, n_threads=1, **{"type_k": F16, "type_v": F16} | asked | (native or {}))
    reference = BoundedReference(
        config, indexer=indexer, cache_dtype=np.float16, budgets=budgets_of(context, config, shares), n_ctx=settings["span"], **settings
    )
    return context, reference


@BOTH
def test_a_system_prompt_may_be_longer_than_the_smallest_heads(tiny: Tiny, tmp_path: Path, shares: list[float]) -> None:
    """As long as with equal budgets; those that have no room for it keep its beginning, and `kv_stats` says how much."""
    path, config = tiny("llama", n_layer=N_LAYER)
    file = sidecar(tmp_path, config, shares=shares)[0]
    notes: list[str] = []
    llm = Llama(
        path, kv_budget=60, kv_sinks=2, kv_window=8, indexmem=file, n_ubatch=24, n_threads=1, verbose=False, n_ctx=1000,
        kv_warn=lambda note: notes.append(str(note)),
    )  # fmt: skip
    try:
        talk: list[Any] = [{"role": "system", "content": "a b c d e"}, {"role": "user", "content": "b"}]
        while (pin := llm._prompts.system_prefix(talk, llm._prompts.tokens(talk))) < 45:
            talk[0]["content"] += " a"
        llm.rehearse(talk[0]["content"])
        for _ in range(6):
            llm.create_chat_completion(talk, max_tokens=20, temperature=0.0)
            talk += [{"role": "assistant", "content": "c d e"}, {"role": "user", "content": "f g h" * 5}]
        stats = llm.kv_stats()
        assert stats.evicted > 0 and stats.pin == pin > stats.first > stats.sinks
        assert f"pinned prefix {pin} ({stats.first} in the smallest KV heads)" in str(stats)
        assert any(f"The first {pin} (in KV heads with small budgets {stats.first}) and the last 8 tokens" in text for text in notes)
        heads = sum(llm.kv_snapshot().values(), [])
        whole = [np.array_equal(head[:pin], np.arange(pin)) for head in heads]
        assert any(whole) and not all(whole)
        assert all(np.array_equal(head[: stats.first], np.arange(stats.first)) for head in heads)
        with pytest.raises(BudgetError, match="kv_budget 60 is too small: at least .* are needed"):
            llm.rehearse("a " * 60)
    finally:
        llm.close()


@BOTH
def test_all_together_keep_no_more_and_take_no_more(tiny: Tiny, tmp_path: Path, shares: list[float]) -> None:
    path, config = tiny("llama", n_layer=N_LAYER)
    file = sidecar(tmp_path, config, shares=shares)[0]
    with open_model(path) as model:
        for budget in (20, 60, 200, 1000):
            asked: dict[str, Any] = {**SETTINGS, "budget": budget, "n_ubatch": 24, "n_threads": 1}
            with Context(model, sidecar=file, **asked) as c:
                found, with_shares = sum(budgets_of(c, config, shares), []), c.stats()
            with Context(model, sidecar=file, layer_budgets="equal", **asked) as c:
                equal = c.stats()
            assert equal.n_classes == 1 and list(equal.class_budget) == [budget, 0, 0, 0]
            assert sum(found) <= len(found) * budget and with_shares.kv_bytes <= equal.kv_bytes
            room = {share: b - 10 for share, b in zip(needs_of_heads(shares, N_LAYER, config.n_head_kv, 1.0), found)}
            assert room[1] >= 1
            if budget > 60:  # below, rounding is too coarse
                assert room[4] == pytest.approx(4 * room[1], rel=0.05) and room[2] == pytest.approx(2 * room[1], rel=0.05)
                assert sum(found) > 0.8 * len(found) * budget


@BOTH
def test_without_eviction_nothing_changes(tiny: Tiny, tmp_path: Path, shares: list[float]) -> None:
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens = tokens_of(config, 30)
    file = sidecar(tmp_path, config, shares=shares)[0]
    with open_model(path) as model:
        logits = []
        for budgets in ("sidecar", "equal"):
            with Context(model, sidecar=file, n_ubatch=24, n_threads=1, layer_budgets=budgets, **SETTINGS) as c:
                logits.append(c.feed(tokens, 24))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma"])
@pytest.mark.parametrize("variant", ["retention-mlp", "pairwise-mean", "kvzap-mlp"])
@BOTH
def test_heads_follow_the_reference(tiny: Tiny, tmp_path: Path, arch: str, variant: str, shares: list[float]) -> None:
    if variant == "pairwise-mean" and shares is HEADS:
        pytest.skip("it ranks for all heads of a layer together")
    path, config = tiny(arch, n_layer=N_LAYER)
    tokens = tokens_of(config, sum(SIZES), seed=1)
    full = forward(config, tokens, cache_dtype=np.float16)
    with open_model(path) as model:
        with Context(model, n_threads=1) as original:
            base = rms(original.feed(tokens, 24) - full)
        native, reference = both(model, config, tmp_path, variant, shares=shares)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
            stats = native.stats()
            held = [len(head) for layer in native.positions(0) for head in layer]
    of_heads = needs_of_heads(shares, N_LAYER, config.n_head_kv, 1.0)
    assert held == [stats.class_kept[[1.0, 2.0, 4.0].index(s)] for s in of_heads] == [len(h) for layer in reference.kept for h in layer]
    by_share = dict(zip(of_heads, held))
    assert by_share[4] > by_share[2] > by_share[1]
    assert {e.layer for e in reference.evictions} == set(range(N_LAYER))
    assert worst < 2e-2 and error <= 1.5 * base and error < 0.02 * spread


def test_what_a_layer_gets_first(tiny: Tiny, tmp_path: Path) -> None:
    """However the others share the rest; of a larger budget it gets no more than they do."""
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens = tokens_of(config, sum(SIZES), seed=13)
    file = tmp_path / "least.gguf"
    indexer = random_indexer("retention-mlp", config.n_layer, config.n_embd, config.n_head_kv, 0)
    indexer = write_sidecar(file, indexer, architecture=config.arch, keys={"indexmem.budget_least": [0, 90, 0, 0]})
    settings: dict[str, Any] = SETTINGS | dict(span=0)
    asked: dict[str, Any] = dict(settings, sidecar=file, n_ubatch=24, n_threads=1, type_k=F16, type_v=F16)
    with open_model(path) as model:
        with Context(model, **{**asked, "budget": 1000}) as c:
            assert c.stats().n_classes == 1
        with Context(model, **asked) as native:
            stats = native.stats()
            assert list(stats.class_heads)[:2] == [3 * config.n_head_kv, config.n_head_kv] and stats.class_budget[1] == 2 + 8 + 90
            assert 40 <= stats.class_budget[0] <= 46 and stats.n_classes == 2  # of 240 in all
            budgets = [[stats.class_budget[il == 1]] * config.n_head_kv for il in range(N_LAYER)]
            reference = BoundedReference(config, indexer=indexer, cache_dtype=np.float16, budgets=budgets, n_ctx=0, **settings)
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert worst < 2e-2 and error < 0.02 * spread


@pytest.mark.parametrize("options", [dict(budget_ratio=0.3), dict(pin=11), dict(evict_step=5), dict(memory=Centroid(6, [True] * N_LAYER, [1.0] * N_LAYER))], ids=lambda o: next(iter(o)))  # fmt: skip
@BOTH
def test_with_other_options(tiny: Tiny, tmp_path: Path, options: dict[str, Any], shares: list[float]) -> None:
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens = tokens_of(config, sum(SIZES), seed=2)
    with open_model(path) as model:
        native, reference = both(model, config, tmp_path, shares=shares, **options)
        with native:
            worst, error, spread = follow(native, reference, tokens, SIZES)
    assert worst < 2e-2 and error < 0.02 * spread
    assert {e.layer for e in reference.evictions} == set(range(N_LAYER))


PINNED = [dict(), dict(budget_ratio=0.7), dict(evict_step=5), dict(span=160), dict(memory=Centroid(6, [True] * N_LAYER, [1.0] * N_LAYER))]


@pytest.mark.parametrize("options", PINNED, ids=lambda o: next(iter(o), "pin"))
@BOTH
def test_small_heads_keep_the_beginning_of_a_long_prefix(tiny: Tiny, tmp_path: Path, options: dict[str, Any], shares: list[float]) -> None:
    """What is pinned after the budget was divided: the others keep all of it. So do a copy and a state."""
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens = tokens_of(config, sum(SIZES), seed=14)
    with open_model(path) as model:
        native, reference = both(model, config, tmp_path, shares=shares, pin=42, native=dict(pin=0, n_seq=2), **options)
        firsts = {reference.first(il, h) for il, h in reference.heads()}
        assert max(firsts) == 42 and min(firsts) < 30
        with native:
            api.set_pin(native.ctx, 42)
            worst, error, spread = follow(native, reference, tokens, SIZES)
            stats = native.stats()
            assert (stats.pin, stats.n_first) == (42, min(firsts))
            native.seq_cp(0, 1)
            kept, state = native.positions(0), native.save(0)
            expected = native.feed(tokens[:50], 24)
            native.clear()
            assert native.load(state, 0)
            np.testing.assert_equal(native.positions(0), kept)
            assert native.stats().pin == 42
            np.testing.assert_array_equal(native.feed(tokens[:50], 24), expected)
    assert worst < 2e-2 and error < (20 * NEAR["f16"] if reference.span else 0.02) * spread
    for il, h in reference.heads():
        assert reference.kept[il][h][: reference.first(il, h)] == list(range(reference.first(il, h)))


@BOTH
def test_positions_that_are_renewed(tiny: Tiny, tmp_path: Path, shares: list[float]) -> None:
    """All layers at the same time and to the same end, whatever each of them holds."""
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens = tokens_of(config, 2 * sum(SIZES), seed=3)
    kind, _ = CACHES["f16"]
    with open_model(path) as model:
        native, reference = both(model, config, tmp_path, native=dict(type_k=kind, type_v=kind), shares=shares, span=160)
        with native:
            found = sum(budgets_of(native, config, shares), [])
            assert max(found) <= 80 and max(found) > 60
            worst, error, spread = follow(native, reference, tokens, SIZES * 2)
            assert native.stats().n_rebases == reference.n_rebases > 1
    assert worst < 2e-2 and error < 20 * NEAR["f16"] * spread


@BOTH
def test_what_can_be_taken_back(tiny: Tiny, tmp_path: Path, shares: list[float]) -> None:
    """As far as every layer still has all that was appended; then the text goes on as if it had not been."""
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens, other = tokens_of(config, 200, seed=4), tokens_of(config, 200, seed=5)
    with open_model(path) as model:
        native, reference = both(model, config, tmp_path, shares=shares)
        with native:
            follow(native, reference, tokens, [24, 24, 24, 24])
            for n, back in ((3, 2), (20, 12)):
                at = native.n_seen()
                follow(native, reference, other, [1] * n)
                limit = reference.n_before
                assert native.seq_rm(0, at - 1 if limit <= at - 1 else limit - 1, -1) is (limit <= at - 1)
                if native.n_seen() > at - 1:
                    assert native.seq_rm(0, max(limit, native.n_seen() - back), -1)
                assert reference.truncate(native.n_seen())
                follow(native, reference, tokens[100:], [5, 1, 1, 24])


@BOTH
def test_states_and_copies(tiny: Tiny, tmp_path: Path, shares: list[float]) -> None:
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens = tokens_of(config, 220, seed=6)
    file = sidecar(tmp_path, config, shares=shares)[0]
    with open_model(path) as model:
        with Context(model, sidecar=file, n_ubatch=24, n_threads=1, n_seq=2, **SETTINGS) as c:
            for n in (30, 100, 137):  # before the first eviction, after some, and in between
                c.clear()
                c.feed(tokens[:n], 24)
                state, kept = c.save(0), c.positions(0)
                c.seq_cp(0, 1)
                expected = c.feed(tokens[n : n + 40], 24)
                assert c.load(state, 0)
                np.testing.assert_equal(c.positions(0), kept)
                np.testing.assert_array_equal(c.feed(tokens[n : n + 40], 24), expected)
                np.testing.assert_equal(c.positions(1), kept)
                np.testing.assert_allclose(c.feed(tokens[n : n + 40], 24, seq=1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("there, here", [(None, SHARES), (None, HEADS), (SHARES, HEADS), (HEADS, SHARES)], ids=["equal-layers", "equal-heads", "layers-heads", "heads-layers"])  # fmt: skip
@pytest.mark.parametrize("n", [24, 100])
def test_states_of_other_budgets(tiny: Tiny, tmp_path: Path, there: Optional[list[float]], here: list[float], n: int) -> None:
    """One is taken up, whichever heads it keeps together, as long as heads that have one budget here hold equally much; what is too much
    in a head leaves. What cannot be is told."""
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens = tokens_of(config, 260, seed=7)
    asked: dict[str, Any] = dict(SETTINGS, n_ubatch=24, n_threads=1)
    with open_model(path) as model:
        with Context(model, sidecar=sidecar(tmp_path, config, shares=there or here)[0], layer_budgets=None if there else "equal", **asked) as c:
            c.feed(tokens[:n], 24)
            held, state, logits = c.positions(0), c.save(0), c.feed(tokens[n : n + 1], 1)
        with Context(model, sidecar=sidecar(tmp_path, config, shares=here)[0], **asked) as c:
            if there and n == 100:
                before = c.save(0)
                assert not c.load(state, 0) and "other budgets of layers" in api.last_error()
                assert c.save(0) == before
                return
            assert c.load(state, 0)
            now, budgets = c.positions(0), budgets_of(c, config, here)
            for il in range(N_LAYER):
                for h in range(config.n_head_kv):
                    assert set(now[il][h]) <= set(held[il][h]) and len(now[il][h]) <= budgets[il][h]
                    assert len(now[il][h]) == len(held[il][h]) or len(held[il][h]) > budgets[il][h] - 32
            found = c.feed(tokens[n : n + 1], 1)
            if all(len(a) == len(b) for a, b in zip(sum(now, []), sum(held, []))):
                np.testing.assert_array_equal(found, logits)
            assert np.isfinite(c.feed(tokens[n + 1 : 200], 24)).all()
            mine = c.save(0)
        with Context(model, sidecar=sidecar(tmp_path, config, shares=here)[0], layer_budgets="equal", **asked) as equal:
            equal.feed(tokens[:50], 24)
            before = equal.save(0)
            assert not equal.load(mine, 0) and "other budgets of layers" in api.last_error()
            assert equal.save(0) == before


def test_damaged_states(tiny: Tiny, tmp_path: Path) -> None:
    """What says which heads are kept together, and how much, is checked: none of these loads, and none leaves a trace."""
    path, config = tiny("llama", n_layer=N_LAYER)
    with open_model(path) as model, Context(model, sidecar=sidecar(tmp_path, config, shares=HEADS)[0], n_ubatch=24, **SETTINGS) as c:
        c.feed(tokens_of(config, 100, seed=14), 24)
        state = c.save(0)
        c.feed(tokens_of(config, 30, seed=15), 24)
        before = c.save(0)
        start = state.index(MAGIC)
        assert struct.unpack_from("<I", state, start + 4) == (10,)
        states = [state[:i] + bytes([state[i] ^ 0xFF]) + state[i + 1 :] for i in range(start, start + N_HEADER)]
        states += [state[:n] for n in range(start, len(state), 509)]
        for damaged in states:
            assert not c.load(damaged, 0)
            assert c.save(0) == before
        assert c.load(state, 0) and c.save(0) == state


def test_a_state_that_knows_less_than_it_holds(tiny: Tiny, tmp_path: Path) -> None:
    """What was appended since entries left are the last tokens: with fewer of these, taking some back would make no sense."""
    path, config = tiny("llama", n_layer=N_LAYER)
    file = sidecar(tmp_path, config, shares=HEADS)[0]
    with open_model(path) as model, Context(model, sidecar=file, n_ubatch=24, evict_step=8, **SETTINGS) as c:
        c.feed(tokens_of(config, 100, seed=14), 20)
        n_evictions = c.stats().n_evictions
        while c.stats().n_evictions == n_evictions:
            c.feed([5], 1)
        c.feed([6, 7, 8], 1)
        state = c.save(0)
        at = state.index(MAGIC) + N_HEADER + 13 * 4  # of how many of the last tokens are there
        assert struct.unpack_from("<I", state, at)[0] >= 3
        assert not c.load(state[:at] + struct.pack("<I", 2) + state[at + 4 :], 0)
        assert "the last 2 are there, 3 were appended" in api.last_error()
        assert c.load(state, 0) and c.save(0) == state


def test_an_indexer_that_ranks_all_heads_together_cannot_tell_them_apart(tiny: Tiny, tmp_path: Path) -> None:
    path, config = tiny("llama", n_layer=N_LAYER)
    file = sidecar(tmp_path, config, "pairwise-mean", HEADS)[0]
    with open_model(path) as model, pytest.raises(Refused, match="tell KV heads of layer 0 apart, and the indexer 'pairwise' ranks"):
        Context(model, sidecar=file, n_ubatch=24, **SETTINGS)


@BOTH
def test_a_batch_of_drafts_takes_nothing_away(tiny: Tiny, tmp_path: Path, shares: list[float]) -> None:
    """As many as there is room for in every layer: taken back, the text goes on as if they had not been."""
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens, guesses = tokens_of(config, 330, seed=8), tokens_of(config, 330, seed=9)
    rooms = set()
    with open_model(path) as model:
        native, reference = both(model, config, tmp_path, shares=shares, budget=160, evict_step=12)
        with native:
            follow(native, reference, tokens, [24] * 11)
            for i in range(264, 320):
                room = api.draft_room(native.ctx, 6)
                rooms.add(room)
                if room:
                    reference.feed(tokens[i : i + 1])
                    native.decode([tokens[i], *guesses[i : i + room]])
                    assert native.seq_rm(0, i + 1, -1)
                    compare(native, reference)
                else:
                    follow(native, reference, tokens[i:], [1])
    assert {0, 1} < rooms


@BOTH
def test_what_is_aborted_has_not_happened(tiny: Tiny, tmp_path: Path, shares: list[float]) -> None:
    """Unless it was to evict: then the sequence is broken, until it is cleared."""
    path, config = tiny("llama", n_layer=N_LAYER)
    tokens = tokens_of(config, 200, seed=10)
    with open_model(path) as model:
        native, reference = both(model, config, tmp_path, shares=shares, native=dict(can_stop=True))
        with native:
            follow(native, reference, tokens, [24, 24, 24])
            for broken in (0, 1):
                while (native.stats().room == 0) != bool(broken):
                    follow(native, reference, tokens[native.n_seen() :], [1])
                at, kept = native.n_seen(), native.positions(0)
                with native.aborting(20):
                    assert native.decode_at(tokens[at : at + 1], [at]) == 2
                assert native.stats().broken == broken
                if not broken:
                    np.testing.assert_equal(native.positions(0), kept)
                    follow(native, reference, tokens[at:], [1] * 3)
            native.clear()
            assert np.isfinite(native.feed(tokens[:100], 24)).all()


@pytest.mark.parametrize("by_head", [False, True], ids=["layers", "heads"])
@pytest.mark.parametrize("name", ["gemma3", "qwen35", "gemma3n", "gemma3n-shared", "deepseek2", "gpt-oss"])
def test_beside_windows_and_recurrent_states(tiny: Tiny, tmp_path: Path, name: str, by_head: bool) -> None:
    """Layers of other kinds have no share; whole sequences go on from copies and states as they would have gone on."""
    path, config = tiny(name)
    tokens = tokens_of(config, 200, seed=11)
    asked: dict[str, Any] = dict(SETTINGS, n_ubatch=24, n_threads=1, n_seq=2)
    with open_model(path) as model:
        with Context(model, budget=60, n_ubatch=24, window=8) as c:
            kinds = [flags & api.LAYER_BOUNDED for flags in api.model_layers(model)]
            bounded = [il for il, kind in enumerate(kinds) if kind]
            n_head_kv = api.n_head_kv(c.ctx, bounded[0])
        if n_head_kv < 2 if by_head else len(bounded) < 2:
            pytest.skip("one layer, or one head of it, has all of the budget")
        wide = [(il, h) for il in bounded for h in range(n_head_kv) if (h == n_head_kv - 1 if by_head else il == bounded[-1])]
        shares = [3.0 if (il, h) in wide else 1.0 for il in range(config.n_layer) for h in range(n_head_kv)]
        write_sidecar(
            tmp_path / "s.gguf", random_indexer("retention-mlp", config.n_layer, config.n_embd, n_head_kv, 0),
            keys={"indexmem.budget_share": shares},
        )  # fmt: skip
        with Context(model, sidecar=tmp_path / "s.gguf", layer_budgets="equal", **asked) as c:
            whole = [c.feed(tokens[:20], 20), c.feed(tokens[20:21], 1)]
        with Context(model, sidecar=tmp_path / "s.gguf", **asked) as c:
            for logits, part in zip(whole, (tokens[:20], tokens[20:21])):
                np.testing.assert_array_equal(c.feed(part, 20), logits)  # nothing has left
            c.clear()
            c.feed(tokens[:150], 24)
            stats = c.stats()
            assert list(stats.class_heads)[:2] == [len(bounded) * n_head_kv - len(wide), len(wide)]
            for il in bounded:
                assert [len(head) for head in c.positions(0)[il]] == [stats.class_kept[(il, h) in wide] for h in range(n_head_kv)]
            assert stats.class_kept[1] > stats.class_kept[0]
            state = c.save(0)
            c.seq_cp(0, 1)
            expected = c.feed(tokens[150:180], 24)
            assert c.load(state, 0)
            np.testing.assert_array_equal(c.feed(tokens[150:180], 24), expected)
            np.testing.assert_array_equal(c.feed(tokens[150:180], 24, seq=1), expected)


def test_what_python_says_of_them(tiny: Tiny, tmp_path: Path) -> None:
    path, config = tiny("llama", n_layer=N_LAYER)
    file = sidecar(tmp_path, config)[0]
    asked: dict[str, Any] = dict(kv_budget=60, kv_window=8, indexmem=file, n_threads=1, n_ubatch=32, n_gpu_layers=0, verbose=False)
    tokens = tokens_of(config, 200, seed=12)
    for how, classes in (("sidecar", 3), ("equal", 1), (None, 3)):
        with Llama(path, kv_layer_budgets=how, **asked) as llm:
            llm.eval(tokens)
            stats = llm.kv_stats()
        assert len(stats.layers) == classes and sum(x.heads for x in stats.layers) == N_LAYER * config.n_head_kv
        assert all(0 < x.kept <= x.budget for x in stats.layers)
        kept = sum(x.heads * x.kept for x in stats.layers) // config.n_head_kv
        assert stats.kept == -(-kept // N_LAYER) <= 60 and stats.evicted == 200 - stats.kept
        assert (f"{stats.layers[-1].kept:,} of {stats.layers[-1].budget:,}" in str(stats)) == (classes > 1)
    alike = SimpleNamespace(n_classes=3, class_heads=[16, 12, 2], class_budget=[706, 1280, 1280], class_kept=[93, 93, 93])
    assert layer_budgets(alike) == (LayerBudget(16, 706, 93), LayerBudget(14, 1280, 93))
    with pytest.raises(BudgetError, match="must be 'sidecar' or 'equal', found 'all'"):
        Llama(path, kv_layer_budgets="all", **asked)
