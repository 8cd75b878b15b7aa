"""Slots are means of groups of entries: exact where a group is one entry or the same one several times."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from conftest import Tiny
from indexmem_edge.bench.quality import ceiling
from indexmem_edge.bench.quality.slots import Held, groups, slots_of
from indexmem_edge.train.model.load import load_decoder


def _attention(q: torch.Tensor, held: Held) -> torch.Tensor:
    s = q @ held.k.mT
    if held.bias is not None:
        s = s + held.bias[:, None]
    return s.softmax(-1) @ held.v


def test_a_slot_for_each_entry_is_what_the_entries_are() -> None:
    k, v, q = torch.randn(3, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_attention(q, slots_of(k, v, 9)), _attention(q, Held(k, v)))


@pytest.mark.parametrize("n_slots", [3, 5])
def test_the_same_entry_several_times_is_one_slot(n_slots: int) -> None:
    """With more slots than different entries some are left with nothing, and are not attended to."""
    k, v = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([0, 1, 0, 0, 2, 1, 0])
    q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
    slots = slots_of(k[:, order], v[:, order], n_slots)
    assert slots.k.shape == (2, n_slots, 4) and slots.bias is not None and not slots.k.isnan().any()
    assert slots.bias.exp().sum(-1).round().tolist() == [7, 7]
    torch.testing.assert_close(_attention(q, slots), _attention(q, Held(k[:, order], v[:, order])))


def test_groups_are_those_of_keys_that_lie_together() -> None:
    centres = torch.tensor([[[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]])
    belongs = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 0])
    k = centres[:, belongs] + 0.1 * torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(3))
    found = groups(k, torch.ones(1, 9), 3)[0].tolist()
    assert len(set(zip(found, belongs.tolist()))) == 3 == len(set(found))


def test_weights_move_the_means_and_not_the_number() -> None:
    k, v = torch.zeros(1, 2, 3), torch.tensor([[[1.0], [5.0]]])
    slots = slots_of(k, v, 1, torch.tensor([[3.0, 1.0]]))
    assert slots.v.item() == pytest.approx(2.0, abs=1e-4) and slots.bias is not None and slots.bias.exp().item() == pytest.approx(2)
    assert slots_of(k, v, 1, torch.zeros(1, 2)).v.item() == pytest.approx(3.0)  # nothing is looked at: as if all alike


@pytest.mark.parametrize("among", ceiling.SLOTS)
def test_a_cache_with_slots(tiny: Tiny, among: str) -> None:
    """As many rows as without; as many slots as entries that left, of one more row than can be kept, answer like everything."""
    decoder = load_decoder(tiny("llama")[0], torch.float32)
    tokens = list(range(5, 45))
    asked = ceiling.Question(tokens[:6], tokens[6:10], [(0, 4)])
    with torch.no_grad():
        contexts = ceiling.read_context(decoder, tokens)
        _, whole, mass = ceiling.ask(decoder, ceiling.everything(contexts), 40, asked)
        cache = ceiling.compress(contexts, mass, 20, (), ceiling.Slots(2, among), mass)
        assert all(held.k.shape[1] == held.v.shape[1] == 20 for held in cache)
        assert all(held.bias is not None and held.bias[:, :18].abs().max() == 0 for held in cache)
        left = sum(float(held.bias[0].exp().sum()) for held in cache if held.bias is not None) / len(cache)
        assert left == pytest.approx(18 + 8 if among == "next" else 40)
        assert ceiling.ask(decoder, cache, 40, asked)[1] > 0
        nothing_left = ceiling.compress(contexts, mass, 40, (), ceiling.Slots(2, among), mass)
        assert all(held.bias is None for held in nothing_left)
    assert whole > 0
