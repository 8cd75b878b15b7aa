"""`calibrate_memory` and its command on tiny models: what they write, whether it is true, and every way to fail."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import BudgetError, IndexMemError
from indexmem_edge.convert import Checkpoint, Geometry, read_sidecar, write_sidecar
from indexmem_edge.native import find
from indexmem_edge.options import CacheOptions
from support.commands import one_error, run
from support.sidecars import fingerprint, shape

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

BUDGET, SLOTS, UBATCH, LENGTH = 64, 8, 32, 192
GATE = -1.0  # logit, of a residual memory
CACHE: dict[str, Any] = {"kv_budget": BUDGET, "kv_window": 8, "slots": SLOTS, "n_ctx": LENGTH, "n_ubatch": UBATCH}


def words(n: int, seed: int = 0) -> str:
    """A text of n bytes; the tiny models make a token of each."""
    rng = np.random.default_rng(seed)
    return bytes(rng.choice(list(b"abcdefgh .\n"), n).tolist()).decode()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(words(5 * LENGTH))
    return path


def calibrate(model: Path, text: Path, out: Path, **options: Any) -> Any:
    from indexmem_edge.calibrate.run import calibrate_memory

    return calibrate_memory(model, [text], out, **{**CACHE, "n_threads": 1, **options})


def calibrated(model: Path, text: Path, out: Path, **options: Any) -> tuple[Any, Checkpoint]:
    result = calibrate(model, text, out, **options)
    assert result.bytes == out.stat().st_size and sorted(os.listdir(out.parent)).count(out.name) == 1
    assert not [name for name in os.listdir(out.parent) if name.endswith(".tmp")]
    return result, read_sidecar(out).checkpoint


def indexer_of(model: tuple[Path, Any], path: Path, kind: str = "retention", **more: Any) -> Path:
    from indexmem_edge.bench.synthetic import random_sidecar

    return random_sidecar(path, shape(model[1]), kind, **{"fingerprint": fingerprint(model[0]), **more})


def with_residual(indexer: Path, path: Path, seed: int = 0) -> Path:
    """The same indexer and a random residual memory."""
    rng = np.random.default_rng(seed)
    c = read_sidecar(indexer).checkpoint
    n, d = c.geometry.block_count, c.geometry.key_length
    phi = 0.03 * rng.standard_normal((n, 16, d)).astype(np.float32)
    constants = {
        "feature_dim": 16, "head_dim": d, "eps": 1e-6, "gate_logit": [GATE] * n, "eta_raw": [0.5] * n,
        "decay_logit": [3.0] * n, "enabled": [True] * n,
    }  # fmt: skip
    layers = [{**layer, "phi_proj.weight": w} for layer, w in zip(c.layers, phi)]
    write_sidecar(path, replace(c, memory="residual", memory_constants=constants, layers=layers))
    return path


# what is written


def test_a_sidecar_of_a_memory_alone(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model, config = tiny("qwen3")
    steps: list[tuple[int, int]] = []
    result, c = calibrated(model, text, tmp_path / "m.gguf", progress=lambda *s: steps.append(s))
    assert (c.kind, c.memory, c.layers) == ("none", "centroid", [{}] * config.n_layer)
    assert c.memory_constants == {
        "slot_count": SLOTS, "enabled": [row.enabled for row in result.layers],
        "gate": [pytest.approx(row.gate if row.enabled else 1.0, rel=1e-6) for row in result.layers],
    }  # fmt: skip
    assert c.fingerprint == fingerprint(model) and c.architecture == "qwen3"
    assert c.geometry == Geometry(config.n_layer, config.n_embd, config.n_head_kv, config.n_head, config.head_dim)
    assert c.defaults == {"sinks": 4, "window": 8, "budget": BUDGET}
    assert c.provenance.source_files == (text.name,)
    assert c.scores["attention_error.without_memory"] == pytest.approx(result.error_without)
    assert c.scores["attention_error.with_memory"] == pytest.approx(result.error)
    assert result.passages == (LENGTH,) * 4 and (result.budget, result.slots) == (BUDGET, SLOTS)
    assert result.rows == 4 * 4 * 16 * config.n_head  # from the third ubatch on
    for row in result.layers:  # the promise, and that it was measured at all
        assert 0 < row.error <= row.off and row.without < row.off and 1 / 16 <= row.gate <= 4
    n_steps = 4 * (6 + 2 * 5 + config.n_layer)  # ubatches of three contexts, of two but the last
    assert steps == [(i + 1, n_steps) for i in range(n_steps)]


@pytest.mark.parametrize("arch", ["gemma3", "jamba", "qwen35", "nemotron_h"])
def test_a_model_with_layers_of_several_kinds(tiny: Tiny, text: Path, tmp_path: Path, arch: str) -> None:
    """Those that a budget bounds are measured, and the sidecar is for them; it runs."""
    from indexmem_edge import Llama

    model, config = tiny(arch)
    bounded = config.full_layers
    result, c = calibrated(model, text, tmp_path / "m.gguf")
    assert tuple(row.layer for row in result.layers) == c.numbers == bounded and len(bounded) < config.n_layer
    used = [row.layer for row in result.layers if row.enabled]
    assert [il for il, on in enumerate(c.memory_constants["enabled"]) if on] == used
    assert len(c.memory_constants["gate"]) == config.n_layer and all(row.without > 0 for row in result.layers)
    llm = Llama(
        str(model), kv_budget=BUDGET, kv_window=8, indexmem=str(tmp_path / "m.gguf"), n_ubatch=UBATCH, n_threads=1, verbose=False
    )
    llm.eval([3 + i % 200 for i in range(150)])
    assert llm.kv_stats().memory_layers == len(used) and llm.kv_stats().evicted > 0
    llm.close()


def test_layers_that_read_those_of_others_count_with_them(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """Their query heads are more heads of the layer whose entries they read, and of the gate that is chosen for it."""
    from indexmem_edge.calibrate.attention import Passage
    from indexmem_edge.calibrate.passages import Reader, tokenize
    from indexmem_edge.files.modelfile import loaded_model

    path, config = tiny("gemma4-shared")
    options = CacheOptions.from_keywords({"kv_budget": BUDGET, "kv_window": 8, "kv_span": 0})
    with loaded_model(str(path)) as model, Reader(model, [options], LENGTH, UBATCH, 1) as reader:
        tokens = np.array(tokenize(model, text.read_text())[:LENGTH], np.int32)
        passage, layers = reader.read(tokens, lambda: None)
    assert isinstance(passage, Passage) and list(layers) == [1, 3]
    assert [len(layers[il].queries[0]) for il in (1, 3)] == [config.n_head, 2 * config.n_head]  # the last layer reads the third
    result, c = calibrated(path, text, tmp_path / "out.gguf")
    assert [row.layer for row in result.layers] == list(c.numbers) == [1, 3]


@pytest.mark.parametrize("arch", ["deepseek2", "kimi-linear"])
def test_latent_attention_has_no_memory(tiny: Tiny, text: Path, tmp_path: Path, arch: str) -> None:
    with pytest.raises(IndexMemError, match="one row for keys and values together"):
        calibrate(tiny(arch)[0], text, tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == []


def test_a_residual_memory_reads_queries_as_they_are_before_any_scale(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """Two files of the same network: the graph of one scales queries itself, that of the other leaves it to attention."""
    results = []
    for arch, overrides in (("qwen2", {"qkv_bias": False}), ("phi3", {})):
        made = tiny(arch, **overrides)
        source = with_residual(indexer_of(made, tmp_path / f"{arch}.gguf", mid_dim=32), tmp_path / f"{arch}-r.gguf")
        results.append(calibrate(made[0], text, tmp_path / f"{arch}.out", indexmem=source, memory="residual").layers)
    for one, other in zip(*results):
        assert (one.layer, one.enabled, one.gate) == (other.layer, other.enabled, pytest.approx(other.gate, rel=1e-3))
        for name in ("without", "off", "plain", "gated"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3)


def test_it_is_the_same_twice_and_depends_on_the_policy(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model = tiny("llama")[0]
    first, again, other = (
        calibrate(model, text, tmp_path / f"{i}.gguf", kv_policy=policy)
        for i, policy in enumerate(("streaming", "streaming", "keydiff"))
    )
    assert first.layers == again.layers and first.layers != other.layers


@pytest.mark.parametrize("outtype", ["f16", "q8_0", "f32"])
def test_an_indexer_gets_a_memory_and_stays_as_it_was(tiny: Tiny, text: Path, tmp_path: Path, outtype: str) -> None:
    made = tiny("llama")
    source = indexer_of(made, tmp_path / "indexer.gguf", outtype=outtype, mid_dim=32)
    result, c = calibrated(made[0], text, tmp_path / "both.gguf", indexmem=source)
    assert result.policy == "indexer"
    before, after = read_sidecar(source), read_sidecar(tmp_path / "both.gguf")
    assert after.types == before.types and after.tensors.keys() == before.tensors.keys()
    for name, array in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name], array)
    assert c.constants == before.checkpoint.constants and c.memory == "centroid"
    assert c.provenance.source_files == ("random", text.name)
    again = calibrate(made[0], text, tmp_path / "again.gguf", indexmem=tmp_path / "both.gguf")
    assert again.layers == result.layers  # the memory it had takes no part
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "both.gguf").read_bytes()


def test_who_leaves_is_up_to_the_indexer(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    made = tiny("llama")
    sources = [indexer_of(made, tmp_path / f"{s}.gguf", seed=s, mid_dim=32) for s in range(2)]
    results = [calibrate(made[0], text, source.with_suffix(".out"), indexmem=source) for source in sources]
    assert results[0].layers != results[1].layers
    options = {"indexmem": sources[0], "kv_policy": "streaming"}  # or to a policy, with the memory of the sidecar
    other = calibrate(made[0], text, tmp_path / "streaming.gguf", **options)
    assert other.layers == calibrate(made[0], text, tmp_path / "alone.gguf").layers != results[0].layers


def test_a_residual_memory_gets_gates(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    made = tiny("llama")
    source = with_residual(indexer_of(made, tmp_path / "indexer.gguf", mid_dim=32), tmp_path / "residual.gguf")
    before = read_sidecar(source).checkpoint
    result, c = calibrated(made[0], text, tmp_path / "out.gguf", indexmem=source, memory="residual")
    assert c.memory == "residual" and result.slots == 0
    for il, row in enumerate(result.layers):
        np.testing.assert_array_equal(c.layers[il]["phi_proj.weight"], before.layers[il]["phi_proj.weight"])
        assert row.off == row.without and row.error <= row.without and c.memory_constants["enabled"][il] == row.enabled
        if row.enabled:
            assert 1 / (1 + np.exp(-c.memory_constants["gate_logit"][il])) == pytest.approx(row.gate, rel=1e-5)
        else:
            assert c.memory_constants["gate_logit"][il] == before.memory_constants["gate_logit"][il]
    for key in ("eta_raw", "decay_logit", "eps", "feature_dim"):
        assert c.memory_constants[key] == before.memory_constants[key]


def test_a_centroid_memory_takes_the_place_of_a_residual_one(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    made = tiny("llama")
    source = with_residual(indexer_of(made, tmp_path / "indexer.gguf", mid_dim=32), tmp_path / "residual.gguf")
    _, c = calibrated(made[0], text, tmp_path / "out.gguf", indexmem=source)
    assert c.memory == "centroid" and not any("phi_proj.weight" in layer for layer in c.layers)


def test_without_a_fingerprint(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    made = tiny("llama")
    assert calibrated(made[0], text, tmp_path / "a.gguf", fingerprint=False)[1].fingerprint is None
    anyone = indexer_of(made, tmp_path / "i.gguf", fingerprint=None, mid_dim=32)
    assert calibrated(made[0], text, tmp_path / "b.gguf", indexmem=anyone)[1].fingerprint is None


# what the runtime makes of it


@pytest.mark.parametrize("memory", ["centroid", "residual"])
def test_errors_are_those_of_a_cache_with_the_sidecar(tiny: Tiny, text: Path, tmp_path: Path, memory: str) -> None:
    """In the first layer, whose operands are the same with any cache; its memory is on, whatever was decided."""
    from indexmem_edge.calibrate.passages import passages, tokenize
    from support.native_context import Capture, Context, open_model

    model_path, config = tiny("llama")
    source = with_residual(indexer_of((model_path, config), tmp_path / "i.gguf", mid_dim=32), tmp_path / "r.gguf")
    result, c = calibrated(model_path, text, tmp_path / "out.gguf", indexmem=source, memory=memory, n_passages=2)
    row = result.layers[0]
    gates = {"centroid": {"gate": [row.gate] * config.n_layer}, "residual": {"gate_logit": [GATE] * config.n_layer}}
    constants = {**c.memory_constants, **gates[memory], "enabled": [True] * config.n_layer}
    write_sidecar(tmp_path / "on.gguf", replace(c, memory_constants=constants))

    first = (BUDGET - result.slots) // UBATCH + 1  # ubatch before which something has left
    rows = [i for start in range(first * UBATCH, LENGTH, UBATCH) for i in range(start, start + UBATCH, 2)]
    assert result.rows == 2 * len(rows) * config.n_head

    def outputs(tokens: Any, **more: Any) -> np.ndarray:
        capture = Capture("kqv_out-0")
        with Context(model, n_ubatch=UBATCH, n_threads=1, capture=capture, **more) as context:
            context.feed(tokens.tolist(), UBATCH)
        return np.concatenate(capture.found["kqv_out-0"], axis=2)[0, 0, rows]

    with open_model(model_path) as model:
        texts = passages([tokenize(model, text.read_text())], [1], LENGTH, 4 * UBATCH, 2)
        full = np.stack([outputs(tokens) for tokens in texts])
        found = {}
        for kind in (memory, "off"):
            cache = {"budget": BUDGET, "sidecar": tmp_path / "on.gguf", "policy": "indexer", "memory": kind}
            difference = np.stack([outputs(tokens, **cache) for tokens in texts]) - full
            found[kind] = np.sqrt(np.square(difference).sum() / np.square(full).sum())
    expected = row.gated if memory == "centroid" else row.plain  # a residual memory has the gate it was made with
    assert found[memory] == pytest.approx(expected, rel=5e-3)
    assert found["off"] == pytest.approx(row.without, rel=5e-3)
    assert abs(expected - row.without) > 0.02 * row.without  # the two can be told apart


def test_a_sidecar_of_a_memory_alone_is_used(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model = tiny("llama")[0]
    result = calibrate(model, text, tmp_path / "m.gguf")
    shown = run("inspect", str(tmp_path / "m.gguf"), "-m", str(model), "--json")
    assert shown.returncode == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert facts["memory"]["kind"] == "centroid" and facts["memory"]["slot_count"] == SLOTS
    assert facts["memory"]["enabled"] == [row.enabled for row in result.layers]
    assert facts["indexer"] == {"kind": "none", "input": "attention_input"} and facts["tensors"] == []
    assert run("inspect", str(tmp_path / "m.gguf")).stdout.count("attention_error") == 2
    options = ["-f", str(text), "-n", "4", "--kv-budget", str(BUDGET), "--kv-window", "8", "-ub", str(UBATCH), "--json"]
    for policy, more in (("streaming", []), ("keydiff", ["--kv-policy", "keydiff"])):
        found = run("generate", "-m", str(model), "--indexmem", str(tmp_path / "m.gguf"), *options, *more)
        assert found.returncode == 0, found.stderr
        stats = json.loads(found.stdout)["stats"]
        assert [stats[name] for name in ("memory", "memory_slots", "policy")] == ["centroid", SLOTS, policy]
        assert stats["memory_layers"] == sum(row.enabled for row in result.layers) and stats["evicted"] > 0


# errors


@pytest.mark.parametrize(
    "options, kind, match",
    [
        ({"kv_budget": 0}, BudgetError, "give a kv_budget"),
        ({"kv_budget": 20}, BudgetError, "8 memory_slots.*Raise kv_budget to 21 or more"),
        ({"kv_policy": "full"}, BudgetError, "never evicts"),
        ({"kv_policy": "nonsense"}, IndexMemError, "nonsense"),
        ({"kv_policy": "indexer"}, IndexMemError, "--indexmem"),
        ({"memory": "infinite"}, IndexMemError, "centroid, residual"),
        ({"memory": "residual"}, IndexMemError, "trained weights"),
        ({"slots": 0}, IndexMemError, "slots must be from 1 to 4,096, found 0"),
        ({"n_ubatch": 0}, IndexMemError, "n_ubatch must be from 1"),
        ({"kv_window": 0}, IndexMemError, "kv_window must be from 1"),
        ({"n_passages": 1}, IndexMemError, "n_passages must be from 2"),
        ({"n_ctx": 127}, IndexMemError, "at least 128"),
        ({"kv_budget": 500, "n_ctx": 1024}, IndexMemError, "two passages of at least 544 tokens.*found 960 tokens"),
        ({"indexmem": "no/such.gguf"}, IndexMemError, "no/such.gguf"),
    ],
)  # fmt: skip
def test_what_cannot_be(
    tiny: Tiny, text: Path, tmp_path: Path, options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        calibrate(tiny("llama")[0], text, tmp_path / "out.gguf", **options)
    assert os.listdir(tmp_path) == []


def test_a_sidecar_of_another_model(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    source = indexer_of(tiny("llama"), tmp_path / "i.gguf", mid_dim=32, fingerprint="f" * 16)
    with pytest.raises(IndexMemError, match="does not fit.*fingerprint"):
        calibrate(tiny("llama")[0], text, tmp_path / "out.gguf", indexmem=source)
    with pytest.raises(IndexMemError, match="does not fit.*architecture"):
        calibrate(tiny("qwen3")[0], text, tmp_path / "out.gguf", indexmem=source)


def test_models_without_a_bounded_cache(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    for arch in ("gemma3-window", "bloom"):
        with pytest.raises(IndexMemError, match="bounded KV cache"):
            calibrate(tiny(arch)[0], text, tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == []


def test_an_input_is_not_overwritten(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    made = tiny("llama")
    source = indexer_of(made, tmp_path / "i.gguf", mid_dim=32)
    (tmp_path / "link.gguf").symlink_to(source)
    for out in (source, tmp_path / "link.gguf", made[0], text):
        with pytest.raises(IndexMemError, match="to be read as well"):
            calibrate(made[0], text, out, indexmem=source, force=True)
    with pytest.raises(IndexMemError, match="exists"):
        calibrate(made[0], text, source)
    with pytest.raises(IndexMemError, match="folder"):
        calibrate(made[0], text, tmp_path / "no" / "out.gguf")


def test_a_failure_in_the_middle_leaves_nothing(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from indexmem_edge.calibrate.capture import AttentionCapture

    def broken(self: Any, tensor: Any) -> None:
        raise TypeError("no such layout")

    monkeypatch.setattr(AttentionCapture, "take", broken)
    with pytest.raises(IndexMemError, match="cannot observe .*: no such layout"):
        calibrate(tiny("llama")[0], text, tmp_path / "out.gguf")
    assert os.listdir(tmp_path) == []


# the command


def arguments(model: Path, text: Path, out: Path) -> list[str]:
    return [
        "calibrate-memory", "-m", str(model), "--text", str(text), "--out", str(out), "--kv-budget", str(BUDGET),
        "--kv-window", "8", "--memory-slots", str(SLOTS), "-c", str(LENGTH), "-ub", str(UBATCH),
    ]  # fmt: skip


def test_help() -> None:
    result = run("calibrate-memory", "--help")
    assert result.returncode == 0
    for word in ("--text", "--kv-budget", "--memory-slots", "--passages", "--force", "-ub", "calibrate-memory -m"):
        assert word in result.stdout


def test_the_command(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model, config = tiny("llama")
    result = run(*arguments(model, text, tmp_path / "a.gguf"), "--passages", "2")
    assert result.returncode == 0, result.stderr
    for word in ("no memory", "calibrated", "gate 1", f"of {config.n_layer} layers", f"{LENGTH}, {LENGTH} tokens"):
        assert word in result.stdout
    result = run(*arguments(model, text, tmp_path / "b.gguf"), "--json")
    facts = json.loads(result.stdout)
    gates = read_sidecar(tmp_path / "b.gguf").checkpoint.memory_constants
    assert [row["enabled"] for row in facts["layers"]] == gates["enabled"]
    assert facts["error"] <= facts["error_without"] or facts["notes"]


def test_errors_of_the_command_are_one_line(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model, out = tiny("llama")[0], tmp_path / "out.gguf"
    one_error(run(*arguments(model, tmp_path / "none.txt", out)), "cannot read", "none.txt")
    one_error(run(*arguments(model, text, out), "--memory", "residual"), "--indexmem")
    (tmp_path / "short.txt").write_text(words(100))
    one_error(run(*arguments(model, tmp_path / "short.txt", out)), "too short", "100 tokens")
    assert os.listdir(tmp_path) == ["short.txt"]
