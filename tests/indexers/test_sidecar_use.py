"""A sidecar in use: `Llama(indexmem=...)`, `--indexmem`, the ratio, sessions, and every way to get it wrong."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import BudgetError, LatentMemoryError, ModelNotSupported, PolicyError, SessionError, SidecarError
from indexmem_edge.native import api, find  # fmt: skip
from indexmem_edge.options import CacheOptions
from indexmem_edge.runtime.choice import SidecarKinds, choose_memory, choose_policy
from support.commands import one_error, run
from support.sidecars import fingerprint, shape

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

BUDGET, WINDOW = 96, 16
TOKENS = [3 + (7 * i) % 250 for i in range(400)]


def load(model: Path, **options: Any) -> Any:
    defaults = {"kv_budget": BUDGET, "kv_window": WINDOW, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1}
    return indexmem_edge.Llama(model, verbose=False, **{**defaults, **options})


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a retention sidecar for it."""
    from indexmem_edge.bench.synthetic import random_sidecar

    model, config = tiny("llama")
    path = tmp_path_factory.mktemp("sidecars") / "tiny.indexmem.gguf"
    return model, random_sidecar(path, shape(config), "retention", fingerprint=fingerprint(model), mid_dim=32)


# options, before anything is loaded


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"kv_budget": None, "kv_window": None}, BudgetError, "indexmem needs a bounded KV cache: give a kv_budget"),
        ({"kv_policy": "snapkv"}, PolicyError, "nothing would be used: leave kv_policy out"),
        ({"indexmem": None, "kv_policy": "indexer"}, PolicyError, "--indexmem FILE"),
        ({"indexmem": None, "kv_budget": 0, "kv_window": None, "kv_budget_ratio": 0.5}, BudgetError, "kv_budget_ratio needs"),
        ({"kv_budget_ratio": 0}, BudgetError, "above 0 and at most 1, found 0"),
        ({"kv_budget_ratio": 1.01}, BudgetError, "above 0 and at most 1"),
        ({"kv_budget_ratio": math.nan}, BudgetError, "above 0 and at most 1, found nan"),
        ({"kv_budget_ratio": "half"}, BudgetError, "number above 0"),
        ({"kv_budget_ratio": True}, BudgetError, "number above 0"),
        ({"indexmem": "no/such.gguf"}, SidecarError, "Sidecar path does not exist: no/such.gguf"),
        ({"indexmem": "."}, SidecarError, "folder"),
        ({"indexmem": "/dev/null"}, SidecarError, "not a regular file"),
        ({"indexmem": __file__}, SidecarError, "not a GGUF sidecar"),
        ({"indexmem": "a\0b"}, SidecarError, "null"),
    ],
)
def test_impossible_options(
    made: tuple[Path, Path], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    model, sidecar = made
    with pytest.raises(kind, match=words) as caught:
        load(model, **{"indexmem": sidecar, **options})
    assert isinstance(caught.value, ValueError)


def test_the_policy_that_is_meant() -> None:
    nothing, indexer, memory = SidecarKinds(), SidecarKinds("kvzap", "none"), SidecarKinds("none", "centroid")
    both = SidecarKinds("kvzap", "residual")
    assert choose_policy(None, "off", None, nothing) == choose_policy("", "off", None, nothing) == "streaming"
    assert choose_policy(None, "off", "x", indexer) == choose_policy("indexer", "off", "x", indexer) == "indexer"
    assert choose_policy("tova", "off", None, nothing) == choose_policy("tova", "centroid", "x", memory) == "tova"
    assert choose_policy(None, "centroid", "x", memory) == "streaming"
    assert choose_policy("tova", "residual", "x", both) == "tova"  # a memory without its indexer
    for policy, remembers, kinds in [("tova", "off", both), ("tova", "centroid", both), ("indexer", "centroid", memory)]:
        with pytest.raises(PolicyError):
            choose_policy(policy, remembers, "x", kinds)


def test_the_memory_that_is_meant() -> None:
    known = api.memories()
    nothing, sidecar, trained = SidecarKinds(), SidecarKinds("none", "centroid"), SidecarKinds("kvzap", "residual")
    assert choose_memory(None, None, nothing, known) == choose_memory("off", None, trained, known) == ("off", 0)
    assert choose_memory("centroid", None, nothing, known) == choose_memory("centroid", None, trained, known) == ("centroid", 64)
    assert choose_memory(None, None, sidecar, known) == ("centroid", 0)
    assert choose_memory(None, 7, sidecar, known) == choose_memory("centroid", 7, nothing, known) == ("centroid", 7)
    assert choose_memory(None, None, trained, known) == ("residual", 0)
    for memory, slots, kinds in [("residual", None, nothing), ("residual", 3, trained), ("off", 3, sidecar), ("x", None, sidecar)]:
        with pytest.raises(LatentMemoryError):
            choose_memory(memory, slots, kinds, known)


def test_options_survive_as_keywords(made: tuple[Path, Path]) -> None:
    options = CacheOptions.from_keywords(
        {"kv_budget": BUDGET, "kv_window": WINDOW, "kv_budget_ratio": 0.5, "indexmem": made[1]}
    )
    assert options.sidecar == str(made[1]) and options.policy == "indexer"
    keywords = options.keywords()
    assert keywords["indexmem"] == str(made[1]) and keywords["kv_budget_ratio"] == 0.5
    assert CacheOptions.from_keywords(keywords) == options
    assert CacheOptions().keywords() == {}


# a cache with an indexer


@pytest.mark.parametrize(
    "variant, kind",
    [
        ("retention", "retention"),
        ("retention-linear", "retention"),
        ("kvzap", "kvzap"),
        ("fast_kvzip", "fast_kvzip"),
        ("pairwise", "pairwise"),
    ],
)
def test_every_kind_keeps_the_budget_and_says_what_it_costs(
    tiny: Tiny, tmp_path: Path, variant: str, kind: str
) -> None:
    from indexmem_edge.bench.synthetic import random_sidecar

    model, config = tiny("llama")
    llm = load(model, indexmem=random_sidecar(tmp_path / "s.indexmem.gguf", shape(config), variant))
    assert (llm.kv_options.policy, llm.kv_stats().indexer) == ("indexer", kind)
    llm.prefill(TOKENS)
    stats = llm.kv_stats()
    assert stats.kept <= BUDGET == stats.budget_now and stats.evicted == len(TOKENS) - stats.kept
    assert 0 < stats.indexer_bytes < stats.meta_bytes and stats.sidecar_bytes > 0
    assert (stats.policy, stats.sidecar) == ("indexer", "s.indexmem.gguf")
    assert f"{kind}, s.indexmem.gguf (" in str(stats) and "positions and state (indexer " in str(stats)
    assert len(stats.line()) < 80
    heads = [head.tolist() for layer in llm.kv_snapshot().values() for head in layer]
    assert kind == "pairwise" or any(head != heads[0] for head in heads), (
        "heads that rank differently keep different tokens"
    )
    llm.close()


def test_without_a_sidecar_there_is_nothing_of_it(made: tuple[Path, Path]) -> None:
    stats = load(made[0]).kv_stats()
    assert (stats.indexer, stats.sidecar, stats.indexer_bytes, stats.sidecar_bytes) == ("", "", 0, 0)
    assert "indexer" not in str(stats) and json.dumps(stats.to_dict())


def test_the_ratio_follows_the_text(made: tuple[Path, Path]) -> None:
    llm = load(made[0], indexmem=made[1], kv_budget_ratio=0.5)
    least = 4 + WINDOW + 1
    for seen in (32, 64, 128, 192, 400):
        llm.prefill(TOKENS[:seen])
        stats = llm.kv_stats()
        allowed = min(BUDGET, max(math.ceil(0.5 * seen), least))
        assert stats.kept <= stats.budget_now <= allowed
    assert "at this length" not in str(llm.kv_stats())
    llm.reset()
    llm.prefill(TOKENS[:64])
    assert f"budget {BUDGET} entries per KV head, 32 at this length" in str(llm.kv_stats())


def test_the_ratio_works_without_a_sidecar(made: tuple[Path, Path]) -> None:
    llm = load(made[0], kv_policy="knorm", kv_budget_ratio=0.25)
    llm.prefill(TOKENS[:200])
    assert llm.kv_stats().kept <= 50


def test_pickles_carry_the_sidecar(made: tuple[Path, Path]) -> None:
    llm = load(made[0], indexmem=made[1], kv_budget_ratio=0.75)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.kv_options == llm.kv_options and copy.kv_stats().indexer == "retention"


def test_chat_with_a_sidecar(made: tuple[Path, Path]) -> None:
    llm = load(made[0], indexmem=made[1], kv_pin="auto")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The tide. " * 30}]
    llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)
    stats = llm.kv_stats()
    assert stats.evicted > 0 and stats.pin > 0


