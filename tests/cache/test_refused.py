"""What a bounded cache is refused for: the error names the model or the setting, and nothing is left behind."""

from __future__ import annotations

import pytest

from conftest import Tiny
from indexmem_edge import Llama, llama_cpp
from indexmem_edge.errors import BudgetError, ContextError
from indexmem_edge.native import api
from support.architectures import REFUSED_YET, TABLE
from support.native_context import Q8_0, Context, Refused, open_model
from tiny.models import REFUSED, SUPPORTED

REASONS = {"grok": "soft cap", "mamba": "recurrent", "bloom": "ALiBi", "t5": "encoder", "llama-embed": "without a cache"}
assert REASONS.keys() == REFUSED.keys()
REASONS |= {name: str(TABLE[name].reason) for name in REFUSED_YET}


@pytest.mark.parametrize("name", REASONS)
def test_models_that_cannot_be_bounded(tiny: Tiny, name: str) -> None:
    path, config = tiny(name)
    arch = config.arch
    with open_model(path) as model:
        reason = api.model_unsupported_reason(model)
        assert reason is not None and arch in reason and REASONS[name] in reason
        with pytest.raises(Refused, match=REASONS[name]):
            Context(model, budget=64)
        Context(model).close()  # without a budget the model is as usable as ever


def test_images_in_the_last_layer(tiny: Tiny) -> None:
    """Such a file ends the process where llama.cpp makes a graph of it; that of real models is the first few."""
    path, _ = tiny("qwen3vlmoe", metadata=(("n_deepstack_layers", 2),))
    with open_model(path) as model:
        assert "parts of images in its last layer" in str(api.model_unsupported_reason(model))
        with pytest.raises(Refused, match="parts of images in its last layer"):
            Context(model, budget=64, n_seq=3)


@pytest.mark.parametrize("arch", SUPPORTED)
def test_models_with_it(tiny: Tiny, arch: str) -> None:
    path, _ = tiny(arch)
    with open_model(path) as model:
        assert api.model_unsupported_reason(model) is None


def test_settings(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    with open_model(path) as model:
        with pytest.raises(Refused, match="flash attention"):
            Context(model, budget=64, flash_attn=False)
        with pytest.raises(BudgetError, match="at least 13 are needed"):
            Context(model, budget=12)
        with pytest.raises(BudgetError, match="unknown policy 'best'; there are: full, streaming"):
            Context(model, budget=64, policy="best")


def test_a_cache_type_that_does_not_fit_the_heads(tiny: Tiny) -> None:
    path, _ = tiny("llama", head_dim=16, n_head=4, n_head_kv=2)
    with pytest.raises(ContextError, match="block size 32 does not divide"):
        Llama(path, kv_budget=64, kv_window=8, type_k=Q8_0, type_v=Q8_0, verbose=False)
    with open_model(path) as model, Context(model) as unbounded:
        assert not api.is_bounded(unbounded.ctx), "the request outlived the failure"


def test_a_request_is_for_one_context_only(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    with open_model(path) as model:
        with Context(model, budget=64) as bounded:
            assert api.is_bounded(bounded.ctx)
        with Context(model) as unbounded:
            assert not api.is_bounded(unbounded.ctx)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = 64
        ctx = llama_cpp.llama_init_from_model(model, params)
        assert not api.is_bounded(ctx)
        llama_cpp.llama_free(ctx)


def test_what_llama_refuses_is_told(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    with open_model(path) as model:
        with pytest.raises(Refused, match="llama.cpp refused the context before it came to the bounded KV cache"):
            Context(model, budget=64, type_v=Q8_0, flash_attn=False)
        assert api.last_error_kind() == api.ERROR_NONE  # withdrawn
    with pytest.raises(ContextError, match="n_batch and n_ubatch cannot both be zero"):
        Llama(path, kv_budget=64, kv_window=8, n_batch=0, n_ubatch=0, verbose=False)
