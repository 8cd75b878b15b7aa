"""Tokens that were guessed wrong leave no trace in a bounded cache: neither where it evicts, nor where it renews positions.

The model is one whose sums do not depend on how many tokens a batch has (weights of Q4_1, as many heads as KV heads), so what a
draft leaves can be compared bit for bit with what tokens that come one by one leave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from conftest import Tiny
from indexmem_edge.native import api
from reference.indexers import random_indexer, write_sidecar
from support.comparing import tokens_of
from support.mixed import RECURRENT, WINDOWS
from support.native_context import Q8_0, Context, open_model
from tiny.models import write_model

SAME_SUMS: dict[str, Any] = dict(tensor_type="Q4_1", n_head=2, n_head_kv=2)
USUAL: dict[str, Any] = dict(budget=60, sinks=3, window=9, n_ubatch=16, n_threads=1)
CASES: dict[str, dict[str, Any]] = {
    "streaming": {},
    "knorm-q8_0": dict(policy="knorm", type_k=Q8_0, type_v=Q8_0),
    "keydiff": dict(policy="keydiff", evict_step=1),
    "random": dict(policy="random", seed=3),
    "tova": dict(policy="tova", evict_step=7),
    "snapkv": dict(policy="snapkv", window=33),
    "expected": dict(policy="expected", window=33),
    "ratio": dict(policy="knorm", budget_ratio=0.4, window=5, sinks=1, evict_step=6),
    "span": dict(policy="keydiff", span=90),
    "centroid": dict(policy="keydiff", memory="centroid", memory_slots=5),
    "centroid-span": dict(memory="centroid", memory_slots=5, span=90, type_k=Q8_0, type_v=Q8_0),
    "retention-mlp": {},
    "pairwise-mean": dict(span=110),
}
KEEP_QUERIES = ("snapkv", "expected", "pairwise-mean")  # older ones, which nobody reads any more, are those that drafts have overwritten
N_RING = 32 + 32  # rows for them at most


class Made:
    def __init__(self, model: Any, config: Any, settings: dict[str, Any], queries: bool) -> None:
        self.model, self.config, self.settings, self.keeps_queries = model, config, settings, queries

    def context(self, **more: Any) -> Context:
        return Context(self.model, **{**USUAL, **self.settings, **more})


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name, folder = request.param, tmp_path_factory.mktemp("drafts")
    config = write_model(folder / "model.gguf", "llama", **SAME_SUMS)
    options = dict(CASES[name])
    if name in ("retention-mlp", "pairwise-mean"):
        sidecar: Path = folder / "sidecar.gguf"
        write_sidecar(sidecar, random_indexer(name, config.n_layer, config.n_embd, config.n_head_kv))
        options |= dict(policy="indexer", sidecar=sidecar)
    with open_model(folder / "model.gguf") as model:
        made = Made(model, config, options, name in KEEP_QUERIES)
        tokens = tokens_of(config, 40)
        with made.context(budget=200, budget_ratio=0.0, span=0) as one, made.context(budget=200, budget_ratio=0.0, span=0) as many:
            if not np.array_equal(one.feed(tokens, 1), many.feed(tokens, 7)):
                pytest.skip("on this CPU sums depend on how many tokens a batch has")
        yield made


def check_draft(c: Context, text: list[int], asked: int, right: int) -> int:
    """Evaluates the next token of a text and drafts, takes out those that are wrong, and returns how many were right."""
    start = c.n_seen()
    n = api.draft_room(c.ctx, asked)
    assert n <= asked
    right = min(right, n)
    drafts = [t if i < right else (t + 1) % c.n_vocab for i, t in enumerate(text[start + 1 : start + 1 + n])]
    before = c.stats()
    c.decode([text[start], *drafts])
    after = c.stats()
    if n:
        assert (after.n_evictions, after.n_rebases) == (before.n_evictions, before.n_rebases)
        assert right == n or c.seq_rm(0, start + 1 + right)
    assert c.n_seen() == start + 1 + right
    assert c.stats().n_kept <= c.stats().budget_now
    return right


@settings(max_examples=4, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=20, max_size=40), beginning=st.integers(1, 58))
def test_nothing_is_left_of_wrong_drafts(made: Made, plan: list[tuple[int, int]], beginning: int) -> None:
    text = tokens_of(made.config, 700, seed=2)
    with made.context() as c, made.context() as plain:
        for one in (c, plain):
            one.feed(text[:beginning], 16)
        for asked, right in plan:
            check_draft(c, text, asked, right)
            logits = plain.feed(text[plain.n_seen() : c.n_seen()], 1)
            assert c.positions()[0][0].tolist() == plain.positions()[0][0].tolist()
            if not made.keeps_queries:
                assert c.save(0) == plain.save(0)
        rest = text[c.n_seen() : c.n_seen() + N_RING]
        assert np.array_equal(c.feed(rest, 1), plain.feed(rest, 1)) and len(logits)
        assert c.save(0) == plain.save(0)
        assert plain.stats().n_evictions > 0 or plain.n_seen() < USUAL["budget"]


def test_every_length_around_every_eviction(made: Made) -> None:
    text = tokens_of(made.config, 700, seed=3)
    with made.context() as c, made.context() as plain:
        plain.feed(text[:30], 16)
        lengths, already = set(), plain.stats().n_evictions
        while plain.stats().n_evictions < already + 3:
            state = plain.save(0)
            for right in range(7):
                assert c.load(state, 0)
                if check_draft(c, text, 6, right) < right:
                    break
                lengths.add(right)
                with made.context() as alone:
                    assert alone.load(state, 0)
                    alone.feed(text[alone.n_seen() : c.n_seen()], 1)
                    following = text[c.n_seen() : c.n_seen() + 12]
                    assert np.array_equal(c.feed(following, 1), alone.feed(following, 1))
                    assert c.stats().n_evictions == alone.stats().n_evictions
                    np.testing.assert_equal(c.positions(), alone.positions())
                    np.testing.assert_equal(c.rotary(), alone.rotary())
            plain.decode([text[plain.n_seen()]])
        assert {0, 1, 2} <= lengths


def test_no_more_is_taken_back_than_asked(made: Made) -> None:
    """A batch of a token that evicts, and drafts: what the library says must not be done cannot be undone."""
    text = tokens_of(made.config, 200, seed=4)
    with made.context() as c:
        while api.draft_room(c.ctx, 1):
            c.decode([text[c.n_seen()]])
        c.decode(text[c.n_seen() : c.n_seen() + 3])
        assert c.stats().n_evictions + c.stats().n_rebases > 0 or made.settings.get("policy") == "indexer"


@pytest.mark.parametrize("name", WINDOWS)
@settings(max_examples=4, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)), min_size=20, max_size=40))
def test_layers_with_a_window(tiny: Tiny, name: str, plan: list[tuple[int, int]]) -> None:
    """Their sums do depend on the batch: what is kept is compared, and that all that is asked for is taken out."""
    path, config = tiny(name)
    text = tokens_of(config, 1200)
    usual = dict(budget=60, sinks=3, window=20, n_ubatch=24, n_threads=1)
    with open_model(path) as model, Context(model, **usual) as c, Context(model, **usual) as plain:
        for asked, right in plan:
            check_draft(c, text, asked, right)
            plain.feed(text[plain.n_seen() : c.n_seen()], 1)
            np.testing.assert_equal(c.positions(), plain.positions())
        assert c.stats().n_evictions == plain.stats().n_evictions


@pytest.mark.parametrize("name", WINDOWS[:1])
def test_drafts_of_several_sequences(tiny: Tiny, name: str) -> None:
    """Batches are cut where one of the sequences has no more tokens, so drafts lie in several ubatches."""
    path, config = tiny(name)
    rng = np.random.default_rng(1)
    texts = [tokens_of(config, 600, seed=s) for s in range(3)]
    usual = dict(budget=60, sinks=3, window=20, n_ubatch=24, n_threads=1)
    with open_model(path) as model, Context(model, n_seq=3, **usual) as c:
        for _ in range(40):
            start = [c.n_seen(s) for s in range(3)]
            rooms = [api.draft_room(c.ctx, int(rng.integers(0, 8)), s) for s in range(3)]
            c.decode_many({s: texts[s][start[s] : start[s] + 1 + rooms[s]] for s in range(3)})
            for s in range(3):
                assert c.seq_rm(s, start[s] + 1 + int(rng.integers(0, rooms[s] + 1)))
        alone = []
        for s in range(3):
            with Context(model, **usual) as plain:
                plain.feed(texts[s][: c.n_seen(s)], 1)
                alone.append(plain.positions())
        assert all(c.stats(s).n_evictions > 1 for s in range(3))
        np.testing.assert_equal([c.positions(s) for s in range(3)], alone)


@pytest.mark.parametrize("name", RECURRENT[:1])
def test_recurrent_layers_go_back_as_far_as_they_keep_copies(tiny: Tiny, name: str) -> None:
    path, config = tiny(name)
    text = tokens_of(config, 100)
    with open_model(path) as model:
        with Context(model, n_threads=1, budget=60) as c:
            c.feed(text[:20], 16)
            assert api.draft_room(c.ctx, 5) == 0
        with Context(model, n_threads=1, budget=60, n_rs_seq=3) as c:
            c.feed(text[:20], 16)
            assert api.draft_room(c.ctx, 5) == 3
            assert check_draft(c, text, 5, 0) == 0


def test_the_policy_that_never_evicts_is_filled_to_the_last_entry(tiny: Tiny) -> None:
    path, config = tiny("llama")
    text = tokens_of(config, 100)
    with open_model(path) as model, Context(model, **{**USUAL, "policy": "full"}) as c:
        while c.n_seen() < USUAL["budget"]:
            check_draft(c, text, 9, 4)
        assert c.stats().n_kept == USUAL["budget"]


def test_without_a_budget_all_can_be_taken_back(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    with open_model(path) as model, Context(model) as c:
        assert api.draft_room(c.ctx, 12345) == 12345
