"""`llama_memory_seq_pos_min`: from behind that position on a sequence can be cut. llama-server decides by it whether a prompt goes
on from what is cached, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conftest import Tiny
from indexmem_edge import llama_cpp
from support.mixed import RECURRENT, Made, each_kind, made  # noqa: F401
from support.native_context import Context, open_model


@pytest.fixture
def plain(tiny: Tiny) -> Iterator[Made]:
    path, config = tiny("llama")
    with open_model(path) as model:
        made = Made.__new__(Made)
        made.model, made.config, made.recurrent, made.window = model, config, False, 0
        yield made


def first(c: Context, seq: int = 0) -> int:
    return int(llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(c.ctx), seq))


def check(made: Made, exact: bool) -> None:
    tokens = made.text(160)
    with made.context(budget=48) as c, made.context(budget=48) as other:
        assert first(c) == -1
        seen, cuts = 0, 0
        for n in (1, 7, 16, 24, 10, 1, 1, 1, 24, 24, 1, 1, 3, 24):
            c.feed(tokens[seen : seen + n], 24)
            seen += n
            start, state = first(c), c.save(0)
            assert 0 <= start < seen and first(c, 1) == -1
            for cut in {start + 1, (start + 1 + seen) // 2, seen}:
                assert other.load(state, 0) and other.seq_rm(0, cut)
                assert other.n_seen() == cut
                cuts += cut < seen
            if exact and start > 0:
                assert other.load(state, 0) and not other.seq_rm(0, start)
        assert c.stats().n_evictions > 2 and (made.recurrent or cuts > 0)


def test_of_a_bounded_cache(plain: Made) -> None:
    check(plain, exact=True)


@each_kind
def test_beside_windows_and_states(made: Made, name: str) -> None:
    check(made, exact=name not in RECURRENT)
