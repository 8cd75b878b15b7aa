"""Steps, evaluations, checkpoints: a training that is interrupted ends with the same bits, and nothing is lost silently."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Optional

import pytest

from conftest import Tiny

torch = pytest.importorskip("torch")

from indexmem_edge.convert import ConvertError, read_sidecar
from indexmem_edge.errors import ModelNotSupported, TrainingCheckpointError, TrainingError, TrainingStopped
from indexmem_edge.native import find
from indexmem_edge.train import checkpoints
from indexmem_edge.train.data.sample import Sample
from indexmem_edge.train.objectives.objective import Objective
from indexmem_edge.train.options import options_of
from indexmem_edge.train.run import train
from indexmem_edge.train.schedule import lr_multiplier
from support.training import Follow, StopAfter, recall_of, small_options, stub_tools, write_books

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
FOLLOW: dict[str, Any] = {"objective": ("follow",)}


class Other(Follow):
    """Another objective, to come after the first."""

    name = "other"


class Before(Follow):
    """One whose targets are those of the modules before its first step."""

    name = "before"
    from_before = True
    folders: ClassVar[list[Path]] = []

    def prepare(self, samples: Sequence[Sample], folder: Path, progress: Any) -> None:
        super().prepare(samples, folder, progress)
        self.folders.append(folder)
        self.noise = float(sum(p.detach().double().abs().sum() for p in self.modules.parameters()))


@pytest.fixture
def model(tiny: Tiny) -> Path:
    return tiny("llama")[0]


def weights_of(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / checkpoints.NAME)


def figures(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


# the way through


def test_a_training_and_its_sidecar(model: Path, tmp_path: Path) -> None:
    options = small_options(model, tmp_path, steps=(12,), **FOLLOW)
    result = train(options, tools=stub_tools())
    assert result is not None and result.path == str(options.out) and result.bytes == options.out.stat().st_size
    lines = figures(tmp_path / "out.indexmem.train")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3]) and all("noise" in line for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "held_out_recall" in line] == [0, 2, 4, 6, 8, 10, 12]
    assert [line["lr"] for line in lines if "loss" in line] == [pytest.approx(1e-2 * lr_multiplier(i, 12)) for i in range(12)]
    c = read_sidecar(options.out).checkpoint
    assert (c.kind, c.memory, c.architecture, c.defaults) == ("retention", "none", "llama", {"sinks": 2, "window": 8})
    assert c.fingerprint is not None and c.provenance.source_files == ("checkpoint.safetensors",)
    assert c.provenance.trained_on is not None and "book-0.txt" in c.provenance.trained_on and c.provenance.step == 12
    assert c.scores["held_out_recall"] == pytest.approx(result.recall) and not (tmp_path / "out.indexmem.train/prepared").exists()
    best = weights_of(tmp_path / "out.indexmem.train")
    stored = torch.from_numpy(c.layers[0]["magnitude_proj.weight"])
    assert torch.equal(best["weights.indexer.0.magnitude_proj.weight"], stored)


@pytest.mark.parametrize(
    "more, kind, memory",
    [
        ({"kind": "kvzap", "mid_dim": 0, "outtype": "q8_0", "fingerprint": False}, "kvzap", "none"),
        ({"mid_dim": 0, "decay": True, "memory": "centroid", "memory_slots": 8}, "retention", "centroid"),
    ],
)
def test_kinds_and_memories(model: Path, tmp_path: Path, more: dict[str, Any], kind: str, memory: str) -> None:
    result = train(small_options(model, tmp_path, steps=(1,), **FOLLOW, **more), tools=stub_tools(evaluate=None))
    c = read_sidecar(tmp_path / "out.indexmem.gguf").checkpoint
    assert (c.kind, c.memory) == (kind, memory) and result is not None and result.recall is None
    assert (c.fingerprint is None) == ("fingerprint" in more)
    if memory == "centroid":
        assert c.memory_constants == {"slot_count": 8, "enabled": [True] * 2, "gate": [1.0] * 2}
        assert "calibrate-memory" in result.notes[0]


@pytest.mark.parametrize("kind, stored", [("retention", [0.5, 2.0]), ("kvzap", None)])
def test_a_scale_that_only_training_reads(model: Path, tmp_path: Path, kind: str, stored: Any) -> None:
    """It is a constant of a layer where a kind has one, and left out where not."""
    from indexmem_edge.convert import read_base_model
    from indexmem_edge.train.export import to_checkpoint
    from indexmem_edge.train.model.gguf_weights import load_gguf
    from indexmem_edge.train.parts import build_parts

    options = small_options(model, tmp_path, kind=kind, **FOLLOW).checked()
    parts = build_parts(load_gguf(model).config, options, torch.device("cpu"))
    for module, scale in zip(parts.indexer, (0.5, 2.0)):
        module.gate_scale = torch.nn.Parameter(torch.tensor([scale]))
    c = to_checkpoint(parts, read_base_model(model), options, texts=["t"], step=1, source=model).validated()
    assert c.constants.get("gate_scale") == stored and "gate_scale" not in c.layers[0]
    parts.indexer[0].wings = parts.indexer[1].wings = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TrainingError, match="no place for 'wings'"):
        to_checkpoint(parts, read_base_model(model), options, texts=["t"], step=1, source=model)


def test_objectives_go_on_from_the_best_weights(model: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Looks(Other):
        def prepare(self, samples: Sequence[Sample], folder: Path, progress: Any) -> None:
            seen.append({k: t.clone() for k, t in self.modules.state_dict().items()})

        def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
            seen.append({k: t.clone() for k, t in self.modules.state_dict().items()})
            return super().backward(samples, step, seed)

    tools = stub_tools(
        objectives={"follow": Follow, "other": Looks}, evaluate=recall_of([0.1, 0.5, 0.2, 0.3, 0.4, 0.45, 0.3])
    )
    options = small_options(model, tmp_path, objective=("follow", "other"), steps=(6, 4), lr=(1e-2, 1e-3))
    result = train(options, tools=tools)
    assert result is not None and (result.recall_before, result.recall) == (0.1, 0.5)
    assert [(s["objective"], s["done"], s["recall"], s["best_step"]) for s in result.stages] == [
        ("follow", 6, 0.5, 2),
        ("other", 4, 0.5, 0),
    ]
    best = weights_of(tmp_path / "out.indexmem.train")
    for name, t in seen[0].items():  # the best of the first is what the second began with, and ended with
        assert torch.equal(t, seen[1][name]) and torch.equal(best[f"weights.indexer.{name}"], t)
    assert any(not torch.equal(seen[0][name], seen[-1][name]) for name in seen[0])


def test_early_stopping(model: Path, tmp_path: Path) -> None:
    options = small_options(model, tmp_path, steps=(100,), patience=2, **FOLLOW)
    result = train(options, tools=stub_tools(evaluate=recall_of([0.5, 0.6, math.nan, 0.6, 0.9])))
    assert result is not None and result.recall == 0.6
    assert (result.stages[0]["done"], result.stages[0]["best_step"]) == (6, 2)


def test_a_training_that_helps_nothing_says_so(model: Path, tmp_path: Path) -> None:
    result = train(small_options(model, tmp_path, **FOLLOW), tools=stub_tools(evaluate=recall_of([0.5, 0.4, 0.3, 0.2])))
    assert result is not None and "no step did better" in result.notes[0]


def test_weights_that_are_chosen_by_a_loss_may_have_less_recall(model: Path, tmp_path: Path) -> None:
    class ByLoss(Follow):
        def held_out_loss(self, samples: Sequence[Sample]) -> float:
            return float(sum(p.square().sum() for p in self.modules.parameters())) * -1

    tools = stub_tools(objectives={"follow": ByLoss}, evaluate=recall_of([0.5, 0.4, 0.3, 0.2]))
    result = train(small_options(model, tmp_path, objective=("follow",), steps=(6,)), tools=tools)
    assert result is not None and not any("no step did better" in note for note in result.notes)


def test_a_memory_is_trained_beside_a_frozen_indexer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import ModuleType, SimpleNamespace

    class Residual(torch.nn.Module):
        kind = "residual"

        def __init__(self, constants: dict[str, Any]) -> None:
            super().__init__()
            self.constants = constants
            self.phi_proj = torch.nn.Linear(constants["head_dim"], constants["feature_dim"], bias=False)
            self.gate_logit, self.eta_raw, self.decay_logit = (torch.nn.Parameter(torch.tensor(x)) for x in (-1.0, 0.5, 3.0))

        @staticmethod
        def defaults(head_dim: int) -> dict[str, Any]:
            return {"feature_dim": 4, "head_dim": head_dim, "eps": 1e-6}

    class Remember(Objective):
        name = "remember"
        kinds = ("residual",)

        def __init__(self, *arguments: Any, scorers: torch.nn.ModuleList) -> None:
            super().__init__(*arguments)
            self.scorers = scorers

        def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
            assert not any(p.requires_grad for p in self.scorers.parameters())
            loss = sum(p.square().sum() for p in self.modules.parameters())
            loss.backward()
            return {"loss": float(loss.detach())}

        def measure(self, samples: Sequence[Sample]) -> list[Any]:
            return [SimpleNamespace(relative=(0.1, 0.2), helps=True), SimpleNamespace(relative=(0.5, 0.4), helps=False)]

    module = ModuleType("indexmem_edge.train.indexers.residual")
    module.Residual = Residual  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tools = stub_tools(objectives={"follow": Follow, "remember": Remember})
    options = small_options(model, tmp_path, objective=("follow", "remember"), memory="residual", steps=(2,))
    result = train(options, tools=tools)
    c = read_sidecar(options.out).checkpoint
    assert (c.kind, c.memory) == ("retention", "residual") and c.memory_constants["enabled"] == [True, False]
    assert c.memory_constants["feature_dim"] == 4 and c.memory_constants["gate_logit"][0] != -1.0
    assert c.scores["attention_error.with_memory"] == pytest.approx(0.25) and result is not None
    assert c.scores["attention_error.without_memory"] == pytest.approx(0.3) and "off in layer 1" in result.notes[0]
    with pytest.raises(TrainingError, match="remember trains a memory: add --memory residual"):
        train(replace(options, memory="off", run=tmp_path / "r"), tools=tools, force=True)


# going on


@pytest.mark.parametrize("n", [1, 7, 8])
def test_targets_from_before_are_found_again(model: Path, tmp_path: Path, n: int) -> None:
    """Without what was prepared, as on another number of processes: the weights of the checkpoint are trained ones."""
    tools = stub_tools(objectives={"follow": Follow, "before": Before})
    write_books(tmp_path / "books")
    more: dict[str, Any] = {"objective": ("follow", "before"), "steps": (6, 4)}
    train(small_options(model, tmp_path, out=tmp_path / "a.gguf", **more), tools=tools)
    options = small_options(model, tmp_path, out=tmp_path / "b.gguf", **more)
    with pytest.raises(TrainingStopped):
        train(options, tools=tools, watcher=StopAfter(n))
    shutil.rmtree(tmp_path / "b.train" / "prepared")
    train(options_of(tmp_path / "b.train"), tools=tools)
    a, b = weights_of(tmp_path / "a.train"), weights_of(tmp_path / "b.train")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_other_weights_prepared_is_not_taken(model: Path, tmp_path: Path) -> None:
    tools = stub_tools(objectives={"before": Before})
    write_books(tmp_path / "books")
    found = []
    for width in (8, 16, 16):
        Before.folders.clear()
        options = small_options(model, tmp_path, objective=("before",), mid_dim=width)
        with pytest.raises(TrainingStopped):
            train(options, tools=tools, watcher=StopAfter(1), restart=True)
        found.append(Before.folders[0])
    assert found[0] != found[1] == found[2]
    train(options, tools=tools, restart=True)
    lines = [(line["step"], line["stage"]) for line in figures(tmp_path / "out.indexmem.train") if "held_out_recall" in line]
    assert len(lines) == len(set(lines))  # what was measured before a restart is forgotten


@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (6,), (8,), (1, 1, 4, 1)])
def test_an_interrupted_training_ends_with_the_same_bits(model: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """Ctrl-C after any step, of the first objective or the second, once or again and again."""
    tools = stub_tools(objectives={"follow": Follow, "other": Other})
    write_books(tmp_path / "books")
    more: dict[str, Any] = {"objective": ("follow", "other"), "steps": (6, 4), "checkpoint_every": 4}
    whole = train(small_options(model, tmp_path, out=tmp_path / "a.gguf", **more), tools=tools)
    options = small_options(model, tmp_path, out=tmp_path / "b.gguf", **more)
    for n in stops:
        watcher = StopAfter(n)
        with pytest.raises(TrainingStopped, match=r"of [a-z]+ are saved\. Go on with .* --resume .*b\.train"):
            train(options, tools=tools, watcher=watcher)
        assert any("stopping after this step" in note for note in watcher.notes) and not options.out.exists()
    resumed = train(options_of(tmp_path / "b.train"), tools=tools)
    assert whole is not None and resumed is not None
    a, b = weights_of(tmp_path / "a.train"), weights_of(tmp_path / "b.train")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert figures(tmp_path / "a.train") == figures(tmp_path / "b.train")
    assert whole.stages == resumed.stages and (whole.recall, whole.tokens) == (resumed.recall, resumed.tokens)


def test_a_killed_training_goes_on_from_its_last_checkpoint(model: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Dies(Follow):
        def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
            if step == 5:
                raise Killed
            return super().backward(samples, step, seed)

    options = small_options(model, tmp_path, out=tmp_path / "a.gguf", **FOLLOW)
    with pytest.raises(Killed):
        train(options, tools=stub_tools(objectives={"follow": Dies}))
    with (tmp_path / "a.train/metrics.jsonl").open("a") as file:
        file.write('{"objective": "follow", "sta')  # in the middle of a line
    assert weights_of(tmp_path / "a.train")["optimizer.1.step"] == 4
    train(options, tools=stub_tools())
    train(replace(options, out=tmp_path / "b.gguf"), tools=stub_tools())
    a, b = weights_of(tmp_path / "a.train"), weights_of(tmp_path / "b.train")
    assert all(torch.equal(a[name], b[name]) for name in a) and figures(tmp_path / "a.train") == figures(tmp_path / "b.train")


def test_a_second_ctrl_c_does_not_wait(model: Path, tmp_path: Path) -> None:
    import signal

    class Slow(Follow):
        def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
            if step == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("never here")
            return super().backward(samples, step, seed)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingStopped, match="2 of 6 steps of follow are saved"):
        train(small_options(model, tmp_path, **FOLLOW), tools=stub_tools(objectives={"follow": Slow}))
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_preparing(model: Path, tmp_path: Path) -> None:
    import signal

    class Prepares(Follow):
        def prepare(self, samples: Sequence[Sample], folder: Path, progress: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            progress(1, 2, "something")
            raise AssertionError("never here")

    with pytest.raises(TrainingStopped, match="nothing was saved before"):
        train(small_options(model, tmp_path, **FOLLOW), tools=stub_tools(objectives={"follow": Prepares}))


def test_a_finished_training_only_writes_its_sidecar_again(model: Path, tmp_path: Path) -> None:
    options = small_options(model, tmp_path, **FOLLOW)
    train(options, tools=stub_tools())
    first = options.out.read_bytes()
    with pytest.raises(ConvertError, match="--force"):
        train(options, tools=stub_tools())
    train(options, tools=stub_tools(objectives={"follow": Follow}, evaluate=recall_of([])), force=True)
    assert options.out.read_bytes() == first


def test_another_training_in_the_folder_is_refused(model: Path, tiny: Tiny, tmp_path: Path) -> None:
    options = small_options(model, tmp_path, **FOLLOW)
    train(options, tools=stub_tools())
    kept = (tmp_path / "out.indexmem.train" / checkpoints.NAME).read_bytes()
    write_books(tmp_path / "others", seed=1)
    for more, words in (
        ({"lr": (1e-3,)}, "--lr is 0.001, there it is 0.01"),
        ({"model": tiny("llama", seed=5)[0]}, "--model is another one"),
        ({"texts": (tmp_path / "others",)}, "--text is another one"),
    ):
        with pytest.raises(TrainingCheckpointError, match=f"{words}.*--run.*--restart"):
            train(replace(options, **more), tools=stub_tools(), force=True)
    assert (tmp_path / "out.indexmem.train" / checkpoints.NAME).read_bytes() == kept
    train(replace(options, device="auto", outtype="f32", checkpoint_every=1), tools=stub_tools(), force=True)
    result = train(replace(options, lr=(1e-3,)), tools=stub_tools(), force=True, restart=True)
    assert result is not None and options_of(tmp_path / "out.indexmem.train").lr == (1e-3,)


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_checkpoint_is_refused(model: Path, tmp_path: Path, damage: Optional[bytes]) -> None:
    options = small_options(model, tmp_path, **FOLLOW)
    train(options, tools=stub_tools())
    path = tmp_path / "out.indexmem.train" / checkpoints.NAME
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(TrainingCheckpointError, match="cannot be read.*--restart"):
        train(options, tools=stub_tools(), force=True)
    with pytest.raises(TrainingCheckpointError, match="no folder of a training"):
        options_of(tmp_path)


# what goes wrong


def test_a_full_disk_leaves_the_checkpoint_before(model: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    options = small_options(model, tmp_path, mid_dim=128, **FOLLOW)
    with pytest.raises(TrainingStopped):
        train(options, tools=stub_tools(), watcher=StopAfter(2))
    path = tmp_path / "out.indexmem.train" / checkpoints.NAME
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(TrainingCheckpointError, match="step 4 was not saved, the one before is intact: .*too large"):
            train(options, tools=stub_tools())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and sorted(os.listdir(path.parent)) == sorted(
        {"metrics.jsonl", "prepared", "run.json", checkpoints.NAME}
    )
    train(options, tools=stub_tools())


def test_a_full_disk_while_preparing(model: Path, tmp_path: Path) -> None:
    class Prepares(Follow):
        def prepare(self, samples: Sequence[Sample], folder: Path, progress: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(TrainingCheckpointError, match="No space left on device.*--run"):
        train(small_options(model, tmp_path, **FOLLOW), tools=stub_tools(objectives={"follow": Prepares}))


def test_a_loss_that_is_no_number(model: Path, tmp_path: Path) -> None:
    class Breaks(Follow):
        def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
            return {"loss": math.nan} if step == 4 else super().backward(samples, step, seed)

    with pytest.raises(TrainingError, match="broke down in step 5: loss nan.*--lr.*4 of 6 steps of follow are saved"):
        train(small_options(model, tmp_path, **FOLLOW), tools=stub_tools(objectives={"follow": Breaks}))


def test_what_cannot_be_trained(model: Path, tiny: Tiny, tmp_path: Path) -> None:
    options = small_options(model, tmp_path, **FOLLOW)
    for more, kind, words in (
        ({"objective": ("follow", "magic")}, TrainingError, "unknown objective 'magic': expected one of follow"),
        ({"model": tiny("gemma2")[0]}, ModelNotSupported, "architecture 'gemma2': its attention logits have a soft cap"),
        ({"model": tiny("jamba")[0]}, ModelNotSupported, "architecture 'jamba': it has recurrent layers"),
        ({"lengths": (4000,)}, TrainingError, "the text is too short: it has 2,900 tokens"),
        ({"out": tmp_path / "no/such/out.gguf"}, ConvertError, "folder does not exist"),
        ({"texts": (tmp_path / "books/book-0.txt",), "out": tmp_path / "books/book-0.txt"}, TrainingError, "is to be read"),
    ):
        with pytest.raises(kind, match=words):
            train(replace(options, **more), tools=stub_tools(), force=True)
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="--device cuda is not there"):
            train(replace(options, device="cuda"), tools=stub_tools())
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingCheckpointError, match="cannot make the run folder"):
        train(replace(options, run=tmp_path / "file"), tools=stub_tools())
