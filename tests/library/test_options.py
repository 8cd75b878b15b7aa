"""One list of options: what is made of it, and what is refused of what a person asks."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import BudgetError, CacheOptions, ModelFileError, kv_bytes, llama_cpp
from indexmem_edge.native import api, find
from indexmem_edge.options import OPTIONS, PIN_AUTO, default_ubatch, require_known
from tiny.models import FIRST_FILLER

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

BUDGET, WINDOW = 96, 16
TOKENS = [FIRST_FILLER + i % 50 for i in range(400)]
EXAMPLES: dict[str, Any] = {
    "budget": 200, "budget_ratio": 0.5, "sidecar": "off", "memory": "centroid", "memory_slots": 8, "policy": "keydiff",
    "sinks": 3, "window": 9, "pin": 5, "evict_step": 7, "seed": 11, "span": 4000,
    "layer_budgets": "equal",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    return tiny("llama")[0]


def load(model: Path, **options: Any) -> Any:
    return indexmem_edge.Llama(model, verbose=False, **{"n_threads": 1, "n_threads_batch": 1, **options})


# the list


def test_the_list_is_that_of_the_library() -> None:
    native = {name for name, _ in api.Params._fields_} - {"struct_size"}
    assert set(OPTIONS) == native == set(EXAMPLES)
    defaults = api.library().indexmem_default_params()
    ours = CacheOptions()
    assert (defaults.sinks, defaults.window, defaults.span) == (ours.sinks, ours.window, api.SPAN_TRAINED)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_is_a_keyword_with_words_that_reaches_the_library(
    model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    option, value = OPTIONS[name], EXAMPLES[name]
    assert option.keyword in inspect.signature(indexmem_edge.Llama).parameters
    assert f"{option.keyword}: {option.help}" in str(indexmem_edge.Llama.__doc__)
    asked: dict[str, Any] = {}
    real = api.request_context
    monkeypatch.setattr(api, "request_context", lambda **values: (asked.update(values), real(**values)))
    keywords = {"kv_budget": BUDGET, "kv_window": WINDOW, "memory": "centroid", "memory_slots": 4, option.keyword: value}
    llm = load(model, **keywords)
    assert asked[name] == (None if value == "off" else value) == getattr(llm.kv_options, name)
    again = pickle.loads(pickle.dumps(llm))
    assert again.kv_options == llm.kv_options


def test_the_signature_names_what_llama_cpp_takes_too() -> None:
    ours, theirs = (inspect.signature(c).parameters for c in (indexmem_edge.Llama, llama_cpp.Llama))
    assert set(theirs) <= set(ours) and {"kv_cancel", "kv_warn", "self"} - set(ours) == {"self"}

    class Own(indexmem_edge.Llama):
        def __init__(self, path: str) -> None:
            super().__init__(path)

    assert list(inspect.signature(Own).parameters) == ["path"]


def test_a_field_without_words_about_it_is_noticed() -> None:
    assert all(f.metadata["option"].help.endswith(".") for f in fields(CacheOptions))


# what is refused


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"budget"}))
@pytest.mark.parametrize("budget", [None, 0])
def test_every_option_needs_a_budget(model: Path, name: str, budget: Any) -> None:
    keyword, value = OPTIONS[name].keyword, model if name == "sidecar" else EXAMPLES[name]
    with pytest.raises(BudgetError, match=f"{keyword} needs a bounded KV cache: give a kv_budget"):
        load(model, kv_budget=budget, **{keyword: value})


@pytest.mark.parametrize("keyword, value", [("memory", "off"), ("indexmem", "off"), ("kv_span", 0), ("kv_policy", None)])
def test_what_asks_for_nothing_needs_none(model: Path, keyword: str, value: Any) -> None:
    assert load(model, **{keyword: value}).kv_options == CacheOptions()


@pytest.mark.parametrize(
    "given, meant",
    [("kv_buget", "kv_budget"), ("kv_polcy", "kv_policy"), ("memory_slot", "memory_slots"), ("indexmen", "indexmem"), ("kv_canel", "kv_cancel")],
)
def test_a_mistyped_option_is_refused_with_the_one_that_was_meant(model: Path, given: str, meant: str) -> None:
    with pytest.raises(BudgetError, match=f"unknown option {given} of the KV cache: did you mean {meant}"):
        load(model, **{given: 512})
    with pytest.raises(BudgetError, match=f"did you mean {meant}"):
        load(model, kv_budget=BUDGET, kv_window=WINDOW, **{given: 512})
    with pytest.raises(BudgetError, match=f"did you mean {meant}"):
        kv_bytes(model, **{given: 512})


def test_an_unknown_option_lists_those_that_there_are_and_llama_cpps_are_left_alone(model: Path) -> None:
    with pytest.raises(BudgetError, match=r"there are indexmem, kv_budget, .*memory_slots"):
        load(model, kv_unheard_of=1)
    with pytest.raises(BudgetError, match="unknown option kv_heads"):
        CacheOptions.from_keywords({"kv_budget": 512, "kv_heads": 1})
    llm = load(model, kv_overrides={"llama.expert_count": 0}, something_else=1)
    assert llm.n_ctx() == 512
    require_known(["memory_f16"], ["memory_f16"])


@pytest.mark.parametrize("bounded", [False, True])
def test_a_lora_that_cannot_be_loaded_is_refused(model: Path, tmp_path: Path, bounded: bool) -> None:
    budget = {"kv_budget": BUDGET, "kv_window": WINDOW} if bounded else {}
    (tmp_path / "page.html").write_text("<html>not found</html>")
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:3000])
    for name, words in (("none.gguf", "does not exist"), ("page.html", "not a GGUF LoRA"), ("cut.gguf", "cannot load the LoRA"), (".", "folder")):
        with pytest.raises(ModelFileError, match=words):
            load(model, lora_path=str(tmp_path / name), **budget)
    with pytest.raises(ModelFileError, match="expect general.type to be 'adapter'"):
        load(model, lora_path=str(model), **budget)
    load(model, **budget)  # nothing is left of the request


# defaults


def test_the_system_prompt_is_pinned_unless_something_else_is_asked_for(model: Path) -> None:
    llm = load(model, kv_budget=BUDGET, kv_window=WINDOW)
    assert llm.kv_options.pin == PIN_AUTO
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The tide. " * 30}]
    llm.create_chat_completion(messages, max_tokens=1)
    pin = llm.kv_stats().pin
    assert b"Be brief." in llm.detokenize(llm._input_ids[:pin].tolist(), special=True) and llm.kv_stats().evicted > 0
    assert load(model, kv_budget=BUDGET, kv_window=WINDOW, kv_pin=3).kv_stats().pin == 3


def test_threads_are_those_that_may_be_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from indexmem_edge.runtime import creation

    monkeypatch.setattr(creation, "default_threads", lambda: (3, 5))
    for options in ({}, {"kv_budget": BUDGET, "kv_window": WINDOW}):
        llm = indexmem_edge.Llama(model, verbose=False, **options)
        assert (llm.n_threads, llm.n_threads_batch) == (3, 5)
        assert (llm.context_params.n_threads, llm.context_params.n_threads_batch) == (3, 5)
    assert load(model, n_threads=1).n_threads == 1


@pytest.mark.parametrize("budget", [1, 33, 40, 96, 160, 200, 256, 300, 384, 512, 768, 1024, 2048, 100_000])
def test_the_working_room_does_not_outweigh_the_budget(budget: int) -> None:
    n = default_ubatch(budget)
    assert 32 <= n <= 512 and n & (n - 1) == 0
    half = max(1 << (budget // 2).bit_length() - 1, 32) if budget > 1 else 32
    slots, enough = (-(-(budget + room) // 256) * 256 for room in (n, min(half, 512)))
    assert n >= min(half, 512) and slots == enough  # more than half of the budget only where it costs nothing
    assert default_ubatch(0) == 512 and (budget < 1024 or n == 512)


def test_a_small_budget_has_little_working_room(model: Path) -> None:
    for budget, slots in ((256, 512), (512, 768), (1024, 1536), (2048, 2560)):
        assert load(model, kv_budget=budget).kv_stats().slots == slots
    assert load(model, kv_budget=256, n_ubatch=512).kv_stats().slots == 768


# sizes


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen35", "deepseek2", "gpt-oss"])
def test_the_size_is_known_before_the_model_is_loaded(tiny: Tiny, arch: str) -> None:
    model = tiny(arch)[0]
    for keywords in (
        {"kv_budget": 300},
        {"kv_budget": 1024, "kv_policy": "knorm", "type_k": 0, "type_v": 0},
        {"n_ctx": 1024, "flash_attn": True},
        {"kv_budget": 600, "n_ubatch": 32, "n_batch": 64},
    ):
        stats = load(model, **keywords).kv_stats()
        assert kv_bytes(model, **keywords) == stats.cache_bytes + stats.meta_bytes
    with pytest.raises(BudgetError, match="at least"):
        kv_bytes(model, kv_budget=20)


def test_the_size_of_a_memory_and_of_an_indexer_counts(demo_model: Path) -> None:
    for keywords in ({"kv_budget": 512}, {"kv_budget": 512, "memory": "centroid"}):
        stats = load(demo_model, **keywords).kv_stats()
        assert stats.indexer == "retention"
        assert kv_bytes(demo_model, **keywords) == stats.cache_bytes + stats.meta_bytes


# counts without a budget


def test_turns_are_counted_without_a_budget_as_with_one(model: Path) -> None:
    plain, bounded = load(model, n_ctx=512), load(model, kv_budget=300)
    rows = []
    for llm in (plain, bounded):
        counts = []
        for prompt in (TOKENS[:30], TOKENS[:40], [*TOKENS[:20], 300, 301], [300, 301, 302]):
            llm.create_completion(prompt, max_tokens=4, temperature=0.0, logit_bias={"2": -100.0})
            stats = llm.kv_stats()
            counts.append((stats.turn_evaluated, stats.turn_reused, stats.turn_generated))
        rows.append(counts)
    assert rows[0] == rows[1] and all(generated > 0 for _, _, generated in rows[0])
    assert [row[:2] for row in rows[0]] == [(30, 0), (10, 30), (2, 20), (3, 0)]
    plain.reset()
    assert plain.kv_stats().turn_evaluated == plain.kv_stats().turn_reused == plain.kv_stats().turn_generated == 0


def test_types_of_the_cache_by_name(demo_model: Path) -> None:
    from indexmem_edge import Llama

    options: dict[str, Any] = {"kv_budget": 256, "indexmem": "off", "n_ctx": 512}
    with Llama(demo_model, type_k="q8_0", type_v="q8_0", verbose=False, n_threads=1, **options) as llm:
        assert llm.context_params.type_k == llm.context_params.type_v == 8
    assert kv_bytes(demo_model, type_k="q8_0", type_v="q8_0", **options) == kv_bytes(demo_model, type_k=8, type_v=np.int32(8), **options)
    for bad in ("q9", 99, -1, 1.5, np.nan, []):
        for call in (Llama, kv_bytes):
            with pytest.raises(BudgetError, match="is not a cache type: choose one of f32, f16"):
                call(str(demo_model), type_k=bad, **options)
