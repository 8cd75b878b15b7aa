"""What `fit` says of a model is so: bytes of each part, tokens before the first is dropped, and what does not fit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import BudgetError, Llama, ModelFileError
from indexmem_edge.files.modelfile import loaded_model
from indexmem_edge.models import fit as fitting
from indexmem_edge.models.advice import advise, worth_measuring
from indexmem_edge.models.fit import Fit, Memory, Row, fit
from indexmem_edge.models.measure import measured
from indexmem_edge.native import api, find
from indexmem_edge.native.memory import resident_memory
from indexmem_edge.options import CacheOptions, split_keywords
from indexmem_edge.runtime.contexts import context_of
from tiny.models import FIRST_FILLER, REFUSED

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

MIB, GIB = 1 << 20, 1 << 30
PLENTY = Memory(1 << 40)
KINDS = ("llama", "gemma", "gemma3", "gemma3n", "gemma4", "falcon-h1", "jamba", "qwen3next", "deepseek2", "qwen2vl", "kimi-linear", "lfm2", "gpt-oss")


def load(found: Fit, row: Row, **options: Any) -> Any:
    return indexmem_edge.Llama(found.path, verbose=False, kv_warn=lambda _: None, **found.row_keywords(row), **options)


def bounded(found: Fit, cache_type: str = "f16") -> list[Row]:
    return [row for row in found.rows if row.budget and row.cache_type == cache_type]


def unbounded(found: Fit, cache_type: str = "f16") -> list[Row]:
    return [row for row in found.rows if not row.budget and row.cache_type == cache_type]


# sizes


@pytest.mark.parametrize("arch", KINDS)
def test_each_part_is_what_the_model_then_has(tiny: Tiny, arch: str) -> None:
    found = fit(tiny(arch)[0], PLENTY)
    for row in (bounded(found)[0], unbounded(found)[0]):
        llm = load(found, row)
        stats, sizes = llm.kv_stats(), row.sizes
        assert sizes is not None and row.fits
        assert sizes.total == stats.cache_bytes + stats.meta_bytes
        assert (sizes.fixed, sizes.slots or stats.slots) == (stats.window_bytes + stats.recurrent_bytes, stats.slots)
        assert sizes.work == stats.work_bytes and sizes.sidecar == stats.sidecar_bytes == 0
        assert sizes.model == pytest.approx(sum(t.n_bytes for t in gguf.GGUFReader(found.path).tensors), rel=0.02)


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("budget", [1024, 0])
def test_compute_buffers_are_those_of_a_context_with_weights(tiny: Tiny, arch: str, budget: int) -> None:
    found = fit(tiny(arch)[0], PLENTY)
    row = bounded(found)[0] if budget else unbounded(found)[0]
    asked, others = split_keywords(found.row_keywords(row))
    assert row.sizes is not None
    with loaded_model(found.path, as_used=True) as model, context_of(found.path, model, CacheOptions.from_keywords(asked), others) as context:
        compute = api.get_stats(context).compute_bytes if budget else api.compute_bytes(context)
        assert row.sizes.compute == compute
        assert row.sizes.model == pytest.approx(api.model_bytes(context), rel=1e-3)  # tensors are aligned in another way in a file


@pytest.mark.parametrize("arch", KINDS)
def test_so_many_tokens_are_kept_before_the_first_is_dropped_and_a_copy_takes_so_much(tiny: Tiny, arch: str) -> None:
    found = fit(tiny(arch)[0], PLENTY)
    row = bounded(found)[0]
    assert row.sizes is not None
    llm = load(found, row, kv_checkpoints=0)
    tokens = [FIRST_FILLER + i % 10 for i in range(row.exact + 1)]
    llm.prefill(tokens[:-1])
    stats = llm.kv_stats()
    assert (stats.evicted, stats.kept) == (0, row.exact)
    assert 0.94 * row.sizes.copy < llm.checkpoint().nbytes < 1.02 * row.sizes.copy  # less: there is state that is not copied
    llm.eval(tokens[-1:])
    assert llm.kv_stats().evicted > 0


def test_the_smallest_head_is_the_first_that_drops_one(demo_model: Path) -> None:
    """The sidecar of the demo model divides the budget among KV heads."""
    from indexmem_edge.models.demo import demo_sidecar
    from indexmem_edge.runtime.sizes import kv_bytes

    options: dict[str, Any] = {"kv_budget": 256, "indexmem": demo_sidecar(), "n_ctx": 1024}
    exact = kv_bytes(demo_model, options).exact
    with Llama(demo_model, verbose=False, n_threads=1, **options) as llm:
        tokens = llm.tokenize(b"one two three " * 200)
        llm.prefill(tokens[:exact])
        assert (llm.kv_stats().evicted, llm.kv_stats().kept) == (0, exact)
        llm.eval(tokens[exact : exact + 1])
        assert llm.kv_stats().evicted > 0 and exact < 200


def test_a_memory_takes_slots_of_what_is_exact(tiny: Tiny) -> None:
    from indexmem_edge.runtime.sizes import kv_bytes

    assert kv_bytes(tiny("llama")[0], {"kv_budget": 512, "memory": "centroid", "memory_slots": 40}).exact == 472


def test_without_a_budget_as_much_as_there_is_room_for(tiny: Tiny) -> None:
    found = fit(tiny("llama")[0], PLENTY)
    (row,) = unbounded(found)
    assert row.exact == found.trained == load(found, row).n_ctx() == 4096


@pytest.mark.parametrize("cache_type, what", [("f16", "budget"), ("f16", "none"), ("q8_0", "budget")])
def test_a_process_takes_what_was_said(demo_model: Path, cache_type: str, what: str) -> None:
    program = Path(__file__).parents[1] / "support" / "taken.py"
    root = Path(indexmem_edge.__file__).parents[1]
    arguments = [sys.executable, str(program), str(demo_model), cache_type, what]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert result.returncode == 0, result.stderr
    taken = json.loads(result.stdout)
    assert taken["stats"]["kv_bytes"] + taken["stats"]["meta_bytes"] == taken["cache"]
    if sys.platform != "linux":
        return
    assert taken["loaded"] >= 0.98 * taken["said_loaded"]
    assert taken["needed"] <= 1.03 * taken["said_used"]
    if what == "budget":  # without one, the compute buffers are used up only by a text of the whole length
        assert taken["used"] >= 0.98 * taken["said_used"]


# what fits


def test_rows_go_up_to_what_fits_and_one_beyond(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "resident_memory", lambda: 64 * MIB)  # whatever else this process has done
    path = tiny("llama", n_ctx_train=1 << 17)[0]
    everything = fit(path, PLENTY)
    assert [row.budget for row in bounded(everything)] == [1024 << i for i in range(7)] + [(1 << 17) - 512]
    wide = bounded(everything)[4]
    found = fit(path, Memory(wide.total + 32 * MIB))
    rows = bounded(found)
    assert [row.fits for row in rows] == [True] * (len(rows) - 1) + [False]
    assert rows[-2].total <= found.memory.usable < rows[-1].total
    assert rows[-2].budget % 256 == 0 and rows[-2].budget >= 8192


def test_types_that_a_model_cannot_have_are_rows_with_the_reason(tiny: Tiny) -> None:
    found = fit(tiny("llama", head_dim=48, n_embd=48)[0], PLENTY)
    assert bounded(found)[0].fits
    for name in ("q8_0", "q4_0"):
        (row,) = bounded(found, name)
        assert row.sizes is None and not row.fits and row.why_not


def test_where_checkpoints_leave_no_room_there_are_none(tiny: Tiny) -> None:
    found = fit(tiny("llama")[0], Memory(resident_memory() + 200 * MIB))
    assert found.copies == 0 and bounded(found)[0].fits
    command = advise(found).command
    assert command[command.index("--kv-checkpoints") + 1] == "0"


def test_so_many_bytes_of_checkpoints_as_were_asked_for(tiny: Tiny) -> None:
    found = fit(tiny("llama")[0], PLENTY, 10 * MIB)
    usual = fit(tiny("llama")[0], PLENTY)
    for row, before in zip(bounded(found), bounded(usual)):
        assert row.sizes is not None and before.sizes == row.sizes
        assert 10 * MIB <= row.sizes.copies(found.copies) <= 10 * MIB + row.sizes.copy
        assert before.sizes.copies() > 200 * MIB
    assert advise(found).command[6:8] == ("--kv-checkpoints", str(10 * MIB))


@pytest.mark.parametrize("arch", REFUSED)
def test_without_a_budget_where_none_is_possible(tiny: Tiny, arch: str) -> None:
    found = fit(tiny(arch)[0], PLENTY)
    assert found.refused and all(not row.budget for row in found.rows)
    advised = advise(found)
    assert found.refused in advised.why
    assert found.generates == (arch not in ("t5", "llama-embed"))
    if found.generates:
        assert advised.row in found.rows and advised.command[4:6] == ("--kv-budget", "0")
    else:
        assert advised.row is None and worth_measuring(found) == ()


def sparse_model(path: Path, tiny: Tiny, nbytes: int) -> Path:
    """A model file of that size on a disk that has no room for it: its tensors are holes."""
    source, config = tiny("llama", n_embd=2048, n_layer=1)
    reader = gguf.GGUFReader(source)
    width = -(-nbytes // (config.n_embd * 4 * 3))  # of the feed-forward matrices, of which there are three
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = width if name == "llama.feed_forward_length" else field.contents()
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    size = 0
    for t in reader.tensors:
        shape = [width if n == config.n_ff else int(n) for n in reversed(t.shape)]
        n = 4 * math.prod(shape)
        writer.add_tensor_info(t.name, shape, t.data.dtype, n)
        size += -(-n // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    end = -(-path.stat().st_size // 32) * 32
    with open(path, "r+b") as file:
        file.truncate(end + size)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="holes in files need another call there")
def test_a_file_that_is_larger_than_the_memory_is_not_loaded(tiny: Tiny, tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "huge.gguf", tiny, 64 * GIB)
    before = resident_memory()
    found = fit(path, Memory(8 * GIB))
    assert resident_memory() < before + 200 * MIB
    assert found.file_bytes > 64 * GIB and not any(row.fits for row in found.rows)
    advised = advise(found)
    least = found.least
    assert advised.row is None and least is not None and least.sizes is not None
    assert advised.short_by == least.total - 8 * GIB
    assert advised.largest_file == 8 * GIB - (least.total - least.sizes.model)
    assert "more than there is; a file of the same model of at most" in advised.why and worth_measuring(found) == ()


def test_free_memory_has_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "free_memory", lambda: 10 * GIB)
    assert fitting.memory_for(None) == Memory(9 * GIB, 10 * GIB, GIB)
    monkeypatch.setattr(fitting, "free_memory", lambda: GIB)
    assert fitting.memory_for(None) == Memory(768 * MIB, GIB, 256 * MIB)
    monkeypatch.setattr(fitting, "free_memory", lambda: None)
    with pytest.raises(BudgetError, match="say how much to use, for example --memory 8G"):
        fitting.memory_for(None)
    assert fitting.memory_for(GIB) == Memory(GIB)


def test_damaged_files(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny("llama")[0].read_bytes()[:3000])
    for path in (tmp_path / "cut.gguf", tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelFileError):
            fit(path, PLENTY)


# speed


def test_rows_are_measured_as_far_as_there_is_time(tiny: Tiny) -> None:
    found = fit(tiny("llama")[0], PLENTY)
    rows = worth_measuring(found)
    best = advise(found).row
    assert rows[0] is best and bounded(found)[0] in rows and unbounded(found)[0] in rows and len(rows) <= 4
    told: list[tuple[float, float]] = []
    (done,) = fitting.with_speeds(found, (bounded(found)[0],), 60, lambda *seconds: told.append(seconds))
    measured_row, *others = done.rows
    speed = measured_row.speed
    assert speed is not None and speed.read and speed.write and speed.full and speed.read_tokens > 1024
    assert 1024 - 64 <= speed.kept <= 1024
    assert all(row.speed is None for row in others)
    assert told == sorted(told) and all(done <= total == 60 for done, total in told)


def test_no_time_no_figures(tiny: Tiny) -> None:
    options = CacheOptions.from_keywords({"kv_budget": 1024, "indexmem": "off"})
    assert list(measured(str(tiny("llama")[0]), [(options, {})] * 2, 1e-9)) == [None, None]

