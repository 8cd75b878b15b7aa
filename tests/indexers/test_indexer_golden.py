"""The retention indexer against vectors computed by the PyTorch code of the method's authors.

First the NumPy and PyTorch references, then the native code with a sidecar and a model that shows it the same hidden
states. The vectors are in golden/indexer.safetensors.

Constants there are none of the defaults (age scale 96, slope 1e-3). 380 tokens, of which 300 are the context; 2 layers,
3 KV heads; 4 sinks and a window of 16. Names and shapes: see the comments where they are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from indexmem_edge.native import api
from reference.decoder import rms_norm
from reference.indexers import Indexer, intercept, layer_norm, retention_trunk, write_sidecar
from support.golden import FOLDER, GOLDEN, N_CONTEXT, SINKS, WINDOW, N
from support.native_context import F32, Capture, Context, open_model
from tiny.models import TinyConfig, write_model

LAYERS, HEADS = range(2), range(3)
CHECKPOINTS = {  # trunk, mid_dim, decay
    "mlp": ("mlp", 32, True),
    "linear": ("linear", 0, True),
    "nodecay": ("mlp", 32, False),
    "bf16": ("mlp", 32, True),
}
each_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)


HIDDEN = GOLDEN["hidden"][:, 0]  # [2, 380, 64], the scorer's input


def golden_indexer(name: str) -> Indexer:
    """The indexer of one checkpoint, from the tensors `<name>.checkpoint.<layer>.<param>`."""
    trunk, mid_dim, decay = CHECKPOINTS[name]
    constants = {
        "trunk": trunk, "mid_dim": mid_dim, "decay": decay,
        "norm_eps": 1e-5, "pos_slope": 1e-3, "age_scale": 96.0, "gate_scale": [],
    }  # fmt: skip
    layers: list[dict[str, np.ndarray]] = []
    for il in LAYERS:
        prefix = f"{name}.checkpoint.{il}."
        layer = {key[len(prefix) :]: a for key, a in GOLDEN.items() if key.startswith(prefix)}
        constants["gate_scale"].append(float(layer.pop("gate_scale")[0]))
        layers.append(layer)
    return Indexer("retention", 64, 3, constants, layers)


# ---------------------------------------------------------------------------------------------- the references


def check_scores(name: str, il: int, state: np.ndarray, tolerance: float) -> None:
    """state [380, 3, 1 or 2]. Rates are multiplied by ages in units of the age scale, and so are their errors."""
    constants = golden_indexer(name).constants
    slope, age = constants["pos_slope"], constants["age_scale"]
    positions = np.arange(N)
    magnitude = state[..., 0].T  # [3, 380]
    decay = state[..., 1].T if constants["decay"] else np.zeros((3, N))
    score = magnitude + slope * positions
    old = max(1, N / age)
    np.testing.assert_allclose(score, GOLDEN[f"{name}.score"][il], rtol=0, atol=tolerance)
    np.testing.assert_allclose(decay, GOLDEN[f"{name}.log_retention_rate"][il], rtol=0, atol=tolerance)
    folded = intercept(magnitude, decay, positions, constants)
    np.testing.assert_allclose(folded, GOLDEN[f"{name}.score_intercept"][il], rtol=0, atol=old * tolerance)
    if f"{name}.score_at" in GOLDEN:
        for i, expected in zip(GOLDEN["query_positions"], GOLDEN[f"{name}.score_at"][il]):
            seen = score + decay * np.maximum(i - positions, 0) / age
            np.testing.assert_allclose(seen, expected, rtol=0, atol=tolerance)


def tolerance_of(name: str) -> float:
    """The authors compute with a bf16 checkpoint in bf16; everything here widens the weights first."""
    return 3e-2 if name == "bf16" else 1e-4


@each_checkpoint
def test_numpy_reference(name: str) -> None:
    indexer, tolerance = golden_indexer(name), tolerance_of(name)
    for il in LAYERS:
        check_scores(name, il, indexer.state(il, HIDDEN[il]), tolerance)
        w, first = indexer.layers[il], HIDDEN[il, :6].astype(np.float64)
        normed = layer_norm(first, w["in_norm.weight"], w["in_norm.bias"], indexer.constants["norm_eps"])
        np.testing.assert_allclose(normed, GOLDEN[f"{name}.in_norm_first6"][il], rtol=0, atol=tolerance)
        trunk = retention_trunk(indexer, w, first)
        np.testing.assert_allclose(trunk, GOLDEN[f"{name}.trunk_first6"][il], rtol=0, atol=tolerance)


@each_checkpoint
def test_pytorch_reference(name: str) -> None:
    torch = pytest.importorskip("torch")
    from reference.indexers_torch import module

    for il in LAYERS:
        made, hidden = module(golden_indexer(name), il), torch.from_numpy(HIDDEN[il])
        check_scores(name, il, made(hidden).numpy(), tolerance_of(name))
        if name == "bf16":  # computed as the authors do, it agrees but for their rounding of the intercept
            state = made.to(torch.bfloat16)(hidden).numpy()
            score = state[..., 0].T + 1e-3 * np.arange(N)
            np.testing.assert_allclose(score, GOLDEN["bf16.score"][il], rtol=0, atol=1e-5)
            np.testing.assert_allclose(state[..., 1].T, GOLDEN["bf16.log_retention_rate"][il], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the rule of eviction


class Stream:
    """The cache of one head: after every token the lowest-ranked candidate beyond the budget leaves."""

    def __init__(self, score: np.ndarray, decay: np.ndarray, budget: int) -> None:
        """score [380] at age 0, decay [380]"""
        self.score, self.decay, self.budget = score.astype(np.float64), decay.astype(np.float64), budget
        self.held: list[int] = []

    def feed(self, first: int, last: int) -> list[int]:
        """One ubatch, positions first..last; returns those that leave, worst first."""
        self.held += range(first, last + 1)
        candidates = [p for p in self.held if SINKS <= p <= last - WINDOW]
        rank = {p: self.score[p] + self.decay[p] * (last - p) / 96 for p in candidates}
        gone = sorted(candidates, key=lambda p: (rank[p], -p))[: max(len(self.held) - self.budget, 0)]
        self.held = [p for p in self.held if p not in gone]
        return gone


# name: scores and rates, budgets
CASES = {
    "uniform_decay": ("mlp", "uniform"),
    "ragged_decay": ("mlp", "ragged"),
    "uniform_nodecay": ("nodecay", "uniform"),
    "ragged_ties": ("ties", "ragged"),
}
STREAM_MARKS = [int(n) for n in GOLDEN["marks_stream"]]  # tokens seen at each entry of stream_retained
DECODE_MARKS = [int(n) for n in GOLDEN["marks_decode"]]  # and of retained


def budgets_of(case: str) -> np.ndarray:
    """[2, 3]"""
    return GOLDEN[f"budgets_{CASES[case][1]}"]


def expected_positions(case: str, key: str, mark: int, il: int, h: int) -> list[int]:
    """key: retained or stream_retained, of uint8 [marks, 2, 3, 380]"""
    return np.flatnonzero(GOLDEN[f"{case}.{key}"][mark, il, h]).tolist()


def expected_evicted(case: str, key: str, step: int, il: int, h: int) -> list[int]:
    """key: evicted_position or stream_evicted_position, of int32 [2, 3, steps], -1 where nothing leaves"""
    position = int(GOLDEN[f"{case}.{key}"][il, h, step])
    return [] if position < 0 else [position]


@pytest.mark.parametrize("il", LAYERS)
@pytest.mark.parametrize("h", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_rule_token_by_token(case: str, il: int, h: int) -> None:
    scores = CASES[case][0]
    score = GOLDEN[f"{scores}.score"][il, h]
    decay = np.zeros(N) if scores == "ties" else GOLDEN[f"{scores}.log_retention_rate"][il, h]
    stream = Stream(score, decay, int(budgets_of(case)[il, h]))
    stream.feed(0, SINKS - 1)
    for t in range(SINKS, N + 1):
        if t in STREAM_MARKS:
            assert stream.held == expected_positions(case, "stream_retained", STREAM_MARKS.index(t), il, h)
        if t < N:
            assert stream.feed(t, t) == expected_evicted(case, "stream_evicted_position", t - SINKS, il, h)


@pytest.mark.parametrize("il", LAYERS)
@pytest.mark.parametrize("h", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_rule_after_a_long_ubatch(case: str, il: int, h: int) -> None:
    """A ubatch that overflows ranks everything at its last token, which is the authors' commit."""
    scores = CASES[case][0]
    score = GOLDEN[f"{scores}.score"][il, h]
    decay = np.zeros(N) if scores == "ties" else GOLDEN[f"{scores}.log_retention_rate"][il, h]
    stream = Stream(score, decay, int(budgets_of(case)[il, h]))
    stream.feed(0, N_CONTEXT - 1)
    for t in range(N_CONTEXT, N + 1):
        if t in DECODE_MARKS:
            assert stream.held == expected_positions(case, "retained", DECODE_MARKS.index(t), il, h)
        if t < N:
            assert stream.feed(t, t) == expected_evicted(case, "evicted_position", t - N_CONTEXT, il, h)


