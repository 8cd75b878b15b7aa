"""Training by the native library: what it observes of a model, in every architecture, and a training from that to a sidecar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import Tiny
from support.architectures import BOUNDED, TABLE

torch = pytest.importorskip("torch")

from safetensors import SafetensorError
from safetensors.torch import save_file

import indexmem_edge
from indexmem_edge.calibrate.capture import Tensor as Node
from indexmem_edge.cli.app import app
from indexmem_edge.convert import read_sidecar
from indexmem_edge.convert.basemodel import read_base_model
from indexmem_edge.errors import ModelNotSupported, TrainingError, TrainingStopped
from indexmem_edge.native import find
from indexmem_edge.train.cache.future import attention_blocks
from indexmem_edge.train.checkpoints import NAME as CHECKPOINT
from indexmem_edge.train.estimate import estimate
from indexmem_edge.train.model.attention import Heads
from indexmem_edge.train.model.load import load_decoder
from indexmem_edge.train.objectives import regress
from indexmem_edge.train.objectives.told_apart import looks_at
from indexmem_edge.train.observed import library
from indexmem_edge.train.observed.capture import HeadsCapture
from indexmem_edge.train.observed.library import LibraryModel, open_library_model
from indexmem_edge.train.options import TrainOptions
from indexmem_edge.train.run import TrainResult, train
from support.training import StopAfter, small_options

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

N = 75
PLAIN = ("llama", "qwen2", "qwen3", "phi3", "gemma", "granite", "smollm3", "qwen3moe", "gemma3", "qwen2vl", "qwen3vl")
KINDS = ("gemma3n-shared", "qwen35", "jamba", "falcon-h1", "gpt-oss", "gemma2", "deepseek2", "kimi-linear", "llama4")
MORE = ("minicpm3", "chatglm", "hunyuan-dense", "llama")  # with plain attention


@contextmanager
def opened(path: Path, longest: int = N) -> Iterator[LibraryModel]:
    with open_library_model(path, read_base_model(path), longest, torch.device("cpu"), 1) as model:
        yield model


def text(n: int = N, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 250, n))


def near(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Largest difference, in units of the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


# what is observed


@pytest.mark.parametrize("arch", PLAIN)
def test_operands_are_those_of_the_decoder(tiny: Tiny, arch: str) -> None:
    """Of every bounded layer, in their order: what an indexer reads, queries times scale, keys and values."""
    path, _ = tiny(arch)
    with opened(path) as model:
        decoder = load_decoder(path, torch.float32)
        seen: dict[int, Heads] = {}
        decoder.observe(text(), lambda heads: seen.__setitem__(heads.layer, heads))
        found = []

        def compare(heads: Heads) -> None:
            found.append(heads.layer)
            expected = seen[heads.layer]
            near(heads.hidden, expected.hidden, 2e-3)  # the cache is float16, and GELU a table
            near(heads.q * heads.scale, expected.q * expected.scale, 5e-3)
            near(heads.k, expected.k, 5e-3)
            near(heads.v, expected.v, 5e-3)
            assert heads.softcap == 0 and heads.sinks is None

        model.observe(text(), compare)
        c, g = decoder.config, model.geometry
        assert tuple(found) == tuple(seen) == g.bounded == c.bounded
        assert (g.n_layer, g.n_embd, g.n_head_kv, g.head_dim) == (c.n_layer, c.n_embd, c.n_head_kv, c.head_dim)


class Outputs(HeadsCapture):
    """Also keeps what attention came to, [Hq, T, D] of each layer that attends, by the layer whose entries it reads."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.outputs: dict[int, list[torch.Tensor]] = {}

    def take(self, tensor: Node) -> None:
        operands = self._operands_of(tensor)
        if operands is not None:
            said = self.read(tensor).transpose(0, 2, 1, 3).reshape(-1, tensor.ne[2], tensor.ne[0])
            self.outputs.setdefault(operands[0], []).append(torch.from_numpy(said.copy()))
        super().take(tensor)


