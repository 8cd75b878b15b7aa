"""Recall: the shares against a dense evaluation, the policies against `policies.py`, and what is left in the folder."""

from __future__ import annotations

import builtins
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rich.console import Console

from indexmem_edge.convert import Checkpoint, Geometry, Provenance, write_sidecar
from indexmem_edge.errors import BudgetError, IndexMemError, SidecarError
from indexmem_edge.train.cache.future import attention_blocks, future_mass, kept_mask
from indexmem_edge.train.cache.policies import POLICIES, Context
from indexmem_edge.train.data.sample import Sample
from indexmem_edge.train.from_sidecar import modules_from_sidecar
from indexmem_edge.train.indexers.scorers import SCORERS
from indexmem_edge.train.judge import recall_report
from indexmem_edge.train.judge.recall import (
    BUDGETS,
    INDEXER,
    ORACLE,
    Recall,
    context_length,
    held_out_recall,
    kept_share,
    measure,
)
from indexmem_edge.train.model.decoder import Config, Decoder, Heads, causal
from indexmem_edge.train.model.rope import Rope
from reference.policies import RANKS, View

CONFIG = Config("llama", 3, 32, 6, 2, 16, 48, 50, 1e-5, 4096, Rope(10000.0, 16, True))
SINKS, WINDOW = 2, 8
KINDS = [("retention", {"mid_dim": 8, "decay": True}), ("retention", {"mid_dim": 0}), ("kvzap", {"mid_dim": 8})]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Random weights; attention is far from uniform."""
    c, rng = CONFIG, torch.Generator().manual_seed(0)

    def draw(n_out: int, n_in: int, gain: float = 1.0) -> Any:
        return gain * n_in**-0.5 * torch.randn(n_out, n_in, generator=rng)

    weights = {"token_embd.weight": draw(c.n_vocab, c.n_embd, 5.0), "output_norm.weight": torch.ones(c.n_embd)}
    for il in range(c.n_layer):
        shapes = {
            "attn_q": (c.n_head * c.head_dim, c.n_embd, 1.5), "attn_k": (c.n_head_kv * c.head_dim, c.n_embd, 1.5),
            "attn_v": (c.n_head_kv * c.head_dim, c.n_embd), "attn_output": (c.n_embd, c.n_head * c.head_dim),
            "ffn_gate": (c.n_ff, c.n_embd), "ffn_up": (c.n_ff, c.n_embd), "ffn_down": (c.n_embd, c.n_ff),
        }  # fmt: skip
        weights |= {f"blk.{il}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        weights |= {f"blk.{il}.{name}_norm.weight": torch.ones(c.n_embd) for name in ("attn", "ffn")}
    return Decoder(c, weights)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """A question at the end of the context, and text without one."""
    rng = np.random.default_rng(0)

    def sample(n: int, asked: int, source: str) -> Sample:
        return Sample(rng.integers(0, CONFIG.n_vocab, n, dtype=np.int32), np.ones(n, np.float32), asked, source)

    return [sample(150, 120, "lookup"), sample(203, 203, "book")]


def modules_of(kind: str, options: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(1)
    scorer = SCORERS[kind]
    constants = scorer.defaults(**(options or {}))
    return torch.nn.ModuleList(scorer(CONFIG.n_embd, CONFIG.n_head_kv, constants) for _ in range(CONFIG.n_layer))


@pytest.fixture(scope="module")
def modules() -> Any:
    return modules_of(*KINDS[0])


@pytest.fixture(scope="module")
def found(decoder: Decoder, modules: Any, samples: list[Sample]) -> Recall:
    return measure(decoder, modules, samples, BUDGETS, SINKS, WINDOW)


def heads_of(decoder: Decoder, sample: Sample) -> list[Heads]:
    out: list[Heads] = []

    def attend(heads: Heads) -> Any:
        out.append(heads)
        return causal(heads)

    decoder(torch.tensor(sample.tokens)[None], attend)
    return out


def dense_mass(heads: Heads, n: int) -> np.ndarray:
    """[H, T]: all keys, queries from n on, as one softmax in float64."""
    q, k = heads.q[0].double().numpy(), heads.k[0].double().numpy()
    group, total = len(q) // len(k), q.shape[1]
    mass = np.zeros(k.shape[:2])
    for h in range(len(q)):
        scores = q[h] @ k[h // group].T * CONFIG.scale
        scores[np.triu_indices(total, 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mass[h // group] += (p / p.sum(-1, keepdims=True))[n:].sum(0)
    return mass


def test_the_context_ends_at_the_question_or_before_a_tail(samples: list[Sample]) -> None:
    assert [context_length(sample) for sample in samples] == [120, 203 - 26]


def test_mass_is_that_of_a_dense_softmax_and_none_is_lost(decoder: Decoder, samples: list[Sample]) -> None:
    n, total = 120, 150
    for heads in heads_of(decoder, samples[0]):
        mass = future_mass(heads.q[0], heads.k[0], CONFIG.scale, n)
        dense = dense_mass(heads, n)
        np.testing.assert_allclose(mass.numpy(), dense[:, :n], rtol=1e-4, atol=1e-6)
        within = sum(p[..., n:].sum((1, 2, 3)) for _, p in attention_blocks(heads.q[0], heads.k[0], CONFIG.scale, n))
        np.testing.assert_allclose(mass.sum(-1) + within, CONFIG.group * (total - n), rtol=1e-5)


@pytest.mark.parametrize("policy", [*POLICIES, INDEXER])
def test_shares_are_those_of_a_dense_evaluation(
    decoder: Decoder, modules: Any, samples: list[Sample], found: Recall, policy: str
) -> None:
    for i, sample in enumerate(samples):
        n = context_length(sample)
        for heads in heads_of(decoder, sample):
            mass = dense_mass(heads, n)[:, :n]
            context = Context(heads.layer, heads.hidden[0, :n], heads.q[0, :, :n], heads.k[0, :, :n], CONFIG.scale)
            if policy == INDEXER:
                scores = modules[heads.layer].ranks(context.hidden, context.positions, n - 1).detach()
            else:
                scores = POLICIES[policy](context)
            for budget in BUDGETS:
                entries = round(budget * n)
                window = min(WINDOW, entries // 4)
                for h, ranks in enumerate(scores.expand(len(mass), -1).numpy()):
                    kept = [*range(SINKS), *range(n - window, n)]
                    others = sorted(range(SINKS, n - window), key=lambda p: (-ranks[p], p))
                    kept += others[: entries - len(kept)]
                    share = mass[h][kept].sum() / mass[h].sum()
                    assert found.shares[policy][budget][i, heads.layer, h] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n", [20, 100], ids=["fewer entries than snapkv has queries", "more"])
def test_policies_rank_as_the_reference(decoder: Decoder, samples: list[Sample], policy: str, n: int) -> None:
    for heads in heads_of(decoder, samples[0]):
        context = Context(heads.layer, heads.hidden[0, :n], heads.q[0, :, :n], heads.k[0, :, :n], CONFIG.scale)
        ranks = POLICIES[policy](context).expand(CONFIG.n_head_kv, n).numpy()
        for h in range(CONFIG.n_head_kv):
            queries = heads.q[0, h * CONFIG.group : (h + 1) * CONFIG.group, :n].transpose(0, 1).numpy()
            view = View(heads.layer, h, np.arange(n), heads.k[0, h, :n].numpy(), queries, CONFIG.scale, seed=0)
            np.testing.assert_allclose(ranks[h], RANKS[policy](view), rtol=1e-4, atol=1e-6)


def test_a_zero_key_has_a_rank() -> None:
    k = torch.ones(1, 5, 4)
    k[0, 2] = 0
    ranks = POLICIES["keydiff"](Context(0, torch.zeros(5, 4), torch.ones(1, 5, 4), k, 1.0))
    assert ranks[0, 2] == 0 and torch.allclose(ranks[0, [0, 1, 3, 4]], torch.tensor(-1.0))


def test_nothing_keeps_more_than_the_oracle_or_less_than_what_is_protected(found: Recall) -> None:
    assert list(found.shares) == [INDEXER, *POLICIES, ORACLE] and found.budgets == BUDGETS
    for policy, shares in found.shares.items():
        for budget, share in shares.items():
            assert share.shape == (2, CONFIG.n_layer, CONFIG.n_head_kv) and (share <= 1).all()
            assert (share <= found.shares[ORACLE][budget] + 1e-6).all(), policy
            assert (share >= found.protected[budget] - 1e-6).all(), policy
    assert found.relative(ORACLE) == 1 and found.relative(INDEXER) < 1


def test_a_budget_of_everything_keeps_everything(decoder: Decoder, modules: Any, samples: list[Sample]) -> None:
    found = measure(decoder, modules, samples, (1.0,), SINKS, WINDOW)
    for shares in found.shares.values():
        np.testing.assert_allclose(shares[1.0], 1, atol=1e-6)
    assert held_out_recall(decoder, modules, samples, (1.0,), SINKS, WINDOW) == pytest.approx(1, abs=1e-6)


def test_protected_entries_stay_whatever_their_rank() -> None:
    scores = torch.arange(20.0).repeat(3, 1)
    scores[:, 10:] = -torch.inf
    for budget in (6, 12, 20):
        kept = kept_mask(scores, budget, sinks=2, window=3)
        assert kept[:, :2].all() and kept[:, -3:].all() and (kept.sum(-1) == budget).all()


def test_an_indexer_that_knows_the_mass_is_perfect_and_what_it_cannot_rank_leaves_first(
    decoder: Decoder, samples: list[Sample]
) -> None:
    masses = [torch.tensor(dense_mass(heads, 120)[:, :120]) for heads in heads_of(decoder, samples[0])]

    class Ranks(torch.nn.Module):
        def __init__(self, ranks: Any) -> None:
            super().__init__()
            self._ranks = ranks

        def ranks(self, hidden: Any, positions: Any, newest: int) -> Any:
            assert len(hidden) == len(positions) == newest + 1 == 120
            return self._ranks

    best_half = [m.masked_fill(m < m.median(-1, keepdim=True).values, torch.nan) for m in masses]
    nothing = [m * torch.nan for m in masses]
    scores = [
        held_out_recall(decoder, torch.nn.ModuleList(map(Ranks, ranks)), samples[:1], (0.25, 0.1), SINKS, WINDOW)
        for ranks in (masses, best_half, nothing)
    ]
    assert scores[:2] == pytest.approx([1, 1], abs=1e-5) and 0 < scores[2] < 0.9


def test_held_out_recall_is_the_relative_recall_of_the_report(
    decoder: Decoder, modules: Any, samples: list[Sample], found: Recall
) -> None:
    assert held_out_recall(decoder, modules, samples, BUDGETS, SINKS, WINDOW) == found.relative(INDEXER)
    assert all(parameter.grad is None for parameter in modules.parameters())


def test_where_nothing_attends_to_the_context_nothing_is_lost() -> None:
    assert kept_share(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bool)).tolist() == [1, 1]


def test_questions_and_text_are_told_apart(found: Recall) -> None:
    assert [sample.question for sample in found.samples] == [True, False]
    each = [found.mean(INDEXER, 0.5, question) for question in (True, False)]
    assert each == pytest.approx(found.shares[INDEXER][0.5].mean((1, 2)))
    assert found.mean(INDEXER, 0.5) == pytest.approx(np.mean(each))


def test_what_cannot_be_measured_is_refused_before_it_is_computed(decoder: Decoder, samples: list[Sample]) -> None:
    with pytest.raises(IndexMemError, match="there are none"):
        measure(decoder, torch.nn.ModuleList(), [])
    with pytest.raises(BudgetError, match="0.1 of a context of 120 tokens is 12: beside 10 sinks and a window of 3"):
        measure(decoder, torch.nn.ModuleList(), samples, BUDGETS, 10, WINDOW)
    asked_at_once = Sample(samples[0].tokens, samples[0].weight, 0, "lookup")
    with pytest.raises(BudgetError, match="a context of 0 tokens"):
        measure(decoder, torch.nn.ModuleList(), [asked_at_once])


def test_the_report_is_complete_with_and_without_matplotlib(
    decoder: Decoder, modules: Any, samples: list[Sample], found: Recall, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("matplotlib")
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int, what: str) -> None:
        steps.append((done, total))

    recall_report.report(decoder, modules, samples, tmp_path / "new", BUDGETS, SINKS, WINDOW, progress)
    assert steps == [(i + 1, 6) for i in range(6)]
    data = json.loads((tmp_path / "new" / "recall.json").read_text())
    assert data["shares"][ORACLE]["mean"] == pytest.approx([found.mean(ORACLE, b) for b in BUDGETS], abs=1e-5)
    assert np.shape(data["shares"][INDEXER]["by_head"]) == (3, CONFIG.n_layer, CONFIG.n_head_kv)
    assert data["samples"][0] == {"source": "lookup", "n_tokens": 150, "n_context": 120, "question": True}
    assert (tmp_path / "new" / "recall.png").read_bytes().startswith(b"\x89PNG")

    original = builtins.__import__

    def refuse(name: str, *more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert not recall_report.draw(tmp_path / "recall.png", found) and not (tmp_path / "recall.png").exists()
    assert "no recall.png: it takes matplotlib" in capsys.readouterr().err


def test_the_tables_have_a_row_per_layer_and_bold_where_the_indexer_is_best(found: Recall) -> None:
    best = replace(found, shares={**found.shares, INDEXER: found.shares[ORACLE]})
    for recall, bold in ((found, False), (best, True)):
        console = Console(width=80, record=True, force_terminal=True, highlight=False, file=io.StringIO())
        recall_report.show(recall, console)
        text = console.export_text(styles=True, clear=False)
        assert (f"\x1b[1m{recall.mean(INDEXER, 0.1):.3f}" in text) == bold
        lines = console.export_text().splitlines()
        assert all(sum(line.startswith(f" {il} ") for line in lines) == len(BUDGETS) for il in range(CONFIG.n_layer))
        assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_sidecar_gives_the_modules_back(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    modules = modules_of(kind, options)
    write(tmp_path / "a.gguf", kind, modules[0].constants, modules)
    again = modules_from_sidecar(tmp_path / "a.gguf", CONFIG)
    hidden, positions = torch.randn(7, CONFIG.n_embd), torch.arange(7)
    for one, other in zip(modules, again, strict=True):
        assert other.constants.items() >= {"mid_dim": options["mid_dim"]}.items()
        assert torch.equal(one.ranks(hidden, positions, 6), other.ranks(hidden, positions, 6))


def write(path: Path, kind: str, constants: dict[str, Any], modules: Any, **more: Any) -> None:
    layers = [{name: p.detach().numpy().copy() for name, p in module.state_dict().items()} for module in modules]
    for layer in layers:
        layer.pop("gate_scale", None)  # a constant there, and only training reads it
    geometry = Geometry(CONFIG.n_layer, CONFIG.n_embd, CONFIG.n_head_kv)
    provenance = Provenance("indexmem-edge", ("a",), ("0" * 64,))
    write_sidecar(path, Checkpoint(geometry, kind, constants, layers, provenance, **more), "f32")


def test_a_sidecar_of_another_model_or_kind_is_refused(tmp_path: Path) -> None:
    modules = modules_of("kvzap")
    write(tmp_path / "a.gguf", "kvzap", modules[0].constants, modules)
    with pytest.raises(SidecarError, match="another model: layers, hidden size and KV heads are 3, 32, 2"):
        modules_from_sidecar(tmp_path / "a.gguf", replace(CONFIG, n_head_kv=3))
    memory = {"slot_count": 4, "enabled": [True] * 3, "gate": [1.0] * 3}
    empty = [torch.nn.Module() for _ in range(CONFIG.n_layer)]
    write(tmp_path / "b.gguf", "none", {}, empty, memory="centroid", memory_constants=memory)
    with pytest.raises(SidecarError, match="holds no indexer: expected one of kind retention, kvzap"):
        modules_from_sidecar(tmp_path / "b.gguf")
