"""The sidecar of a model is found where it lies, used if it fits, and what is wrong with one is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import CacheWarning, SidecarError
from indexmem_edge.files.modelfile import model_fingerprint
from indexmem_edge.models import sidecars
from indexmem_edge.models.demo import demo_sidecar
from indexmem_edge.models.sidecars import find_sidecar
from indexmem_edge.native import find
from support.commands import run
from support.sidecars import fingerprint, shape
from tiny.gguf_copy import copy_model

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

BUDGET, WINDOW = 96, 16


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A model alone in its folder."""
    return Path(shutil.copy(tiny("llama")[0], tmp_path / "m.gguf"))


@pytest.fixture
def put(tiny: Tiny, model: Path) -> Any:
    """put(name, **options) writes a sidecar of that name beside the model, which it fits unless the options say otherwise."""
    from indexmem_edge.bench.synthetic import random_sidecar

    mark = fingerprint(model)

    def write(name: str, variant: str = "retention", **options: Any) -> Path:
        fits = {"fingerprint": mark, "mid_dim": 32, **options}
        return random_sidecar(model.with_name(name), shape(tiny("llama")[1]), variant, **fits)

    return write


def load(model: Path, heard: list[CacheWarning] | None = None, **options: Any) -> Any:
    heard = [] if heard is None else heard
    defaults = {"kv_budget": BUDGET, "kv_window": WINDOW, "n_threads": 1, "n_threads_batch": 1, "kv_warn": heard.append}
    return indexmem_edge.Llama(model, verbose=False, **{**defaults, **options})


@pytest.mark.parametrize("name", ["m.indexmem.gguf", "m-better.indexmem.gguf", "another name.indexmem.gguf"])
def test_one_beside_the_model_is_used_and_said(model: Path, put: Any, name: str) -> None:
    put(name)
    llm = load(model)
    stats = llm.kv_stats()
    assert (stats.policy, stats.indexer, stats.sidecar) == ("indexer", "retention", name)
    assert llm.sidecar_where == "lies beside the model"


def test_that_of_the_models_name_goes_first(model: Path, put: Any) -> None:
    for name in ("a.indexmem.gguf", "m.a.indexmem.gguf", "m.indexmem.gguf"):
        put(name)
    assert load(model).kv_stats().sidecar == "m.indexmem.gguf"


def test_none_is_used_where_none_is_wanted(model: Path, put: Any) -> None:
    put("m.indexmem.gguf")
    for options in ({"indexmem": "off"}, {"kv_policy": "streaming"}, {"kv_policy": "keydiff", "memory": "centroid"}):
        llm = load(model, **options)
        assert (llm.kv_stats().sidecar, llm.kv_stats().indexer, llm.sidecar_where) == ("", "", "")
    unbounded = load(model, kv_budget=None, kv_window=None, n_ctx=256)
    assert unbounded.kv_stats().sidecar == ""


def test_one_for_another_model_is_passed_over(tiny: Tiny, model: Path, put: Any) -> None:
    put("somebody's.indexmem.gguf", fingerprint="f" * 16)
    heard: list[CacheWarning] = []
    assert load(model, heard).kv_stats().policy == "streaming" and not heard
    other = tiny("llama", n_layer=3)[0]
    shutil.copy(other, model.with_name("n.gguf"))
    put("m.indexmem.gguf")
    assert load(model.with_name("n.gguf")).kv_stats().policy == "streaming"


def test_one_without_a_fingerprint_is_known_by_its_name(model: Path, put: Any) -> None:
    put("n.indexmem.gguf", fingerprint=None)
    assert load(model).kv_stats().sidecar == ""
    put("m.indexmem.gguf", fingerprint=None)
    assert load(model).kv_stats().sidecar == "m.indexmem.gguf"


@pytest.mark.parametrize("damage", ["header", "weights", "other", "heads"])
def test_a_damaged_one_that_was_found_is_a_warning_and_one_that_was_named_an_error(
    tiny: Tiny, model: Path, put: Any, damage: str
) -> None:
    path = model.with_name("m.indexmem.gguf")
    if damage == "other":
        put("m.indexmem.gguf", fingerprint="f" * 16)
    elif damage == "heads":  # of the same shape, as far as can be seen before the model is loaded
        whole = put("m.indexmem.gguf", fingerprint=None)
        copy_model(whole, path.with_name("copy"), metadata={"indexmem.attention.head_count": 16})
        path.with_name("copy").replace(path)
    else:
        whole = put("m.indexmem.gguf").read_bytes()
        path.write_bytes(whole[: 500 if damage == "header" else -100])
    heard: list[CacheWarning] = []
    llm = load(model, heard)
    assert llm.kv_stats().policy == "streaming"
    (warning,) = heard
    assert warning.kind == "sidecar" and "m.indexmem.gguf is not used: " in str(warning)
    llm.prefill(list(np.arange(5, 150)))
    assert llm.kv_stats().evicted > 0
    with pytest.raises(SidecarError):
        load(model, indexmem=path)


def test_a_memory_alone_is_used_and_found_where_it_is_asked_for(tiny: Tiny, model: Path) -> None:
    from indexmem_edge.bench.synthetic import random_memory

    random_memory(model.with_name("m.indexmem.gguf"), shape(tiny("llama")[1]))
    stats = load(model).kv_stats()
    assert (stats.memory, stats.policy, stats.sidecar) == ("residual", "streaming", "m.indexmem.gguf")
    assert load(model, kv_policy="keydiff").kv_stats().memory == "off"
    llm = load(model, memory="residual", kv_policy="keydiff")
    assert (llm.kv_stats().memory, llm.kv_stats().policy) == ("residual", "keydiff")


def test_those_of_the_package_fit_the_model_they_were_made_for(demo_model: Path, tmp_path: Path) -> None:
    found = find_sidecar(str(demo_model))
    assert found.path == str(demo_sidecar()) and found.where == "comes with this package" and not found.problems
    quantised_again = copy_model(demo_model, tmp_path / "m.gguf", metadata={"general.name": "another name"})
    assert find_sidecar(str(quantised_again)).path == str(demo_sidecar())


def test_the_package_lends_none_to_other_models(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, put: Any) -> None:
    assert find_sidecar(str(model)).path is None
    put("m.indexmem.gguf").rename(tmp_path / "shipped.indexmem.gguf")
    (tmp_path / "data").mkdir()
    (tmp_path / "shipped.indexmem.gguf").rename(tmp_path / "data" / "shipped.indexmem.gguf")
    monkeypatch.setattr(sidecars, "SHIPPED", tmp_path / "data")
    llm = load(model)
    assert llm.kv_stats().sidecar == "shipped.indexmem.gguf" and llm.sidecar_where == "comes with this package"


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma", "gemma3", "falcon-h1"])
def test_a_model_is_known_without_being_loaded(tiny: Tiny, arch: str) -> None:
    path = tiny(arch)[0]
    assert model_fingerprint(str(path)) == fingerprint(path)


def test_the_command_line_says_which(model: Path, put: Any) -> None:
    put("m.indexmem.gguf")
    small = ("--kv-budget", "96", "--kv-window", "16", "-t", "1", "-n", "1", "-m", str(model), "-p", "Hello")
    result = run("generate", *small)
    assert "using the sidecar m.indexmem.gguf, which lies beside the model" in result.stderr and result.returncode == 0
    result = run("generate", *small, "--indexmem", "off")
    assert "sidecar" not in result.stderr and "policy        streaming" in result.stderr
