"""Where there can be no span: asked for, it is refused with the reason; the default gives way and tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import Tiny
from indexmem_edge.errors import BudgetError
from indexmem_edge.native import api
from reference.memories import random_residual, write_memory_sidecar
from support.comparing import tokens_of
from support.native_context import F16, F32, Q4_0, Q8_0, Context, Refused, open_model
from tiny.models import UNROTATABLE

SETTINGS: dict[str, Any] = dict(budget=32, sinks=3, window=7, n_ubatch=24)


def falls_back(model: Any, tokens: list[int], reason: str, **arguments: Any) -> None:
    """By default such a context works as one without a span, and says why it has none."""
    with Context(model, **arguments) as c, Context(model, **arguments, span=0) as free:
        assert c.stats().span == 0 and reason in c.span_reason()
        assert free.span_reason() == ""
        assert (c.feed(tokens, 24) == free.feed(tokens, 24)).all()
        assert (c.stats().n_rebases, c.stats().next_position) == (0, len(tokens))


@pytest.mark.parametrize("type_k", [Q4_0, 3, 6], ids=["q4_0", "q4_1", "q5_0"])
def test_types_of_keys(tiny: Tiny, type_k: int) -> None:
    path, config = tiny("llama", n_ctx_train=64)
    arguments = SETTINGS | dict(type_k=type_k, type_v=F16)
    with open_model(path) as model:
        with pytest.raises(Refused, match=r"keys of type q\d_\d .*use f16 or q8_0 for K"):
            Context(model, **arguments, span=100)
        falls_back(model, tokens_of(config, 100), "keys of type q", **arguments)


@pytest.mark.parametrize("types", [(F16, Q4_0), (F32, F16), (Q8_0, Q4_0), (F16, Q8_0)], ids=str)
def test_values_may_be_of_any_type(tiny: Tiny, types: tuple[int, int]) -> None:
    path, config = tiny("llama", n_ctx_train=64)
    with open_model(path) as model, Context(model, **SETTINGS, type_k=types[0], type_v=types[1]) as c:
        c.feed(tokens_of(config, 100), 24)
        assert c.stats().span == 64 and c.stats().n_rebases > 0


def test_a_residual_memory(tiny: Tiny, tmp_path: Path) -> None:
    path, config = tiny("llama", n_ctx_train=64)
    write_memory_sidecar(tmp_path / "m.gguf", random_residual(2, 64), n_embd=config.n_embd, n_head_kv=config.n_head_kv)
    arguments = SETTINGS | dict(sidecar=tmp_path / "m.gguf")
    with open_model(path) as model:
        with pytest.raises(Refused, match="the memory 'residual' .*: use another memory, or a span of 0"):
            Context(model, **arguments, span=100)
        falls_back(model, tokens_of(config, 100), "the memory 'residual'", **arguments)
        with Context(model, **arguments, memory="off") as c:
            assert c.stats().span == 64


@pytest.mark.parametrize("span", [1, 55])
def test_a_span_without_room(tiny: Tiny, span: int) -> None:
    """Budget and a ubatch have to fit: 32 and 24."""
    path, config = tiny("llama", n_ctx_train=55)
    with open_model(path) as model:
        with pytest.raises(Refused, match=f"of 32 and a ubatch of 24 do not fit a span of {span} .*lower one of them"):
            Context(model, **SETTINGS, span=span)
        falls_back(model, tokens_of(config, 100), "do not fit a span of 55", **SETTINGS)
        with Context(model, **SETTINGS, span=56) as c:
            c.feed(tokens_of(config, 100), 24)
            assert c.stats().n_rebases > 0


def test_a_span_out_of_range(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    with open_model(path) as model:
        with pytest.raises((Refused, BudgetError), match="at most 2147483647"):
            Context(model, **SETTINGS, span=2**31)
        with Context(model, **SETTINGS, span=2**31 - 1) as c:
            assert c.stats().span == 2**31 - 1


@pytest.mark.parametrize("arch", UNROTATABLE)
def test_keys_that_are_not_rotated_last(tiny: Tiny, arch: str) -> None:
    """What is done to them between the rotation and the cache is named."""
    path, config = tiny(arch, n_ctx_train=64)
    with open_model(path) as model:
        reason = "layer 0 cannot get new positions: its keys go through MUL after their rotation"
        with pytest.raises(Refused, match=f"{reason}: use a span of 0"):
            Context(model, **SETTINGS, span=100)
        assert api.last_error_kind() == api.ERROR_NONE  # withdrawn
        falls_back(model, tokens_of(config, 100), reason, **SETTINGS)


def test_the_reason_is_not_that_of_another_context(tiny: Tiny) -> None:
    path, _ = tiny("llama", n_ctx_train=64)
    with open_model(path) as model, Context(model, **SETTINGS) as spanned, Context(model) as unbounded:
        with Context(model, **SETTINGS | dict(type_k=Q4_0, type_v=Q4_0)) as without:
            assert "q4_0" in without.span_reason()
            assert spanned.span_reason() == unbounded.span_reason() == ""
