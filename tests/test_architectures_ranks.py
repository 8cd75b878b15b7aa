"""Who is evicted first by policies that ask how much attention an entry gets: in each layer and head of any model those
that get least in llama.cpp's own softmax, sinks and soft caps and all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from architectures import BOUNDED
from conftest import Tiny
from mirror import BARE, EXACT, SETTINGS
from native_context import F32, Capture, Context, open_model
from test_architectures import bounded_layers
from test_bounded import tokens_of

N = 64  # tokens, in one ubatch
Rank = Callable[[np.ndarray], np.ndarray]
ONE_UBATCH = dict(n_ubatch=N, evict_step=1, type_k=F32, type_v=F32)


def tova(attention: np.ndarray) -> np.ndarray:
    """[G, T, n] -> [n]: that of the newest token."""
    return attention[:, -1].mean(axis=0)


def snapkv(attention: np.ndarray) -> np.ndarray:
    """That of the last 32, averaged over 7 neighbours."""
    each = attention[:, -32:].mean(axis=(0, 1))
    return np.array([each[max(0, i - 3) : i + 4].mean() for i in range(len(each))])


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("rank", [tova, snapkv], ids=lambda rank: rank.__name__)
def test_what_gets_least_attention_leaves(tiny: Tiny, name: str, rank: Rank) -> None:
    path, config = tiny(name)
    tokens = tokens_of(config, N, seed=4)
    capture = Capture("kq_soft_max-")
    settings = SETTINGS | ONE_UBATCH | dict(policy=rank.__name__)
    with open_model(path) as model:
        with Context(model, **BARE | EXACT | dict(n_ubatch=N), capture=capture) as stock:
            stock.decode(tokens)
        with Context(model, **settings) as c:
            c.decode(tokens)
            held = c.positions()
    candidates = range(settings["sinks"], N - settings["window"])
    for il in bounded_layers(config):
        attention = capture[f"kq_soft_max-{il}"][:, :, :N]
        group = len(attention) // len(held[il])
        for h, positions in enumerate(held[il]):
            ranks = rank(attention[h * group : (h + 1) * group])
            stays = [p for p in candidates if p in positions]
            leaves = [p for p in candidates if p not in positions]
            assert len(positions) == settings["budget"] and len(leaves) == N - settings["budget"]
            wrong = ranks[leaves].max() - ranks[stays].min()
            assert wrong < 1e-3 * np.std(ranks[[*stays, *leaves]]), f"layer {il}, head {h}"