# sidecars that are not accepted


def test_a_sidecar_of_another_model(tiny: Tiny, made: tuple[Path, Path], tmp_path: Path) -> None:
    from indexmem_edge.bench.synthetic import random_sidecar

    model, config = tiny("llama")
    other = random_sidecar(tmp_path / "o.indexmem.gguf", shape(config), "kvzap", fingerprint="0" * 16)
    with pytest.raises(SidecarError, match="fingerprint 0000000000000000"):
        load(model, indexmem=other)
    qwen, qwen_config = tiny("qwen2")
    with pytest.raises(SidecarError, match="o.indexmem.gguf"):
        load(qwen, indexmem=other)
    larger = random_sidecar(tmp_path / "l.indexmem.gguf", shape(qwen_config), "kvzap")
    with pytest.raises(SidecarError):
        load(model, indexmem=larger)
    assert load(model, indexmem=made[1]).kv_stats().indexer == "retention"  # nothing is left behind


def test_damaged_sidecars(made: tuple[Path, Path], tmp_path: Path) -> None:
    whole = made[1].read_bytes()
    bad = tmp_path / "bad.gguf"
    for n in (5, 100, 1000, len(whole) - 64):
        bad.write_bytes(whole[:n])
        with pytest.raises(SidecarError):
            load(made[0], indexmem=bad)
    with pytest.raises(SidecarError, match="model"):
        load(made[0], indexmem=made[0])


