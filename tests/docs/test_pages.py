"""Pages that are generated are those that the code would make now, and what pages say of options is so."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

import indexmem_edge
from indexmem_edge.native import find

pytest.importorskip("indexmem_edge.bench", reason="pages are made from the installed package")
if find.library_file() is None:
    pytest.skip("the native library has not been built", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs" / "tools"))

import cli_page
import guide_page
import write

Tiny = Callable[..., tuple[Path, Any]]


@pytest.mark.parametrize("name", write.PAGES)
def test_generated_pages_are_up_to_date(name: str) -> None:
    kept = (write.DOCS / name).read_text(encoding="utf-8")
    assert kept == write.PAGES[name](), f"docs/{name} is out of date: run make pages"


def test_the_reference_has_every_public_name() -> None:
    page = (write.DOCS / "api.md").read_text(encoding="utf-8")
    for name in set(indexmem_edge.__all__) - {"llama_cpp"}:
        assert re.search(rf"^#+ {name}$|^\| `{name}` \|", page, flags=re.M), name
    assert "indexmem_edge.llama_cpp" in page


def test_the_command_reference_has_every_command_and_option() -> None:
    page = (write.DOCS / "cli.md").read_text(encoding="utf-8")
    commands = dict(cli_page.commands())
    assert {"indexmem chat", "indexmem train", "indexmem bench quality"} <= set(commands)
    for path, command in commands.items():
        section = page.partition(f"\n## {path}\n")[2].partition("\n## ")[0]
        assert section, path
        for parameter in command.params:
            if parameter.param_type_name == "option" and not cli_page.hidden(parameter):
                assert all(f"`{name}" in section for name in parameter.opts), f"{path} {parameter.opts}"


def test_options_that_pages_name_exist() -> None:
    known = {
        name for _, command in cli_page.commands() for p in command.params for name in (*p.opts, *p.secondary_opts)
    }
    known |= {"--help", "--version", "--parallel", "--kv-budget-draft"}  # the last two are llama-server's
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if page.name in ("serve.md", "server-tests.md"):
            continue  # names llama-server's
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"^ {4}indexmem.*$|`indexmem[^`]*`|`--[a-z][^`]*`", text, flags=re.M):
            if line.strip("` ").startswith("indexmem serve"):
                continue  # it takes llama-server's
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line.partition("# ")[0]):
                assert option in known, f"{page.name}: {line.strip()} names {option}"


def bounded(model: Path, **options: Any) -> int:
    """Bytes of keys and values of a `Llama` with a budget, windows included."""
    options = {"kv_policy": "streaming", "kv_window": 32, "verbose": False, **options}
    with closing(indexmem_edge.Llama(model, **options, n_batch=options["n_ubatch"])) as llm:
        stats = llm.kv_stats()
        assert stats.kv_bytes is not None
        return stats.kv_bytes + stats.window_bytes


@pytest.mark.parametrize("budget, ubatch", [(200, 32), (1024, 512), (700, 256)])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_bytes_of_the_guide_are_those_of_the_library(tiny: Tiny, budget: int, ubatch: int, cache_type: str) -> None:
    path, config = tiny("llama")
    shape = guide_page.Shape("tiny", config.n_layer, config.n_head_kv, config.head_dim)
    number = GGMLQuantizationType[cache_type.upper()].value
    found = bounded(path, kv_budget=budget, n_ubatch=ubatch, type_k=number, type_v=number)
    assert found == shape.bounded_bytes(budget, cache_type, ubatch)


@pytest.mark.parametrize("budget, ubatch", [(200, 32), (1024, 512)])
def test_bytes_of_models_with_windows(tiny: Tiny, budget: int, ubatch: int) -> None:
    path, config = tiny("gemma3")
    shape = guide_page.Shape(
        "tiny", config.n_layer, config.n_head_kv, config.head_dim, config.sliding_window, len(config.full_layers)
    )
    assert shape.window and 0 < shape.bounded < shape.layers
    assert bounded(path, kv_budget=budget, n_ubatch=ubatch) == shape.bounded_bytes(budget, ubatch=ubatch)


def test_bytes_of_the_demo_model(demo_model: Path) -> None:
    shape = guide_page.SHAPES[0]
    assert "demo" in shape.name
    for budget in (256, 1024):
        with closing(indexmem_edge.Llama(demo_model, kv_budget=budget, kv_layer_budgets="equal", verbose=False)) as llm:
            assert llm.kv_stats().kv_bytes == shape.bounded_bytes(budget)
        with closing(indexmem_edge.Llama(demo_model, kv_budget=budget, verbose=False)) as llm:
            assert llm.kv_stats().kv_bytes <= shape.bounded_bytes(budget)  # its sidecar divides them by need
    with closing(indexmem_edge.Llama(demo_model, n_ctx=2048, verbose=False)) as llm:
        assert llm.kv_stats().kv_bytes == shape.unbounded_bytes(2048)