@pytest.mark.parametrize("arch", [*BOUNDED, *MORE])
def test_attention_follows_from_what_is_observed(tiny: Tiny, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every architecture that a budget works for: queries, keys, scale, soft cap, sinks and layers that read others."""
    path, _ = tiny(arch)
    captures: list[Outputs] = []

    def make(device: torch.device) -> Outputs:
        captures.append(Outputs(device))
        return captures[-1]

    monkeypatch.setattr(library, "HeadsCapture", make)
    with opened(path) as model:
        probe = captures[0]
        probe.outputs.clear()
        seen: list[Heads] = []
        model.observe(text(), lambda heads: seen.append(replace(heads)))
        assert tuple(heads.layer for heads in sorted(seen, key=lambda h: h.layer)) == model.geometry.bounded
        several = 0
        for heads in seen:
            q, k, v = heads.q[0], heads.k[0], heads.v[0]
            assert heads.hidden.shape == (1, N, model.geometry.n_embd) and len(k) == model.geometry.n_head_kv
            p = torch.cat(
                [p for _, p in attention_blocks(q, k, heads.scale, block=N, softcap=heads.softcap, sinks=heads.sinks)], 2
            )
            ours = (p @ v[:, None]).unflatten(1, (len(probe.outputs[heads.layer]), -1))  # [H, readers, G, T, D]
            for i, said in enumerate(probe.outputs[heads.layer]):
                near(ours[:, i].flatten(0, 1), said, 5e-3)
            several += len(probe.outputs[heads.layer]) > 1
            assert heads.sinks is not None or arch != "gpt-oss"
        assert bool(several) == (arch in TABLE and "shared" in TABLE[arch].steps)


def test_texts_do_not_disturb_each_other(tiny: Tiny) -> None:
    with opened(tiny("qwen35")[0]) as model:
        first: dict[int, torch.Tensor] = {}
        model.observe(text(), lambda heads: first.__setitem__(heads.layer, heads.q))
        model.observe(text(40, seed=1), lambda heads: None)
        model.observe(text(), lambda heads: torch.testing.assert_close(heads.q, first[heads.layer], atol=0, rtol=0))
        with pytest.raises(TrainingError, match="76 tokens .* at most 75"):
            model.observe(text(N + 1), lambda heads: None)

        def fails(heads: Heads) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            model.observe(text(), fails)
        model.observe(text(), lambda heads: torch.testing.assert_close(heads.q, first[heads.layer], atol=0, rtol=0))


@pytest.mark.parametrize(("arch", "words"), [("mamba", "recurrent"), ("bloom", "ALiBi"), ("gemma3-window", "windows in all")])
def test_what_no_budget_bounds_is_refused(tiny: Tiny, tmp_path: Path, arch: str, words: str) -> None:
    with pytest.raises(ModelNotSupported, match=words):
        run(native(tiny(arch)[0], tmp_path))


@pytest.mark.parametrize("arch", [*PLAIN[:2], "gemma2", "gpt-oss", "gemma3n-shared", "deepseek2"])
def test_where_answers_look(tiny: Tiny, arch: str) -> None:
    """Shares of attention, whatever the kind of attention: of all that was read there is at most one, and what is apart adds up."""
    path, _ = tiny(arch)
    rows, n = torch.arange(60, N), 50
    some = torch.zeros(n, dtype=torch.bool)
    some[10:30] = True
    with opened(path) as model:
        found: list[tuple[torch.Tensor, ...]] = []

        def look(heads: Heads) -> None:
            g = heads.q.shape[1] // heads.k.shape[1]
            one = replace(heads, q=heads.q[:, ::g], sinks=None if heads.sinks is None else heads.sinks[::g])
            apart = looks_at(one, rows, some) + looks_at(one, rows, ~some)
            found.append((looks_at(heads, rows, some), apart, looks_at(heads, rows, some | True), looks_at(heads, rows[:0], some)))

        model.observe(text(), look)
        assert len(found) == len(model.geometry.bounded)
        for share, both, everything, nothing in found:
            assert share.shape == (model.geometry.n_head_kv,) and not nothing.any()
            assert bool((share > 0).all() and (share <= everything + 1e-6).all() and (everything < 1).all())
            assert bool((both <= everything + 1e-5).all()), "the first head of a group has no more than that with most"


# from a model and books to a sidecar


def native(model: Path, folder: Path, **more: Any) -> TrainOptions:
    folder.mkdir(exist_ok=True)
    return small_options(model, folder, **{"engine": "native", "objective": ("regress",), **more})


def run(options: TrainOptions, stop_after: Optional[int] = None) -> Optional[TrainResult]:
    torch.set_num_threads(1)
    if stop_after is None:
        return train(options)
    with pytest.raises(TrainingStopped):
        train(options, watcher=StopAfter(stop_after))
    return None


@pytest.mark.parametrize("arch", KINDS)
def test_what_was_trained_runs(tiny: Tiny, tmp_path: Path, arch: str) -> None:
    path, _ = tiny(arch)
    result = run(native(path, tmp_path, steps=(3,), eval_every=0, objective=()))  # asked-kl
    assert result is not None and result.recall is not None and 0 < result.recall <= 1
    c = read_sidecar(result.path).checkpoint
    assert result.stages[0]["objective"] == "asked-kl" and c.kind == "retention" and c.fingerprint and "held_out_recall" in c.scores
    shares = json.loads((Path(result.run) / "recall.json").read_text())["relative"]
    assert {"indexer", "oracle", "streaming", "snapkv"} <= set(shares) and shares["oracle"] == 1
    llm = indexmem_edge.Llama(
        str(path), kv_budget=40, kv_window=8, indexmem=result.path, n_ubatch=32, n_threads=1, n_threads_batch=1, verbose=False
    )
    llm.eval([3 + (7 * i) % 200 for i in range(120)])
    assert llm.kv_stats().evicted > 0 and llm.kv_stats().policy == "indexer"
    llm.close()


@pytest.mark.parametrize(("kind", "objective"), [("retention", "regress"), ("kvzap", "asked-kl"), ("retention", "told-apart")])
def test_the_engines_agree(tiny: Tiny, tmp_path: Path, kind: str, objective: str) -> None:
    """The same objective on the same text: recall before and after, within a hundredth."""
    path, _ = tiny("llama")
    found = {}
    for engine in ("torch", "native"):
        options = native(
            path, tmp_path / engine, engine=engine, kind=kind, dtype="float32", steps=(20,), eval_every=0, lengths=(160,),
            objective=(objective,),
        )
        found[engine] = run(options)
    a, b = found["torch"], found["native"]
    assert a is not None and b is not None and a.recall and b.recall and a.recall_before and b.recall_before
    assert a.recall_before == pytest.approx(b.recall_before, rel=0.01) and a.recall == pytest.approx(b.recall, rel=0.01)


def test_a_training_that_is_interrupted_ends_with_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    path, _ = tiny("jamba")
    options = {"objective": ("regress", "asked-kl"), "steps": (2, 4)}
    whole = run(native(path, tmp_path / "a", **options))
    run(native(path, tmp_path / "b", **options), stop_after=4)
    rest = run(native(path, tmp_path / "b", **options))
    assert whole is not None and rest is not None and whole.recall == rest.recall
    weights = [read_sidecar(result.path).tensors for result in (whole, rest)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (Path(rest.run) / CHECKPOINT).exists()


# the command


def command(model: Path, folder: Path, *more: Any) -> Any:
    words = [
        "train", "-m", model, "--text", folder / "books", "--out", folder / "m.indexmem.gguf", "--length", 64, "--samples", 6,
        "--batch", 2, "--steps", 4, "--eval-samples", 1, "--eval-every", 0, "--kv-window", 8, "--mid-dim", 16, "--device", "cpu",
        "--engine", "native", *more,
    ]  # fmt: skip
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    small_options(tiny("llama")[0], tmp_path)  # writes the books
    return tmp_path


def test_the_command(tiny: Tiny, folder: Path) -> None:
    """For a model that the engine torch refuses; its refusal names the other one."""
    refused = command(tiny("gemma2")[0], folder, "--engine", "torch")
    assert refused.exit_code == 1 and "soft cap" in refused.stderr and "--engine native" in refused.stderr
    result = command(tiny("gemma2")[0], folder, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["stages"][0]["objective"] == "asked-kl"
    assert read_sidecar(folder / "m.indexmem.gguf").checkpoint.architecture == "gemma2"


def test_a_pairwise_indexer_is_trained_alike_by_both(tiny: Tiny, folder: Path) -> None:
    """Each step looks at attention, and nothing is kept of it."""
    losses = []
    for engine in ("native", "torch"):
        result = command(tiny("qwen3")[0], folder, "--kind", "pairwise", "--engine", engine, "--steps", 6, "--dtype", "float32", "--force", "--restart", "--json")
        assert result.exit_code == 0, result.output
        lines = (folder / "m.indexmem.train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
        assert read_sidecar(folder / "m.indexmem.gguf").checkpoint.kind == "pairwise"
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][0] > 0
    result = command(tiny("gemma2")[0], folder, "--kind", "pairwise", "--force", "--restart")  # which the engine torch refuses
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--objective", "regress,select-kl"), ("select-kl", "--objective asked-kl", "--engine torch")),
        (("--memory", "residual"), ("residual-mse", "--engine torch")),
        (("--memory", "residual", "--objective", "regress"), ("end --objective with residual-mse",)),
        (("--memory", "residual", "--objective", "residual-mse,regress"), ("end --objective with residual-mse",)),
        (("--memory", "residual", "--objective", "residual-mse"), ("put an objective for the indexer before",)),
        (("--memory", "residual", "--engine", "torch"), ("residual-mse", "64 tokens", "--length of at least 513")),
        (("--memory", "residual", "--engine", "torch", "--length", "520", "--kv-window", "510", "--held-out", "0.3"), ("residual-mse", "--length of at least 1,025")),
        (("--kind", "pairwise", "--engine", "torch", "--objective", "gated-kl"), ("gated-kl", "retention or kvzap", "pairwise")),
        (("--kind", "pairwise", "--engine", "torch", "--objective", "select-kl"), ("select-kl", "pairwise")),
        (("--kind", "pairwise", "--objective", "told-apart"), ("told-apart", "pairwise")),
        (("--kind", "pairwise", "--objective", "pooled-kl,select-kl"), ("select-kl", "--engine torch")),
        (("--kind", "kvzap", "--decay"), ("--decay", "kvzap")),
        (("--kv-sinks", 20, "--budget", "0.1"), ("beside 20 sinks",)),
        (("--engine", "tensorflow"), ("--engine 'tensorflow'", "torch, native")),
    ],
)
def test_refusals_are_one_line(tiny: Tiny, folder: Path, more: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = command(tiny("llama")[0], folder, *more)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 1 and len(lines) == 1 and all(word in lines[0] for word in words), result.output
    assert not (folder / "m.indexmem.gguf").exists() and not list(folder.glob("*.train/prepared"))


def test_an_estimate_finds_what_teaches(tiny: Tiny, folder: Path) -> None:
    """told-apart learns from generated text alone, and the first sequence may be a page of a book."""
    result = command(tiny("llama")[0], folder, "--estimate", "--json", "--objective", "told-apart", "--length", 256, "--samples", 24, "--generated", 0.5)
    assert result.exit_code == 0, result.output
    (stage,) = json.loads(result.stdout)["stages"]
    assert stage["sequences"] == 8 and stage["disk"] > 0


@pytest.mark.parametrize("name", ["regress-00000", "held-out-00000"])
def test_a_full_disk_while_observing(tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(tensors: Any, path: Path) -> None:
        if path.name.startswith(name):
            raise SafetensorError("No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(regress, "save_file", full)
    result = command(tiny("llama")[0], folder, "--objective", "asked-kl" if "held" in name else "regress", "--eval-every", 2)
    assert result.exit_code == 1 and "No space left" in result.stderr and "--samples" in result.stderr


def test_a_damaged_file_of_what_was_observed(tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:100])

    monkeypatch.setattr(regress, "save_file", cut)
    result = command(tiny("llama")[0], folder, "--objective", "regress")
    assert result.exit_code == 1 and "cannot be read" in result.stderr and "observed again" in result.stderr


def test_an_estimate_is_measured_and_leaves_nothing(tiny: Tiny, folder: Path) -> None:
    before = sorted(path.name for path in folder.rglob("*"))
    for engine in ("native", "torch"):
        result = command(tiny("llama")[0], folder, "--estimate", "--json", "--engine", engine)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        (stage,) = found["stages"]
        assert (stage["sequences"], stage["steps"]) == (6, 4)
        assert stage["objective"] == ("asked-kl" if engine == "native" else "regress")
        assert min(stage[name] for name in ("preparing", "training", "measuring")) > 0 and found["memory"] > 1 << 20
        assert found["seconds"] >= stage["preparing"] + stage["training"] + stage["measuring"]
        shown = command(tiny("llama")[0], folder, "--estimate", "--engine", engine)
        assert shown.exit_code == 0 and "of memory" in shown.stdout and "of disk" in shown.stdout
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_what_an_estimate_says_of_the_disk_is_what_a_training_takes(tiny: Tiny, tmp_path: Path) -> None:
    options = native(tiny("llama")[0], tmp_path, eval_every=0, objective=("asked-kl",))
    said = estimate(options)
    kept = []

    class Size(StopAfter):
        def step(self, step: int, figures: Any) -> None:
            prepared = options.checked().run / "prepared"
            kept.append(sum(path.stat().st_size for path in prepared.rglob("*") if path.is_file()))
            super().step(step, figures)

    with pytest.raises(TrainingStopped):
        train(options, watcher=Size(1))
    assert said.disk == pytest.approx(kept[0], rel=0.15)  # contexts are of several lengths, and few are measured
