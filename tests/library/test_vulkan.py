"""A build with the Vulkan backend: the bounded cache lies on the device, and what it keeps is what the CPU keeps.

`make test-vulkan` runs it on Mesa's device in software; elsewhere there is none and it is skipped.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

import indexmem_edge
from indexmem_edge import llama_cpp
from indexmem_edge.cli import doctor
from indexmem_edge.native import api, find

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

TEXT = "The tide comes in and the tide goes out, and the old boat waits. " * 14


@pytest.fixture(scope="module")
def device() -> int:
    """Its number among those of ggml."""
    from indexmem_edge.native.ggml import ggml_function

    api.llama_lib.llama_backend_init()
    get = ggml_function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name = ggml_function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    for i in range(ggml_function("ggml_backend_dev_count", ctypes.c_size_t)()):
        if name(get(i)) == b"Vulkan0":
            return i
    pytest.skip("there is no Vulkan device")


def load(model: Path, layers: int, **options: Any) -> Any:
    defaults = {"kv_budget": 160, "kv_window": 32, "n_ubatch": 64, "indexmem": "off", "op_offload": False, "verbose": False}
    return indexmem_edge.Llama(str(model), n_gpu_layers=layers, **{**defaults, **options})


def test_doctor_says_what_lies_there(device: int) -> None:
    assert not api.library().indexmem_device_supported(device)
    said = doctor._backends()[0].found
    assert "bounded caches lie there with full, streaming, random, knorm, keydiff, tova, snapkv, expected, indexer; else in host memory" in said


@pytest.mark.parametrize("type_kv", [llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_Q8_0])
def test_it_keeps_what_the_cpu_keeps(device: int, demo_model: Path, type_kv: int) -> None:
    kept, answers = [], []
    for layers in (0, -1):
        with load(demo_model, layers, kv_policy="streaming", type_k=type_kv, type_v=type_kv) as llm:
            tokens = llm.tokenize(TEXT.encode())
            llm.eval(tokens)
            assert llm.kv_stats().evicted > 0
            kept.append([[held.tolist() for held in heads] for heads in llm.kv_snapshot().values()])
            answers.append(llm.create_completion(TEXT, max_tokens=8, temperature=0)["choices"][0]["text"])
    assert kept[0] == kept[1]
    assert answers[0] == answers[1]