def test_a_model_that_cannot_be_bounded_is_still_named_as_the_reason(tiny: Tiny, made: tuple[Path, Path]) -> None:
    with pytest.raises(ModelNotSupported, match="recurrent"):
        load(tiny("mamba")[0], indexmem=made[1])


# sessions


def test_sessions_are_bound_to_the_sidecar(tiny: Tiny, made: tuple[Path, Path], tmp_path: Path) -> None:
    from indexmem_edge.bench.synthetic import random_sidecar

    model, config = tiny("llama")
    llm = load(model, indexmem=made[1])
    llm.prefill(TOKENS)
    llm.save_session(tmp_path / "s")
    expected = [token for _, token in zip(range(4), llm.generate([*TOKENS, 5], temp=0.0))]

    elsewhere = tmp_path / "renamed.gguf"
    elsewhere.write_bytes(made[1].read_bytes())
    same = load(model, indexmem=elsewhere, kv_budget_ratio=0.9)
    same.load_session(tmp_path / "s")
    assert [token for _, token in zip(range(4), same.generate([*TOKENS, 5], temp=0.0))] == expected
    assert same.kv_stats().reevaluated == 0 and same.kv_stats().turn_evaluated == 1

    other = random_sidecar(tmp_path / "other.gguf", shape(config), "retention", seed=1, mid_dim=32)
    words = r"the sidecar 'tiny.indexmem.gguf' \('\w{16}'\), this one has the sidecar 'other.gguf' .*name that one with --indexmem"
    with pytest.raises(SessionError, match=words):
        load(model, indexmem=other).load_session(tmp_path / "s")

    said: list[str] = []
    plain = load(model, kv_warn=lambda warning: said.append(str(warning)))
    plain.load_session(tmp_path / "s")
    assert said == [
        f"{tmp_path / 's'}: saved with kv_policy indexer, continuing with streaming: the scores of tiny.indexmem.gguf are left out"
    ]
    plain.save_session(tmp_path / "plain")
    with pytest.raises(SessionError, match="kv_policy = 'streaming', without the scores.*leave it out with --indexmem off.*again=True"):
        llm.load_session(tmp_path / "plain")
    llm.load_session(tmp_path / "plain", again=True)
    assert llm.kv_stats().tokens_seen == len(TOKENS)


# the command line


def test_generate_with_a_sidecar(made: tuple[Path, Path]) -> None:
    flags = ("--kv-budget", "96", "--kv-window", "16", "-ub", "64", "-n", "4", "-t", "1", "-m", str(made[0]))
    result = run(
        "generate", *flags, "--indexmem", str(made[1]), "--kv-budget-ratio", "0.5", "-p", "tide " * 40, "--json"
    )
    assert result.returncode == 0, result.stderr
    stats = json.loads(result.stdout)["stats"]
    assert stats["indexer"] == "retention" and stats["sidecar"] == "tiny.indexmem.gguf"
    assert stats["kept"] <= stats["budget_now"] <= 96


def test_errors_are_one_line(made: tuple[Path, Path]) -> None:
    model, sidecar = (str(path) for path in made)
    one_error(run("generate", "-p", "x", "-m", model, "--kv-policy", "indexer"), "--indexmem FILE")
    one_error(
        run("generate", "-p", "x", "-m", model, "--indexmem", sidecar, "--kv-policy", "tova"), "leave kv_policy out"
    )
    one_error(
        run("generate", "-p", "x", "-m", model, "--indexmem", sidecar, "--kv-budget", "0"), "needs a bounded KV cache"
    )
    one_error(run("generate", "-p", "x", "-m", model, "--indexmem", model), model, "sidecar")
    one_error(run("generate", "-p", "x", "-m", model, "--kv-budget-ratio", "2"), "at most 1")
    one_error(run("chat", "-m", model, "--indexmem", "none.gguf"), "does not exist")


def test_the_kinds_are_listed() -> None:
    assert {"retention", "kvzap", "fast_kvzip", "pairwise"} <= set(indexmem_edge.indexers())
    assert "indexer" in indexmem_edge.policies()
