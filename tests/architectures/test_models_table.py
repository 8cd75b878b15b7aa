"""The table of architectures: complete, true of every tiny model, and what docs/models.md and `doctor` say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge.models import architectures as table, page as models_page
from indexmem_edge.native import api, find
from indexmem_edge.train.model.architectures import ARCHITECTURES as TRAINABLE
from reference.indexers import random_indexer, write_sidecar
from support.architectures import BOUNDED, TABLE
from support.commands import run
from support.comparing import tokens_of
from support.native_context import Context, open_model
from tiny.models import MIXED, REFUSED, SUPPORTED, TRAINED, UNLIKE, UNROTATABLE, make_config

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

TINY = [*SUPPORTED, *UNLIKE, *UNROTATABLE, *TRAINED, *MIXED, *REFUSED]
FLAGS = {
    table.BOUNDED: api.LAYER_BOUNDED, table.WINDOW: api.LAYER_WINDOW, table.WINDOW_BY_FILE: api.LAYER_WINDOW,
    table.RECURRENT: api.LAYER_RECURRENT,
}  # fmt: skip


def test_it_has_what_the_library_has() -> None:
    native = api.architectures()
    assert table.ARCHITECTURES.keys() == native.keys() and len(native) > 150
    for name, reason in native.items():
        if reason:
            assert table.ARCHITECTURES[name].refused == reason


def test_nothing_is_in_it_twice_or_by_mistake() -> None:
    names = " ".join([*table._LAYERS.values(), *table._REFUSED.values()]).split()
    assert len(names) == len(set(names)) == len(table.ARCHITECTURES)
    assert {*table._NOTES, *table._MODELS} <= set(names)
    for a in table.ARCHITECTURES.values():
        assert bool(a.refused) != bool(a.layers)
    assert {a.name for a in table.ARCHITECTURES.values() if not a.untrainable} == TRAINABLE.keys()
    assert all(not table.ARCHITECTURES[name].refused for name in TRAINABLE), "trained for a budget that is refused"


@pytest.mark.parametrize("name", TINY)
def test_it_is_true_of_the_tiny_models(tiny: Tiny, name: str) -> None:
    path, config = tiny(name)
    row = table.ARCHITECTURES[config.arch]
    with open_model(path) as model:
        why, flags = api.model_unsupported_reason(model), api.model_layers(model)
    if name in TABLE and "bounded already" in TABLE[name].steps:  # this file, and not its architecture
        assert why is not None and "windows in all its layers" in why and not row.refused
        return
    assert row.refused == (why or "").removeprefix(f"architecture '{config.arch}' has ")
    if why is None:
        found = {flag for flag in (1, 2, 4) if any(flag & f for f in flags)}
        always = {FLAGS[kind] for kind in row.layers if kind != table.WINDOW_BY_FILE}
        assert always <= found <= {FLAGS[kind] for kind in row.layers}


@pytest.mark.parametrize("name", [name for name in (*BOUNDED, *UNLIKE, *UNROTATABLE) if name != "exaone4"])
def test_an_indexer_reads_along_in_each(tiny: Tiny, name: str, tmp_path: Path) -> None:
    """What the page says of every architecture with a budget: it is shown what attention reads, in each bounded layer."""
    path, config = tiny(name)
    tokens = tokens_of(config, 150)
    with open_model(path) as model:
        bounded = [il for il, flags in enumerate(api.model_layers(model)) if flags & api.LAYER_BOUNDED]
        with Context(model, budget=64, window=16, n_ubatch=32) as c:
            n_head_kv = api.n_head_kv(c.ctx, bounded[0])
        held = []
        for seed in (0, 1):
            write_sidecar(tmp_path / f"{seed}", random_indexer("retention-mlp", config.n_layer, config.n_embd, n_head_kv, seed))
            sidecar = dict(sidecar=tmp_path / f"{seed}", policy="indexer")
            with Context(model, budget=64, window=16, n_ubatch=32, **sidecar) as c:
                c.feed(tokens, 32)
                held.append(c.positions())
    for il in bounded:
        assert any(not np.array_equal(one, other) for one, other in zip(held[0][il], held[1][il]))


def test_the_tiny_models_have_one_of_each_kind() -> None:
    assert {table.ARCHITECTURES[make_config(name).arch].layers for name in TINY} >= table._LAYERS.keys()


@pytest.mark.parametrize(
    "flags, words",
    [
        ([1, 1], "all 2 layers are bounded"),
        ([4, 4, 1, 4], "1 of 4 layers are bounded, 3 recurrent"),
        ([5, 5], "2 of 2 layers are bounded, 2 recurrent"),
        ([2, 1, 8, 0], "1 of 4 layers are bounded, 1 with a window, 1 reading the entries of others, 1 without attention"),
        ([2], "0 of 1 layers are bounded, 1 with a window"),
    ],
)
def test_layers_in_words(flags: list[int], words: str) -> None:
    assert table.in_words(flags) == words


def test_the_page_is_what_is_printed() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text() == models_page.page(), "run `make pages`"


def test_doctor_and_inspect_say_it_of_a_file(tiny: Tiny) -> None:
    path = str(tiny("lfm2")[0])
    words = "2 of 4 layers are bounded, 2 recurrent"
    found = {f["name"]: f["found"] for f in json.loads(run("doctor", "-m", path, "--json").stdout)["findings"]}
    assert found["layers"].startswith(f"{words}; with a budget of 1,024 KV 768.0 KiB and ")
    assert found["layers"].endswith("recurrent states 3.0 KiB")
    facts = json.loads(run("inspect", path, "--json").stdout)
    assert facts["layers_in_words"] == words and facts["layers_by_kind"] == {"bounded": 2, "recurrent": 2}
    assert facts["kv_heads"] == 2 and facts["kv_bytes_per_1024"] == 1024 * 2 * 2 * (32 + 32) * 2
    shown = run("inspect", path).stdout
    assert f"possible: {words}" in shown and "--engine native` can make one; not --engine torch: it has recurrent layers" in " ".join(shown.split())
