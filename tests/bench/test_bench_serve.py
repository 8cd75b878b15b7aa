"""Measuring servers: what is counted, and a short run of each measurement where there is a server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from indexmem_edge.bench.serve import actions, client, load, outlive, rates
from indexmem_edge.native.find import program

SERVER = program("llama-server")
built = pytest.mark.skipif(SERVER is None, reason="the server has not been built (make server)")


def test_a_row_of_rates() -> None:
    answers = [client.Answer("x", evaluated=10 * i, cached=0, generated=5, first=float(i), seconds=9.0) for i in range(1, 5)]
    row = rates._row(2, "stock", answers, seconds=8.0, rss=7)
    assert (row["requests_per_s"], row["tokens_per_s"], row["evaluated"], row["rss_bytes"]) == (0.5, 2.5, 25, 7)
    assert (row["first_s"], row["first_p95_s"]) == (2.5, 4.0)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    kind = client.Kind("broken", Path(sys.executable), ("-c", ""))
    with pytest.raises(client.ServerError, match="broken"), client.running(kind, tmp_path / "no model", 1):
        pass


def test_a_server_that_is_gone() -> None:
    with pytest.raises(client.ServerError, match="gone"):
        client.Running(client._free_port(), 0).chat([{"role": "user", "content": "?"}], 1)


def ours() -> client.Kind:
    assert SERVER is not None
    options = ("--kv-budget", "256", "--kv-window", "48", "-ub", "64", "-b", "128")
    return client.Kind("ours", SERVER, options)


@built
def test_actions(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "DOCUMENT", 2000)
    monkeypatch.setattr(actions, "ANSWER", 4)
    report = actions.run_actions([ours()], demo_model, 2, 1, {})
    evaluated = {row["action"]: row["evaluated"] for row in report.rows}
    assert next(iter(evaluated)) == "the document and a question" and len(evaluated) == 8
    whole = evaluated["the document and a question"]
    assert whole > 300 and all(evaluated[a] <= 64 for a in ("another answer", "the next question", "that question edited"))
    assert evaluated["another question about the same document"] <= 2 * 64


@built
def test_rates(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "START", 600)
    monkeypatch.setattr(rates, "ANSWER", 3)
    report = rates.run_rates([ours()], demo_model, 2, [1, 2], 2, 1, {})
    assert [row["conversations"] for row in report.rows] == [1, 2]
    for row in report.rows:
        assert 0 < row["first_s"] <= row["first_p95_s"] and row["requests_per_s"] > 0 and row["evaluated"] > 20


def test_names_are_told_apart() -> None:
    names = load.Names()
    first, second = names.draw(), names.draw()
    assert first != second and names.others(first, f"{first} or {second}") == [second] and names.others(first, first) == []


def test_what_is_read_again_and_what_grows_is_missed() -> None:
    def turn(at: float, evaluated: int, mixed: bool = False) -> load.Turn:
        return load.Turn(at, new=50, evaluated=evaluated, own=True, mixed=mixed, first=1.0)

    steady = [(0.0, 90), (1.0, 100), (2.0, 101)]
    assert [v.ok for v in load._verdicts([turn(1, 51), turn(2, 60)], steady)] == [True, True, True, None]
    assert [v.ok for v in load._verdicts([turn(1, 51), turn(2, 600, mixed=True)], [*steady, (2.0, 110)])][:3] == [False, False, False]
    rows = load._rows([turn(1, 51), turn(9, 600)], steady, 10.0)
    assert [(row["until_s"], row["turns"], row["again"]) for row in rows] == [(1.0, 1, 0), (9.0, 1, 1)]


@built
def test_more_conversations_than_slots(demo_model: Path) -> None:
    """Nobody's text is read twice or told to another."""
    kind = client.Kind("ours", ours().program, (*ours().options, "-np", "2", "--cache-ram", "200"))
    report = load.run_load(kind, demo_model, 2, conversations=5, turns=4, seconds=6, meta={})
    mixed, again, *_, same = report.verdicts
    assert sum(row["turns"] for row in report.rows) >= 5
    assert (mixed.value, again.value) == (0, 0) and same.ok


@built
def test_saved_conversations_outlive_a_server_that_is_killed(demo_model: Path) -> None:
    report = outlive.run_outlive(client.Kind("ours", ours().program, (*ours().options, "-np", "2")), demo_model, 2, 2, {})
    assert [row["slot"] for row in report.rows] == [0, 1]
    assert all(row["seen"] > 256 and not row["mixed"] for row in report.rows)
    assert any(row["evaluated"] <= row["new"] + 64 for row in report.rows)  # all, but for answers that are spelled with other tokens


@built
def test_what_a_server_refuses_is_an_error(demo_model: Path) -> None:
    with client.running(ours(), demo_model, 1) as server, pytest.raises(client.ServerError, match="answered 4"):
        server.chat([{"role": "nobody", "content": 7}], 1)


def test_room_grows_with_the_conversations_where_the_cache_does() -> None:
    stock, ours = (client.Kind("x", Path("x"), ("--a",), context) for context in (8192, 0))
    assert stock.with_slots(4).options == ("--a", "-np", "4", "-c", "32768") and ours.with_slots(4).options == ("--a", "-np", "4")