def test_order_of_equal_scores() -> None:
    """Of equal scores, -0.0 and 0.0 among them, the later position leaves first."""
    score, position = GOLDEN["rank.score"], GOLDEN["rank.position"]
    order = sorted(range(len(score)), key=lambda i: (score[i], -position[i]))
    assert order == GOLDEN["rank.order"].tolist()


# ---------------------------------------------------------------------------------------------- the native code


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, TinyConfig]]:
    """For each golden layer a model that shows its hidden states to the attention of both its layers.

    Token t is embedded as the hidden state of position t, no layer adds anything to it, and all there is in between is
    an RMSNorm. Its scale is undone by the indexer's LayerNorm, up to the eps of both.
    """
    folder = tmp_path_factory.mktemp("golden")
    made = []
    for il in LAYERS:
        path = folder / f"layer{il}.gguf"
        config = write_model(path, "llama", n_head=9, n_head_kv=3, head_dim=16, n_embd=64, n_vocab=384)
        config.weights["token_embd.weight"][:N] = HIDDEN[il]
        for tensor in gguf.GGUFReader(path, "r+").tensors:
            a = config.weights[tensor.name]
            if tensor.name.endswith(("attn_output.weight", "ffn_down.weight")):
                a[:] = 0
            elif tensor.name.endswith("attn_norm.weight"):
                a[:] = 1
            tensor.data[:] = a.reshape(tensor.data.shape)
        made.append((path, config))
    return made


