"""States that go on in a cache with another budget, window, policy, memory or ubatch: exactly, or not at all, with the reason."""

from __future__ import annotations

import resource
import struct
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import Tiny
from indexmem_edge.native import api
from reference.indexers import random_indexer, write_sidecar
from reference.memories import Centroid, write_memory_sidecar
from reference.policies import BoundedReference
from support.comparing import EVICTING, tokens_of
from support.memories import random_memory
from support.mixed import Made, each_kind, made  # noqa: F401  a fixture
from support.native_context import F16, F32, Context, open_model
from support.spanned import CACHES, compare
from support.states import N_HEADER
from tiny.models import TinyConfig

LARGE: dict[str, Any] = dict(budget=96, sinks=4, window=20)
SMALL: dict[str, Any] = dict(budget=48, sinks=3, window=9)
N_UBATCH = 32
SIZES = [32, 32, 32, 32, 13, 1, 1]
RESUMED = [1, 1, 20, 32, 1, 7, 32, 32]


def pair(model: Any, config: TinyConfig, cache: str = "f16", **options: Any) -> tuple[Context, BoundedReference]:
    kind, rounding = CACHES[cache]
    reference = {k: v for k, v in options.items() if k not in ("sidecar", "n_ubatch")}
    native = {k: v for k, v in options.items() if k not in ("memory", "indexer")}
    context = Context(model, n_ubatch=options.get("n_ubatch", N_UBATCH), type_k=kind, type_v=kind, **{"span": 0} | native)
    return context, BoundedReference(config, cache_dtype=rounding, **reference)


def go_on(native: Context, reference: BoundedReference, tokens: list[int], sizes: list[int], atol: float = 0.05) -> None:
    """Both evaluate the same, and keep the same."""
    for n in sizes:
        ubatch, tokens = tokens[:n], tokens[n:]
        expected = reference.feed(ubatch)
        np.testing.assert_allclose(native.decode(ubatch), expected, rtol=0, atol=atol)
        assert compare(native, reference) < 2e-2


def said(c: Context, state: bytes) -> str:
    """Why a state is refused; the cache is as it was."""
    before = c.save(0)
    assert not c.load(state, 0)
    assert c.save(0) == before
    return api.last_error()


QUERIES = {"tova": 1, "snapkv": 32, "expected": 32}


@pytest.mark.parametrize("new", EVICTING)
@pytest.mark.parametrize("old", ["streaming", "keydiff", "snapkv"])
def test_a_smaller_budget_evicts_by_the_policy_of_now(tiny: Tiny, old: str, new: str) -> None:
    """As the reference does, which has all keys and queries."""
    path, config = tiny("llama")
    tokens, more = tokens_of(config, sum(SIZES)), tokens_of(config, sum(RESUMED), seed=1)
    with open_model(path) as model:
        large, reference = pair(model, config, policy=old, **LARGE)
        small = Context(model, n_ubatch=N_UBATCH, span=0, policy=new, **SMALL)
        with large, small:
            go_on(large, reference, tokens, SIZES)
            if new == "tova" or QUERIES.get(new, 0) > QUERIES.get(old, 0):
                words = "query of the newest token" if new == "tova" else "without the last 32 queries"
                assert words in said(small, large.save(0))
                return
            assert small.load(large.save(0), 0)
            reference.refit(policy=new, **SMALL)
            assert small.stats().n_kept == 48
            assert compare(small, reference) < 2e-2
            go_on(small, reference, more, RESUMED)


@pytest.mark.parametrize("cache", ["f32", "q8_0", "bf16"])
def test_other_types_of_keys_and_values(tiny: Tiny, cache: str) -> None:
    path, config = tiny("llama")
    tokens, more = tokens_of(config, sum(SIZES)), tokens_of(config, sum(RESUMED), seed=1)
    with open_model(path) as model:
        large, reference = pair(model, config, cache, policy="knorm", **LARGE)
        kind = CACHES[cache][0]
        small = Context(model, n_ubatch=N_UBATCH, span=0, policy="keydiff", type_k=kind, type_v=kind, **SMALL)
        with large, small:
            go_on(large, reference, tokens, SIZES, atol=0.1)
            assert small.load(large.save(0), 0)
            reference.refit(policy="keydiff", **SMALL)
            assert compare(small, reference) < 2e-2
            go_on(small, reference, more, RESUMED, atol=0.1)


