"""Training of models in which a budget bounds some layers only: the others have a window and are computed as they are."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from support.training import small_options

torch = pytest.importorskip("torch")

from rich.console import Console
from torch import Tensor

from indexmem_edge.convert import read_base_model, read_sidecar, write_sidecar
from indexmem_edge.errors import SidecarError, TrainingError
from indexmem_edge.native import find
from indexmem_edge.train.cache.eviction import Block, Schedule, attend_block
from indexmem_edge.train.cache.future import kept_mask
from indexmem_edge.train.export import to_checkpoint
from indexmem_edge.train.from_sidecar import modules_from_sidecar
from indexmem_edge.train.indexers.pairwise import Pairwise
from indexmem_edge.train.indexers.residual import Residual
from indexmem_edge.train.indexers.scorers import Retention
from indexmem_edge.train.judge import recall_report
from indexmem_edge.train.judge.recall import measure
from indexmem_edge.train.model.attention import Heads
from indexmem_edge.train.model.gguf_weights import load_gguf
from indexmem_edge.train.model.rope import Rope
from indexmem_edge.train.objectives.gated import Pins, gated_dense
from indexmem_edge.train.objectives.gated_kl import GatedKL
from indexmem_edge.train.objectives.operands import operands
from indexmem_edge.train.objectives.pooled_kl import PooledKL
from indexmem_edge.train.objectives.regress import Regress
from indexmem_edge.train.objectives.residual_mse import ResidualMSE
from indexmem_edge.train.objectives.select_kl import SelectKL
from indexmem_edge.train.objectives.told_apart import SHARE
from indexmem_edge.train.parts import build_parts
from indexmem_edge.train.run import train
from reference.random_decoder import modules_of, random_decoder, random_sample

WINDOW, BOUNDED = 7, (1, 4)
SPECIAL: dict[str, Any] = {  # everything that sets such a model apart
    "window": WINDOW, "windowed": (0, 2, 3), "window_rope": Rope(100.0, 8, interleaved=True), "attention_scale": 0.5,
    "embedding_scale": 1.5, "residual_scale": 0.7, "logit_scale": 0.5, "logit_softcap": 4.0,
}  # fmt: skip
DECODER = random_decoder(5, sharpness=1.5, **SPECIAL)


def dense(heads: Heads, hidden: Tensor | None = None) -> Tensor:
    """Attention with a mask of T x T; `hidden` [Hq, T, T] hides more."""
    total = heads.q.shape[2]
    i, j = torch.arange(total)[:, None], torch.arange(total)
    mask = (j > i) | ((j <= i - heads.window) if heads.window else torch.zeros((), dtype=torch.bool))
    mask = mask if hidden is None else mask | hidden
    k, v = (t.repeat_interleave(2, 1) for t in (heads.k, heads.v))
    return (heads.scale * heads.q @ k.mT).masked_fill(mask, -torch.inf).softmax(-1) @ v


def log_probabilities(attend: Any, sample: Any) -> Tensor:
    """[T, V], the cap written out."""
    h = DECODER(torch.from_numpy(sample.tokens).long()[None], attend)[0]
    logits = h @ DECODER.weights["token_embd.weight"].T
    return (4.0 * torch.tanh(logits / 4.0)).log_softmax(-1)


def test_operands_are_those_of_bounded_layers() -> None:
    found = list(operands(DECODER, random_sample(40)))
    assert [heads.layer for heads, _ in found] == list(BOUNDED) and not any(heads.window for heads, _ in found)
    for heads, attended in found:
        torch.testing.assert_close(attended, dense(heads), atol=1e-5, rtol=1e-4)


def test_gated_kl_leaves_window_layers_as_they_are() -> None:
    sample, modules = random_sample(50), modules_of(Retention, DECODER, decay=True)
    objective = GatedKL(DECODER, modules, 2, 8)
    loss = objective.loss(sample, np.random.default_rng(0))
    loss.backward()
    grads = [p.grad.clone() for p in modules.parameters()]
    modules.zero_grad()

    def attend(heads: Heads) -> Tensor:
        if heads.window:
            return dense(heads)
        module = modules[BOUNDED.index(heads.layer)]
        e, rate = module.intercept(heads.hidden[0], torch.arange(50))
        pins = Pins(2, 8, objective.mass)
        return gated_dense(heads.q[0], heads.k[0], heads.v[0], e, rate, module.gate_scale, 0.5, 16384.0, pins)[None]

    with torch.no_grad():
        teacher = log_probabilities(dense, sample)[10:]
    student = log_probabilities(attend, sample)[10:]
    plain = (student.exp() * (student - teacher)).sum(-1).mean()
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-4)
    plain.backward()
    for found, parameter in zip(grads, modules.parameters()):
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("n", [5, 48])
def test_select_kl_evicts_in_bounded_layers_alone(n: int) -> None:
    """Rows behind the context go on in the windows of the others, also where these reach back into it."""
    sample, modules, ratio = random_sample(60), modules_of(Retention, DECODER), 0.4
    sample = replace(sample, asked=n)
    objective = SelectKL(DECODER, modules, 1, 2)
    found = objective.loss(sample, (ratio,))

    def attend(heads: Heads) -> Tensor:
        if heads.window:
            return dense(heads)
        ranks = modules[BOUNDED.index(heads.layer)].ranks(heads.hidden[0, :n], torch.arange(n), n - 1)
        kept = kept_mask(ranks, max(int(np.ceil(ratio * n)), 4), 1, 2)
        gone = torch.cat((~kept, torch.zeros(2, 60 - n, dtype=torch.bool)), -1).repeat_interleave(2, 0)
        return dense(heads, (torch.arange(60)[:, None] >= n) & gone[:, None])

    teacher, student = (log_probabilities(a, sample)[n:] for a in (dense, attend))
    both = ((student.exp() - teacher.exp()) * (student - teacher)).sum(-1) / 2
    torch.testing.assert_close(found, 0.25 * (both.mean() / 0.25).log1p(), atol=1e-5, rtol=1e-4)
    assert found > 1e-3


def test_regression_reads_bounded_layers(tmp_path: Path) -> None:
    modules = modules_of(Retention, DECODER)
    objective = Regress(DECODER, modules, 2, 4)
    sample = random_sample(40)
    objective.prepare([sample], tmp_path, lambda *_: None)
    found = objective._observe(sample, 0)
    assert found["target"].shape[0] == found["hidden"].shape[0] == 2
    where = found["positions"]
    for i, (heads, _) in enumerate(operands(DECODER, sample)):
        q = heads.q[0].unflatten(0, (2, 2))
        p = (0.5 * q @ heads.k[0, :, None].mT).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        rows, keys = torch.arange(40)[:, None], torch.arange(40)
        best = p.masked_fill(keys > rows - 4, 0).amax((1, 2))[:, where].clamp_min(1e-6).log()
        torch.testing.assert_close(found["target"][i].float(), best, atol=5e-3, rtol=1e-3)
    assert objective.backward([sample], 0, 0)["loss"] > 0
    assert all(p.grad is not None for name, p in modules.named_parameters() if "gate_scale" not in name)


def test_other_objectives_and_their_figures() -> None:
    sample = random_sample(40)
    pairwise = torch.nn.ModuleList([Pairwise(32, 2, Pairwise.defaults()) for _ in BOUNDED])
    assert PooledKL(DECODER, pairwise, 1, 2).backward([sample], 0, 0)["loss"] > 0
    memories = torch.nn.ModuleList([Residual(Residual.defaults(8)) for _ in BOUNDED])
    objective = ResidualMSE(
        DECODER, memories, 1, 2, scorers=modules_of(Retention, DECODER), schedule=Schedule(0.25, block=8)
    )
    figures = objective.backward([sample], 0, 0)
    assert {name for name in figures if name.startswith("change.")} == {"change.1", "change.4"}
    assert len(objective.measure([sample])) == 2


def test_blocks_attend_with_the_scale_of_the_model() -> None:
    heads, full = next(iter(operands(DECODER, random_sample(24))))
    held = torch.arange(8).expand(2, -1)
    block = Block(8, 24, held, held[:, :0])
    found = attend_block(heads.q[0], heads.k[0], heads.v[0], block, heads.scale)
    torch.testing.assert_close(found, full[0, :, 8:], atol=1e-5, rtol=1e-4)


def test_recall_is_that_of_bounded_layers() -> None:
    found = measure(DECODER, modules_of(Retention, DECODER), [random_sample(120)], (0.5,), 2, 8)
    assert found.layers == BOUNDED and found.shares["indexer"][0.5].shape == (1, 2, 2)
    data = found.to_dict()
    assert data["layers"] == [1, 4] and np.shape(data["shares"]["oracle"]["by_head"]) == (1, 2, 2)
    shown = io.StringIO()
    recall_report.show(found, Console(file=shown, width=120))
    rows = [line.split()[0] for line in shown.getvalue().splitlines() if line.strip()]
    assert [row for row in rows if row.isdigit()][:2] == ["1", "4"] and "0" not in rows


def test_nothing_is_trained_where_every_layer_has_a_window(tmp_path: Path) -> None:
    config = replace(DECODER.config, windowed=tuple(range(5)))
    with pytest.raises(TrainingError, match="no budget bounds a layer of this model"):
        build_parts(config, small_options(tmp_path / "m.gguf", tmp_path), torch.device("cpu"))


GEMMA = {"n_layer": 6, "full_layers": (2, 5)}


@pytest.mark.parametrize(("kind", "memory"), [("retention", "off"), ("kvzap", "centroid"), ("retention", "residual")])
def test_modules_go_into_a_sidecar_and_come_back(tiny: Tiny, tmp_path: Path, kind: str, memory: str) -> None:
    path, _ = tiny("gemma3", **GEMMA)
    config, base = load_gguf(path).config, read_base_model(path)
    options = small_options(path, tmp_path, kind=kind, memory=memory, objective=("regress",))
    parts = build_parts(config, options, torch.device("cpu"))
    assert len(parts.indexer) == 2 and (parts.memory is None or len(parts.memory) == 2)
    for i, module in enumerate(parts.indexer):
        module.gate_scale = torch.nn.Parameter(torch.tensor([0.5 + i]))
    how: dict[str, Any] = {"texts": ["t"], "step": 1, "source": path}
    c = to_checkpoint(parts, base, options, bounded=config.bounded, enabled=[True, False], **how)
    write_sidecar(tmp_path / "s.gguf", c, "f32")
    read = read_sidecar(tmp_path / "s.gguf").checkpoint
    assert read.only == (2, 5) and read.geometry.block_count == 6 and [bool(layer) for layer in read.layers] == [
        False, False, True, False, False, True,
    ]  # fmt: skip
    if kind == "retention":
        assert [read.constants["gate_scale"][il] for il in (2, 5)] == [0.5, 1.5]
    if memory != "off":
        assert read.memory_constants["enabled"] == [False, False, True, False, False, False]
    hidden, positions = torch.randn(7, config.n_embd), torch.arange(7)
    for one, other in zip(parts.indexer, modules_from_sidecar(tmp_path / "s.gguf", config), strict=True):
        assert torch.equal(one.ranks(hidden, positions, 6), other.ranks(hidden, positions, 6))

    with pytest.raises(SidecarError, match="is for the layers 2, 5, and a budget bounds the layers 0, 4 of this model, too"):
        modules_from_sidecar(tmp_path / "s.gguf", replace(config, windowed=(1, 3)))
    fewer = modules_from_sidecar(tmp_path / "s.gguf", replace(config, windowed=(0, 1, 2, 3, 4)))
    assert len(fewer) == 1 and torch.equal(fewer[0].gate_scale, torch.tensor([1.5 if kind == "retention" else 1.0]))


@pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
@pytest.mark.parametrize(
    "more",
    [
        {"objective": ("regress", "gated-kl", "select-kl"), "steps": (6, 2, 2)},
        {"kind": "pairwise", "memory": "residual", "steps": (3,), "lr": (1e-3, 5e-2), "lengths": (600,), "held_out": 0.3},
    ],
    ids=["three objectives", "pairwise and a memory"],
)
def test_a_whole_training(tiny: Tiny, tmp_path: Path, more: dict[str, Any]) -> None:
    """With the real objectives, from the file of a model with window layers to a sidecar for the others, and on from there."""
    path, _ = tiny("gemma3", **GEMMA)
    fields = {"lengths": (96,), "samples": (4,), "eval_samples": 1, "eval_every": 0, "generated": 0.0, "held_out": 0.2}
    options = small_options(path, tmp_path, **{**fields, **more})
    result = train(options)
    assert result is not None and result.recall is not None
    assert result.notes[0].startswith("the sidecar is for 2 of 6 layers, 2, 5")
    c = read_sidecar(options.out).checkpoint
    assert c.only == (2, 5) and c.architecture == "gemma3" and "held_out_recall" in c.scores
    run = tmp_path / "out.indexmem.train"
    assert json.loads((run / "recall.json").read_text())["layers"] == [2, 5]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == (10 if len(more["steps"]) == 3 else 6)
    if c.memory == "residual":
        assert [il for il, on in enumerate(c.memory_constants["enabled"]) if on] in ([], [2], [5], [2, 5])
        return
    shares, least = (1.0, 1.0, 3.0, 1.0, 1.0, 1.5), (0, 0, 0, 0, 0, 70)
    write_sidecar(tmp_path / "shared.gguf", replace(c, budget_share=shares, budget_least=least))
    for objective, decay, length in (("select-kl", False, 96), ("told-apart", True, 480)):  # a book has to have room for a fact
        out = tmp_path / f"{objective}.indexmem.gguf"
        again = replace(
            options, start=tmp_path / "shared.gguf", out=out, run=None, objective=(objective,), steps=(1,), decay=decay, generated=1.0,
            lengths=(length,),
        )  # fmt: skip
        assert train(again) is not None
        went_on = read_sidecar(out).checkpoint
        assert went_on.only == (2, 5) and went_on.constants["decay"] is decay
        if objective == "told-apart":  # its ranks need something else: heads that remember more than others
            assert went_on.budget_share is not None and went_on.budget_least is None
            assert len(went_on.budget_share) == 6 * c.geometry.head_count_kv and set(went_on.budget_share) <= {1.0, SHARE}
            remember = [i // c.geometry.head_count_kv for i, share in enumerate(went_on.budget_share) if share == SHARE]
            assert remember and set(remember) <= {2, 5}  # the bounded layers
        else:
            assert went_on.budget_share is not None and (went_on.budget_share[2], went_on.budget_share[5]) == (3.0, 1.5)
            assert went_on.budget_least == least