@pytest.fixture(scope="module")
def sidecars(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sidecars")
    for name in CHECKPOINTS:
        write_sidecar(folder / f"{name}.gguf", golden_indexer(name))
    return {name: folder / f"{name}.gguf" for name in CHECKPOINTS}


def bounded(model: Any, sidecar: Path, budget: int, **options: Any) -> Context:
    """Rounding to the cache type would do no harm here, but nothing is gained from it either."""
    return Context(
        model, budget=budget, policy="indexer", sidecar=sidecar, sinks=SINKS, window=WINDOW, evict_step=1,
        n_ubatch=512, type_k=F32, type_v=F32, **options,
    )  # fmt: skip


def native_states(model_path: Path, sidecar: Path) -> Capture:
    """One ubatch of all tokens, in which nothing leaves."""
    capture = Capture("attn_norm-", "indexmem_state-")
    with open_model(model_path) as model, bounded(model, sidecar, budget=400, capture=capture) as c:
        c.decode(range(N))
    return capture


@each_checkpoint
def test_native_scores(models: list[tuple[Path, TinyConfig]], sidecars: dict[str, Path], name: str) -> None:
    for il, (path, config) in enumerate(models):
        capture = native_states(path, sidecars[name])
        hidden = rms_norm(HIDDEN[il].astype(np.float64), np.ones(64), config.eps)
        state = capture[f"indexmem_state-{il}"]
        np.testing.assert_allclose(capture[f"attn_norm-{il}"], hidden, rtol=0, atol=1e-5)
        np.testing.assert_allclose(state, golden_indexer(name).state(il, hidden), rtol=0, atol=1e-4)
        check_scores(name, il, state, tolerance_of(name))


@pytest.mark.parametrize("name,file", [*((name, name) for name in CHECKPOINTS), ("mlp", "legacy")])
def test_native_scores_of_a_converted_checkpoint(
    models: list[tuple[Path, TinyConfig]], sidecars: dict[str, Path], tmp_path: Path, name: str, file: str
) -> None:
    """The authors' own file, converted, gives the same bits."""
    pytest.importorskip("torch")
    convert = pytest.importorskip("indexmem_edge.convert")
    source = FOLDER / ("indexmem_tiny.pt" if file == "mlp" else f"indexmem_tiny_{file}.pt")
    options = convert.ReadOptions(base=convert.read_base_model(models[0][0]))
    convert.write_sidecar(tmp_path / "a.gguf", convert.read_source([source], options), outtype="f32")
    converted, own = (native_states(models[0][0], path) for path in (tmp_path / "a.gguf", sidecars[name]))
    for il in LAYERS:
        np.testing.assert_array_equal(converted[f"indexmem_state-{il}"], own[f"indexmem_state-{il}"])


NATIVE = [case for case in CASES if CASES[case][0] in CHECKPOINTS]


# All heads have one budget in the native code: one run for each budget of a layer, looking at its heads only.
each_budget = pytest.mark.parametrize(
    "case,il,budget",
    [(case, il, n) for case in NATIVE for il in LAYERS for n in sorted(set(budgets_of(case)[il].tolist()))],
)


class Watch:
    """The positions held by the heads of one layer that have the run's budget in the golden case."""

    def __init__(self, c: Context, case: str, il: int, budget: int) -> None:
        self.c, self.il = c, il
        self.heads = [h for h in HEADS if budgets_of(case)[il, h] == budget]
        self.held: dict[int, list[int]] = {h: [] for h in self.heads}

    def decode(self, first: int, last: int) -> dict[int, list[int]]:
        """Feeds positions first..last; what every head evicted."""
        self.c.decode(range(first, last + 1))
        gone = {}
        for h in self.heads:
            held = api.positions(self.c.ctx, self.il, h).tolist()
            gone[h] = sorted({*self.held[h], *range(first, last + 1)} - set(held))
            self.held[h] = held
        return gone


@each_budget
def test_native_token_by_token(models: list, sidecars: dict[str, Path], case: str, il: int, budget: int) -> None:
    with open_model(models[il][0]) as model, bounded(model, sidecars[CASES[case][0]], budget) as c:
        watch = Watch(c, case, il, budget)
        watch.decode(0, SINKS - 1)
        for t in range(SINKS, N + 1):
            for h in watch.heads if t in STREAM_MARKS else ():
                assert watch.held[h] == expected_positions(case, "stream_retained", STREAM_MARKS.index(t), il, h)
            if t < N:
                for h, gone in watch.decode(t, t).items():
                    assert gone == expected_evicted(case, "stream_evicted_position", t - SINKS, il, h)


@each_budget
def test_native_after_a_long_ubatch(models: list, sidecars: dict[str, Path], case: str, il: int, budget: int) -> None:
    with open_model(models[il][0]) as model, bounded(model, sidecars[CASES[case][0]], budget) as c:
        watch = Watch(c, case, il, budget)
        watch.decode(0, N_CONTEXT - 1)
        for t in range(N_CONTEXT, N + 1):
            for h in watch.heads if t in DECODE_MARKS else ():
                assert watch.held[h] == expected_positions(case, "retained", DECODE_MARKS.index(t), il, h)
            if t < N:
                for h, gone in watch.decode(t, t).items():
                    assert gone == expected_evicted(case, "evicted_position", t - N_CONTEXT, il, h)