@pytest.mark.parametrize("arch", ["gemma", "granite"])
def test_scale_and_softcap_of_the_model(tiny: Tiny, arch: str) -> None:
    """What ranks by attention at loading computes it as the model does."""
    path, config = tiny(arch)
    tokens, more = tokens_of(config, sum(SIZES)), tokens_of(config, sum(RESUMED), seed=1)
    with open_model(path) as model:
        large, reference = pair(model, config, policy="snapkv", **LARGE)
        small = Context(model, n_ubatch=N_UBATCH, span=0, policy="snapkv", **SMALL)
        with large, small:
            go_on(large, reference, tokens, SIZES, atol=0.1)
            assert small.load(large.save(0), 0)
            reference.refit(**SMALL)
            assert compare(small, reference) < 2e-2
            go_on(small, reference, more, RESUMED, atol=0.1)


@pytest.mark.parametrize("policy", ["streaming", "knorm", "tova", "snapkv"])
@pytest.mark.parametrize("n", [30, 150])
def test_a_larger_budget_keeps_all_of_it(tiny: Tiny, policy: str, n: int) -> None:
    """And then evicts when that is used up."""
    path, config = tiny("llama")
    tokens, more = tokens_of(config, n), tokens_of(config, sum(RESUMED), seed=1)
    with open_model(path) as model:
        small, reference = pair(model, config, policy=policy, **SMALL)
        large = Context(model, n_ubatch=N_UBATCH, span=0, policy=policy, **LARGE)
        with small, large:
            go_on(small, reference, tokens, [10] * (n // 10))
            assert large.load(small.save(0), 0)
            np.testing.assert_equal(large.positions(), small.positions())
            assert small.load(large.save(0), 0), "and back"
            reference.refit(**LARGE)
            go_on(large, reference, more, RESUMED)
            assert large.stats().n_kept > 48


def test_queries_come_with_new_text_where_there_is_room(tiny: Tiny) -> None:
    """The one that evicts and 31 before it are enough for a policy that ranks by 32 queries."""
    path, config = tiny("llama")
    tokens, more = tokens_of(config, 100), tokens_of(config, 80, seed=1)
    with open_model(path) as model:
        old, reference = pair(model, config, policy="knorm", **SMALL)
        with old:
            go_on(old, reference, tokens, [10] * 10)
            least = old.stats().n_kept + 31
            new = dict(LARGE, budget=least - 1, policy="snapkv")
            with Context(model, n_ubatch=N_UBATCH, span=0, **new) as c:
                assert f"a budget of at least {least}" in said(c, old.save(0))
            new["budget"] = least
            with Context(model, n_ubatch=N_UBATCH, span=0, **new) as c:
                assert c.load(old.save(0), 0)
                reference.refit(**new)
                go_on(c, reference, more, [1] * 80)
                assert c.stats().n_evictions > old.stats().n_evictions


@pytest.mark.parametrize("change", [dict(window=31), dict(sinks=15), dict(window=1, sinks=0), dict(evict_step=20), dict(pin=11)], ids=str)
def test_what_is_protected_may_change(tiny: Tiny, change: dict[str, int]) -> None:
    """What is gone does not come back, and a state says so when it is saved again."""
    path, config = tiny("llama")
    tokens, more = tokens_of(config, sum(SIZES)), tokens_of(config, sum(RESUMED), seed=1)
    with open_model(path) as model:
        old, reference = pair(model, config, policy="random", **SMALL)
        new = dict(SMALL, policy="random") | change
        with old, Context(model, n_ubatch=N_UBATCH, span=0, **new) as a, Context(model, n_ubatch=N_UBATCH, span=0, **new) as b:
            go_on(old, reference, tokens, SIZES)
            assert a.load(old.save(0), 0)
            reference.refit(**{k: v for k, v in new.items() if k != "pin"})
            for n in (1, 1, 20, 32, 1, 7, 32):
                assert b.load(a.save(0), 0) and b.save(0) == a.save(0)
                a, b = b, a
                go_on(a, reference, more[:n], [n])
                more = more[n:]
            assert old.load(a.save(0), 0), "and back"


def test_a_pin_that_is_asked_for(tiny: Tiny) -> None:
    """As far as all of it is still there; a prefix that is too long for the budget is refused."""
    path, config = tiny("llama")
    with open_model(path) as model, Context(model, policy="random", pin=12, **LARGE) as old:
        old.feed(tokens_of(config, 40), 20)
        whole = old.save(0)
        old.feed(tokens_of(config, 160), 20)
        evicted = old.save(0)
        with Context(model, policy="random", **SMALL) as c:
            assert c.load(whole, 0) and c.stats().pin == 12
            for asked, before, after in ((20, 20, 12), (5, 5, 5), (0, 0, 0)):
                api.set_load_pin(c.ctx, asked)
                assert c.load(whole, 0) and c.stats().pin == before
                assert c.load(evicted, 0) and c.stats().pin == after
                for head in c.positions()[0]:
                    assert head[: max(after, 3)].tolist() == list(range(max(after, 3)))
            api.set_load_pin(c.ctx, 45)
            assert "pinned prefix of 45 tokens needs a budget of at least 55" in said(c, whole)
            api.set_load_pin(c.ctx, None)
            assert c.load(evicted, 0) and c.stats().pin == 12
        with Context(model, policy="random", budget=20, window=8) as c:
            assert "pinned prefix of 12 tokens needs a budget of at least 21" in said(c, evicted)


def test_the_policy_full_refuses_what_does_not_fit(tiny: Tiny) -> None:
    path, config = tiny("llama")
    with open_model(path) as model, Context(model, **LARGE) as old, Context(model, policy="full", **SMALL) as c:
        old.feed(tokens_of(config, 60), 20)
        assert "the policy is to evict nothing" in said(c, old.save(0))
        old.seq_rm(0, 48)
        assert c.load(old.save(0), 0) and c.save(0) != b""


def test_a_size_that_lies_takes_no_memory(tiny: Tiny) -> None:
    """Counts that go together, of far more entries than there are bytes: the bytes come first."""
    path, config = tiny("llama")
    with open_model(path) as model, Context(model, **SMALL) as c:
        c.feed(tokens_of(config, 20), 20)
        state = c.save(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for n in (10**5, 10**7, 1 << 30):
            lie = bytearray(state)
            for field in (1, 2, 12, 13):  # seen, held, the first and the last that are sure to be there
                assert lie[N_HEADER + 4 * field : N_HEADER + 4 * field + 4] == struct.pack("<I", 20)
                lie[N_HEADER + 4 * field : N_HEADER + 4 * field + 4] = struct.pack("<I", n)
            assert "end of buffer" in said(c, bytes(lie))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 32 << 10, "KiB"


# indexers

Sidecar = Callable[..., Path]


@pytest.fixture(scope="session")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Sidecar:
    """sidecar(config, variant, memory, seed) -> path, with an indexer, a memory, or both."""
    folder = tmp_path_factory.mktemp("sidecars")

    def make(config: TinyConfig, variant: str = "", memory: str = "", seed: int = 0) -> Path:
        path = folder / f"{config.n_layer}-{config.n_embd}-{variant}-{memory}-{seed}.gguf"
        shape = config.n_layer, config.n_embd, config.n_head_kv
        if path.exists():
            return path
        indexer = random_indexer(variant, *shape, seed) if variant else None
        if memory:
            remembered = random_memory(memory, config, seed=seed)
            write_memory_sidecar(path, remembered, indexer, n_embd=config.n_embd, n_head_kv=config.n_head_kv)
        else:
            assert indexer
            write_sidecar(path, indexer)
        return path

    return make


def test_entries_that_claim_to_be_small(tiny: Tiny, sidecar: Sidecar) -> None:
    """Their size is checked also where scores have another one, because the state is of a cache with a sidecar and this one has none."""
    path, config = tiny("llama")
    options = dict(n_ubatch=N_UBATCH, n_threads=1, **SMALL)
    with open_model(path) as model:
        with Context(model, policy="indexer", sidecar=sidecar(config, "retention-mlp"), **options) as c:
            c.feed(tokens_of(config, 40), 20)
            state = c.save(0)
        types, size = struct.pack("<II", F16, F16), 2 * 2 * config.n_head_kv * config.head_dim  # of keys and values of a layer
        assert state.count(types + struct.pack("<I", size)) == config.n_layer
        with Context(model, policy="streaming", **options) as c:
            assert "damaged" in said(c, state.replace(types + struct.pack("<I", size), types + struct.pack("<I", 1)))
            assert c.load(state, 0)


@pytest.mark.parametrize("variant", ["retention-mlp", "kvzap-linear", "pairwise-mean"])
@pytest.mark.parametrize("waiting", [0, 1, 3])
def test_an_indexer_scores_what_waits_and_evicts(tiny: Tiny, sidecar: Sidecar, variant: str, waiting: int) -> None:
    path, config = tiny("llama")
    indexer = random_indexer(variant, config.n_layer, config.n_embd, config.n_head_kv)
    tokens, more = tokens_of(config, 150), tokens_of(config, sum(RESUMED), seed=1)
    options = dict(policy="indexer", sidecar=sidecar(config, variant))
    with open_model(path) as model:
        large, reference = pair(model, config, indexer=indexer, **options, **LARGE)
        with large, Context(model, n_ubatch=N_UBATCH, span=0, **options, **SMALL) as small:
            go_on(large, reference, tokens, [30] * 4 + [1] * waiting)
            assert small.load(large.save(0), 0)
            reference.refit(**SMALL)
            assert compare(small, reference) < 2e-2
            go_on(small, reference, more, RESUMED)


def test_more_wait_than_may(tiny: Tiny, sidecar: Sidecar) -> None:
    """They are scored when the state is read, although nothing has to leave."""
    path, config = tiny("llama")
    for variant in ("kvzap-linear", "pairwise-mean"):
        indexer = random_indexer(variant, config.n_layer, config.n_embd, config.n_head_kv)
        tokens, more = tokens_of(config, 80), tokens_of(config, sum(RESUMED), seed=1)
        options = dict(policy="indexer", sidecar=sidecar(config, variant))
        with open_model(path) as model:
            large, reference = pair(model, config, indexer=indexer, **options, **dict(LARGE, budget=1056))
            with large, Context(model, n_ubatch=N_UBATCH, span=0, **options, **dict(LARGE, budget=90)) as small:
                go_on(large, reference, tokens, [30, 30] + [1] * 20)
                assert small.load(large.save(0), 0)
                assert small.save(0) != large.save(0) and small.stats().n_kept == 80
                reference.refit(budget=90)
                go_on(small, reference, more, RESUMED)


def test_an_indexer_and_a_policy_without(tiny: Tiny, sidecar: Sidecar) -> None:
    """Who ranks by keys has no use for scores; who ranks by scores has to have them."""
    path, config = tiny("llama")
    indexer = random_indexer("retention-mlp", config.n_layer, config.n_embd, config.n_head_kv)
    tokens, more = tokens_of(config, 150), tokens_of(config, sum(RESUMED), seed=1)
    options = dict(policy="indexer", sidecar=sidecar(config, "retention-mlp"))
    other = dict(policy="indexer", sidecar=sidecar(config, "retention-mlp", seed=1))
    with open_model(path) as model:
        scored, reference = pair(model, config, indexer=indexer, **options, **LARGE)
        plain = Context(model, n_ubatch=N_UBATCH, span=0, policy="keydiff", **SMALL)
        with scored, plain, Context(model, n_ubatch=N_UBATCH, **other, **LARGE) as foreign:
            go_on(scored, reference, tokens, [30] * 4 + [1] * 3)
            state = scored.save(0)
            assert "made with another sidecar" in said(foreign, state)
            assert plain.load(state, 0)
            reference.refit(policy="keydiff", **SMALL)
            assert compare(plain, reference) < 2e-2
            go_on(plain, reference, more, RESUMED)
            assert "made with policy 'keydiff', without the scores" in said(scored, plain.save(0))
            plain.clear()
            assert scored.load(plain.save(0), 0) and scored.n_seen() == 0


# memories


@pytest.mark.parametrize("kind", ["centroid", "residual"])
@pytest.mark.parametrize("n", [80, 150], ids=["nothing has left", "much has left"])
def test_a_memory_takes_up_what_leaves_at_loading(tiny: Tiny, sidecar: Sidecar, kind: str, n: int) -> None:
    path, config = tiny("llama")
    memory = random_memory(kind, config)
    tokens, more = tokens_of(config, n), tokens_of(config, sum(RESUMED), seed=1)
    options = dict(policy="knorm", sidecar=sidecar(config, memory=kind))
    large_options = dict(LARGE, budget=96 + memory.n_slots)
    with open_model(path) as model:
        large, reference = pair(model, config, memory=memory, **options, **large_options)
        with large, Context(model, n_ubatch=N_UBATCH, span=0, **options, **SMALL) as small:
            go_on(large, reference, tokens, [30] * (n // 30) + [1] * (n % 30))
            assert small.load(large.save(0), 0)
            reference.refit(**SMALL)
            assert small.stats().n_kept + small.stats().memory_slots == 48
            assert compare(small, reference) < 2e-2
            go_on(small, reference, more, RESUMED)


def test_a_memory_comes_and_goes(tiny: Tiny, sidecar: Sidecar) -> None:
    """It begins empty where there was none, and is forgotten where there is none; another kind or size is refused."""
    path, config = tiny("llama")
    tokens, more = tokens_of(config, 120), tokens_of(config, sum(RESUMED), seed=1)
    with_one = dict(memory="centroid", memory_slots=8, policy="knorm")
    with open_model(path) as model:
        old, reference = pair(model, config, policy="knorm", **SMALL)
        new = Context(model, n_ubatch=N_UBATCH, span=0, **with_one, **SMALL)
        with old, new:
            new.feed(tokens_of(config, 200, seed=3), 32)  # what it remembers of this is gone
            go_on(old, reference, tokens, [30] * 4)
            assert new.load(old.save(0), 0)
            reference.refit(memory=Centroid(8, [True] * config.n_layer, [1.0] * config.n_layer), **SMALL)
            assert compare(new, reference) < 2e-2
            go_on(new, reference, more, RESUMED)
            state = new.save(0)
            assert old.load(state, 0)
            reference.refit(memory=None, **SMALL)
            go_on(old, reference, more, RESUMED)
        for change, words in (
            (dict(memory_slots=9), "a memory 'centroid' of 8 slots, this context has 'centroid' of 9"),
            (dict(memory=None, memory_slots=0, sidecar=sidecar(config, memory="residual")), "this context has 'residual' of 0"),
        ):
            with Context(model, n_ubatch=N_UBATCH, span=0, **{**with_one, **SMALL, **change}) as c:
                assert words in said(c, state)


# spans


@pytest.mark.parametrize("policy", ["streaming", "keydiff", "snapkv"])
@pytest.mark.parametrize("spans", [(0, 96), (160, 96), (96, 160)], ids=str)
@pytest.mark.parametrize("window", [5, 25])
def test_positions_are_renewed_as_before(tiny: Tiny, policy: str, spans: tuple[int, int], window: int) -> None:
    """Whatever the span and the window were, and with entries of the window missing."""
    path, config = tiny("llama")
    tokens, more = tokens_of(config, 210), tokens_of(config, 200, seed=1)
    with open_model(path) as model:
        old, reference = pair(model, config, policy=policy, span=spans[0], budget=64, sinks=3, window=9)
        new = dict(budget=48, sinks=5, window=window, span=spans[1])
        with old, Context(model, n_ubatch=N_UBATCH, policy=policy, **new) as c, Context(model, n_ubatch=N_UBATCH, policy=policy, **new) as d:
            go_on(old, reference, tokens, [30] * 7)
            assert c.load(old.save(0), 0)
            reference.refit(**new)
            assert reference.adopt(c.positions()) < 2e-2
            np.testing.assert_equal(c.rotary(), reference.rotary)
            for n in (30, 1, 1, 30, 7, 30, 30, 1, 1, 30):
                go_on(c, reference, more[:n], [n])
                assert d.load(c.save(0), 0) and d.save(0) == c.save(0)
                c, d = d, c
                more = more[n:]
            assert c.stats().n_rebases > (spans[0] > 0)


# models of several kinds of layers


@each_kind
def test_layers_of_other_kinds_go_along(made: Made, name: str) -> None:  # noqa: F811
    """Windows of a context with a larger ubatch, or a smaller one, and recurrent states; the budget evicts beside them."""
    text, more = made.text(150), made.text(60, seed=1)
    with made.context(n_ubatch=96, budget=60) as large, made.context(n_ubatch=8) as small, made.context(n_ubatch=96) as back:
        large.feed(text, 96)
        large.feed(text[:3], 1)
        assert small.load(large.save(0), 0)
        assert small.stats().n_kept == 44 and small.n_seen() == 153
        held = small.positions()
        assert back.load(small.save(0), 0)
        np.testing.assert_equal(back.positions(), held)
        made.same(back.feed(more, 8), small.feed(more, 8))
        np.testing.assert_equal(back.positions(), small.positions())


@each_kind
def test_a_smaller_ubatch_changes_nothing_else(made: Made, name: str) -> None:  # noqa: F811
    text, more = made.text(150), made.text(40, seed=1)
    with made.context(n_ubatch=96) as large, made.context(n_ubatch=8) as small:
        large.feed(text, 96)
        assert small.load(large.save(0), 0)
        made.same(small.feed(more, 1), large.feed(more, 1))
        np.testing.assert_equal(small.positions(), large.positions())


# any of it, in any order

CONFIGS: list[dict[str, Any]] = [
    dict(budget=budget, window=window, sinks=sinks, policy=policy, n_ubatch=n_ubatch)
    for budget, window, sinks, policy, n_ubatch in (
        (96, 20, 4, "keydiff", 32), (40, 9, 3, "knorm", 16), (60, 1, 0, "streaming", 7), (33, 20, 10, "random", 32),
        (80, 40, 2, "snapkv", 24), (70, 8, 8, "tova", 16), (64, 8, 4, "full", 16),
    )
]  # fmt: skip


@given(
    start=st.integers(0, len(CONFIGS) - 1),
    path=st.lists(
        st.tuples(st.integers(1, 90), st.integers(0, 12), st.integers(0, len(CONFIGS) - 1), st.sampled_from([None, 0])),
        min_size=1, max_size=6,
    ),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_way_through_other_caches(tiny: Tiny, start: int, path: list[tuple[int, int, int, Optional[int]]]) -> None:
    """Text, some of it taken back, and on to another cache: what it takes up is what it keeps, and goes on; what it refuses has a
    reason, and changes nothing."""
    file, config = tiny("llama", n_layer=1)
    rng = np.random.default_rng(0)
    with open_model(file) as model:
        contexts = [Context(model, type_k=F32, type_v=F32, **options) for options in CONFIGS]
        try:
            c = contexts[start]
            for n, back, target, seq in path:
                for token in rng.integers(3, config.n_vocab, n).tolist():
                    if CONFIGS[contexts.index(c)]["policy"] == "full" and c.stats().n_kept == 64:
                        break
                    c.decode([token])
                c.seq_rm(0, max(c.n_seen() - back, 1))
                state, held, seen = c.save(seq), c.positions(), c.n_seen()
                new = contexts[target]
                before = new.save(seq)
                if not new.load(state, seq):
                    assert api.last_error().startswith("bounded KV state: ")
                    assert new.save(seq) == before
                    continue
                assert new.n_seen() == seen and new.stats().n_kept <= CONFIGS[target]["budget"]
                if len(held[0][0]) <= CONFIGS[target]["budget"]:
                    np.testing.assert_equal(new.positions(), held)
                for was, now in zip(held[0], new.positions()[0]):
                    assert set(now.tolist()) <= set(was.tolist())
                    first = [p for p in was.tolist() if p < CONFIGS[target]["sinks"] or p >= seen - CONFIGS[target]["window"]]
                    assert set(first) <= set(now.tolist())
                c = new
        finally:
            for context in contexts:
                context.close()


@pytest.mark.parametrize("policy", ["streaming", "keydiff"])
def test_a_window_that_grows_with_the_budget_is_that_of_the_new_budget(tiny: Tiny, policy: str) -> None:
    """That of the old one, a quarter of it, may have more tokens than there is room for now."""
    path, config = tiny("llama")
    tokens, more = tokens_of(config, 900), tokens_of(config, sum(RESUMED), seed=1)
    with open_model(path) as model:
        large = Context(model, n_ubatch=100, span=0, policy=policy, budget=900, window=0)
        small, again = (Context(model, n_ubatch=N_UBATCH, span=0, policy=policy, budget=160, window=0) for _ in range(2))
        with large, small, again:
            for i in range(0, 900, 100):
                large.decode(tokens[i : i + 100])
            reference = BoundedReference(config, policy=policy, budget=900, sinks=4, window=224, cache_dtype=CACHES["f16"][1])
            for i in range(0, 900, 100):
                reference.feed(tokens[i : i + 100])
            assert small.load(large.save(0), 0)
            reference.refit(policy=policy, budget=160, sinks=4, window=128)
            assert compare(small, reference) < 2e-2
            assert all(set(range(900 - 128, 900)) <= set(head.tolist()) for layer in small.positions() for head in layer)
            assert again.load(small.save(0), 0)
            go_on(small, reference, more, RESUMED)
