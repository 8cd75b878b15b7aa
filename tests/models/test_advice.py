"""What is advised of rows that fit, and what of models that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from indexmem_edge.models.advice import advise, command, worth_measuring
from indexmem_edge.models.fit import Fit, Memory, Row
from indexmem_edge.models.measure import Speed
from indexmem_edge.runtime.sizes import Sizes

GIB = 1 << 30


def row(budget: int, cache_type: str = "f16", fits: bool = True, exact: int = 0, total: int = 3 * GIB, write: float = 0.0) -> Row:
    sizes = Sizes(kv=GIB, budget=budget, slots=budget, exact=exact or budget, model=2 * GIB)
    return Row(cache_type, budget, fits, total, sizes, speed=Speed(100.0, 512, write, budget, True) if write else None)


def found(*rows: Row, **more: object) -> Fit:
    usual = Fit("m.gguf", 2 * GIB, "a model", 131072, Memory(4 * GIB), 100 << 20, rows, sidecar="m.indexmem.gguf")
    return replace(usual, **more)  # type: ignore[arg-type]


def test_the_largest_that_fits() -> None:
    rows = row(1024), row(4096), row(8192, fits=False), row(0, exact=2048)
    advised = advise(found(*rows))
    assert advised.row is rows[1] and "the largest budget that fits into 4.00 GiB" in advised.why
    assert advised.command == ("indexmem", "chat", "-m", "m.gguf", "--kv-budget", "4096", "--indexmem", "m.indexmem.gguf")
    assert "without a budget" not in advised.why
    longer = advise(found(*rows[:3], row(0, exact=9000), row(0, "q4_0", exact=30000)))
    assert longer.row is rows[1] and longer.why.endswith("; without a budget 9,000 tokens fit, and there it ends")


def test_q8_0_where_it_holds_more_and_q4_0_only_for_want_of_others() -> None:
    rows = row(4096), row(7680, "q8_0"), row(16384, "q4_0")
    advised = advise(found(*rows, sidecar=None))
    assert advised.row is rows[1] and "q8_0, which holds about twice as much" in advised.why
    assert advised.command[4:] == ("--kv-budget", "7680", "-ctk", "q8_0", "-ctv", "q8_0")
    assert advise(found(row(4096), row(4096, "q8_0"))).row == row(4096)
    last = advise(found(row(1024, fits=False), row(1024, "q8_0", fits=False), row(1024, "q4_0")))
    assert last.row == row(1024, "q4_0") and "as nothing else fits" in last.why


def test_the_trained_length_is_said_where_it_is_what_ends() -> None:
    advised = advise(found(row(4096), row(7680), trained=8192))
    assert "the largest budget below the 8,192 tokens that the model was trained for" in advised.why


@pytest.mark.parametrize("speeds, best", [((20, 12, 11), 16384), ((20, 12, 5), 4096), ((20, 9, 5), 1024), ((20, 0, 5), 1024), ((0, 0, 5), 16384), ((0, 0, 0), 16384)])
def test_a_budget_that_writes_at_less_than_half_the_speed_is_not_advised(speeds: tuple[float, ...], best: int) -> None:
    rows = [row(budget, write=write) for budget, write in zip((1024, 4096, 16384), speeds)]
    advised = advise(found(*rows))
    assert advised.row is not None and advised.row.budget == best
    assert ("more slowly than half of the 20.0 tokens/s with 1,024" in advised.why) == (best != 16384)


def test_none_where_none_is_possible() -> None:
    refused = found(row(0, exact=32768, fits=False), row(0, exact=4096), refused="ALiBi")
    advised = advise(refused)
    assert advised.row == row(0, exact=4096) and "ALiBi" in advised.why and "4,096 tokens, as much of 131,072 as fits" in advised.why
    assert advised.command[4:] == ("--kv-budget", "0", "-c", "4096")
    assert worth_measuring(refused) == (row(0, exact=4096),)
    encoder = advise(replace(refused, generates=False))
    assert encoder.row is None and "does not generate text" in encoder.why


def test_what_does_not_fit_at_all() -> None:
    advised = advise(found(row(256, fits=False, total=5 * GIB), row(1024, fits=False, total=6 * GIB)))
    assert (advised.row, advised.short_by, advised.largest_file) == (None, GIB, GIB)
    assert "with a budget of 256 (f16) it takes 5.00 GiB, 1.00 GiB more than there is; a file of the same model of at most 1.00 GiB" in advised.why
    advised = advise(found(row(256, fits=False, total=9 * GIB)))
    assert advised.largest_file == 0 and "no file of this model would, however small" in advised.why
    impossible = advise(found(Row("f16", 1024, why_not="no such thing"), Row("q8_0", 1024, why_not="nor this")))
    assert impossible.row is None and impossible.why == "no such thing; nor this"


def test_what_is_measured_first() -> None:
    rows = row(1024), row(2048), row(4096), row(8192), row(16384, fits=False), row(0, exact=99), row(1024, "q8_0")
    assert worth_measuring(found(*rows)) == (rows[3], rows[0], rows[2], rows[5])
    assert worth_measuring(found(rows[0])) == (rows[0],)
    assert worth_measuring(found(rows[4])) == ()


def test_no_checkpoints_are_part_of_the_command() -> None:
    assert command(found(copies=0), row(1024))[6:8] == ("--kv-checkpoints", "0")
