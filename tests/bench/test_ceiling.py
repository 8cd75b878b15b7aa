"""The ceiling of selection: an oracle is no worse than what only guesses, and nothing is left out that is not to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from typer.testing import CliRunner

from conftest import Tiny
from indexmem_edge.bench import ruler
from indexmem_edge.bench.cli.app import app
from indexmem_edge.bench.quality import ceiling
from indexmem_edge.bench.runner import Model
from indexmem_edge.train.model.load import load_decoder
from reference.indexers import random_indexer, write_sidecar
from support.bench_data import ruler_folder


def test_groups_cover_all_layers() -> None:
    assert ceiling.layer_groups(30, 0) == []
    assert ceiling.layer_groups(5, 2) == [(0, 2), (2, 5)]
    assert ceiling.layer_groups(2, 5) == [(0, 1), (1, 2)]


def test_expected_strings_are_found_among_the_tokens_of_the_answer(tiny: Tiny) -> None:
    model = Model(tiny("llama")[0])
    sample = ruler.Sample("niah_multiquery", 0, "some context\n", "which numbers? they are", ("123", "4567"))
    _, asked = ceiling.question_of(model, sample)
    pieces = [model.piece(token).decode() for token in asked.answer]
    assert ["".join(pieces[a:b]).strip(" ,") for a, b in asked.spans] == ["123", "4567"]
    right = ruler.Sample("qa_1", 0, "some context\n", "where? in", ("Paris", "the capital of France"))  # one of them is enough
    _, asked = ceiling.question_of(model, right)
    assert len(asked.spans) == 1 and asked.spans[0][1] == len(asked.answer)
    model.close()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_that_lost_nothing_answers_like_one_reading(tiny: Tiny, name: str) -> None:
    """Layers of gemma3 that look at a window of 16 tokens have nothing to choose."""
    decoder = load_decoder(tiny(name)[0], torch.float32)
    windowed = decoder.config.windowed
    tokens = list(range(5, 45))
    asked = ceiling.Question(tokens[:6], tokens[6:10], [(0, 2), (2, 4)])
    with torch.no_grad():
        contexts = ceiling.read_context(decoder, tokens)
        _, nll, mass = ceiling.ask(decoder, ceiling.everything(contexts), 40, asked)
        whole = decoder.logits(decoder(torch.tensor([tokens + asked.question + asked.answer])))[0, 45:49].log_softmax(-1)
        assert nll == pytest.approx(float(-whole[range(4), asked.answer].mean()), abs=1e-4)
        assert len(mass) == len(decoder.config.bounded) == decoder.config.n_layer - len(windowed)
        everything = ceiling.compress(contexts, mass, 40, windowed)
        for held, (c, value) in zip(everything, contexts):
            assert torch.equal(held.k, c.k) and torch.equal(held.v, value)
        assert ceiling.ask(decoder, everything, 40, asked)[1] == nll
        cache = ceiling.compress(contexts, mass, 20, windowed)
        for held, (c, value) in zip(cache, contexts):
            assert c.layer not in windowed or (held.k is c.k and held.v is value)
        half, contexts = ([pair for il, pair in enumerate(pairs) if il not in windowed] for pairs in (cache, contexts))
        assert all(held.k.shape == (c.k.shape[0], 20, c.k.shape[2]) for held, (c, _) in zip(half, contexts))
        assert all(torch.equal(held.k[:, part], c.k[:, part]) for held, (c, _) in zip(half, contexts) for part in (slice(4), slice(-5, None)))


def test_the_command_reports_full_oracle_and_indexer(tiny: Tiny, tmp_path: Path) -> None:
    path, config = tiny("llama")
    ruler_folder(tmp_path / "data")
    sidecar = tmp_path / "mine.indexmem.gguf"
    write_sidecar(sidecar, random_indexer("retention-mlp", config.n_layer, config.n_embd, config.n_head_kv, 0))
    words = ["ceiling", "-m", path, "--data", tmp_path / "data", "--lengths", 256, "--indexmem", sidecar, "--samples", 2]
    words += ["--groups", 2, "--out", tmp_path, "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "ceiling.json").read_text())
    singles = [json.loads(line) for line in (tmp_path / "ceiling.rows.jsonl").read_text().splitlines()]
    assert {row["sample"] for row in singles} == {0, 1} and not any("sample" in row for row in report["rows"])
    rows = report["rows"]
    by = {(row["policy"], row["ratio"]): row for row in rows}
    assert {name for name, _ in by} == {"full", "oracle", "mine", "keydiff", "mine, oracle in 0 to 0", "mine, oracle in 1 to 1"}
    assert all(0 <= row["score"] <= 1 and row["nll"] > 0 for row in rows)
    assert not any("page_nll" in row for row in rows)
    both = CliRunner().invoke(app, [str(word) for word in [*words, "--policies", "nope"]])
    assert both.exit_code == 1 and "unknown policy 'nope'" in both.output


def test_memories_and_pages(tiny: Tiny, tmp_path: Path) -> None:
    ruler_folder(tmp_path / "data")
    (tmp_path / "book.txt").write_text("It was a dark night, and it rained. " * 400)
    words = ["ceiling", "-m", tiny("llama")[0], "--data", tmp_path / "data", "--lengths", 256, "--samples", 1, "--out", tmp_path]
    words += ["--slots", "4,1000", "--text", tmp_path / "book.txt", "--budgets", 0.25, "--policies", ""]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--pages", 2]])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "ceiling.json").read_text())["rows"]
    assert {row["policy"] for row in rows} == {"full", "oracle", "oracle, 4 slots", "oracle, 4 slots, next", "oracle, 4 slots, oracle"}
    assert all(row["n_pages"] == 2 and 0 < row["page_nll"] < 20 for row in rows)
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--pages", 500]])
    assert result.exit_code == 1 and "book.txt has" in result.output and "fewer --pages" in result.output


def test_models_with_window_layers(tiny: Tiny, tmp_path: Path) -> None:
    """What is exchanged, and what an indexer chooses in, are the layers that a budget bounds."""
    path, config = tiny("gemma3")
    ruler_folder(tmp_path / "data")
    sidecar = tmp_path / "mine.indexmem.gguf"
    write_sidecar(sidecar, random_indexer("retention-mlp", config.n_layer, config.n_embd, config.n_head_kv, 0))
    words = ["ceiling", "-m", path, "--data", tmp_path / "data", "--lengths", 256, "--samples", 1, "--out", tmp_path]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--indexmem", sidecar, "--groups", 2]])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "ceiling.json").read_text())["rows"]
    found = {row["policy"] for row in rows}
    assert found == {"full", "oracle", "mine", "keydiff", "mine, oracle in 1 to 1", "mine, oracle in 3 to 3"}
    words[2] = tiny("gemma3-window")[0]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1 and "all of its layers look at a window" in result.output


def test_fewer_samples_than_were_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    path, _ = tiny("llama")
    model = Model(path)
    report = ceiling.run_ceiling(model, ruler_folder(tmp_path / "data"), (256,), ("vt",), 3, (), (0.5,), out=tmp_path)
    assert {row["n"] for row in report.rows} == {2}
    model.close()
