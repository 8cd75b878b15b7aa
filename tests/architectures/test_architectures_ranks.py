"""Who is evicted first, in each layer and head of any model. By policies that ask how much attention an entry gets,
those that get least in llama.cpp's own softmax, sinks and soft caps and all; by an indexer, those of least rank.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge.calibrate.capture import Callback, Tensor
from indexmem_edge.native import api
from reference.indexers import random_indexer, write_sidecar
from reference.mirror import BARE, EXACT, SETTINGS
from support.architectures import BOUNDED
from support.comparing import tokens_of
from support.each_architecture import bounded_layers
from support.native_context import F32, Capture, Context, open_model

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
    for il in bounded_layers(config):
        attention = capture[f"kq_soft_max-{il}"][:, :, :N]
        group = len(attention) // len(held[il])
        for h, positions in enumerate(held[il]):
            least_leave(positions, rank(attention[h * group : (h + 1) * group]), f"layer {il}, head {h}")


def least_leave(positions: np.ndarray, ranks: np.ndarray, where: str) -> None:
    """Of the candidates among N entries those of least rank are not held, but for rounding."""
    candidates = range(SETTINGS["sinks"], N - SETTINGS["window"])
    stays = [p for p in candidates if p in positions]
    leaves = [p for p in candidates if p not in positions]
    assert len(positions) == SETTINGS["budget"] and len(leaves) == N - SETTINGS["budget"]
    wrong = ranks[leaves].max() - ranks[stays].min()
    assert wrong < 1e-3 * np.std(ranks[[*stays, *leaves]]), where


class KeyInputs(Callback):
    """What the keys of each layer are projected from, whatever the model calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, np.ndarray] = {}

    def wants(self, tensor: Tensor) -> bool:
        return self._layer(tensor) is not None

    def take(self, tensor: Tensor) -> None:
        values = self.read(tensor.src[1].contents)
        self.found[int(self._layer(tensor) or 0)] = values.reshape(-1, values.shape[-1]).copy()

    def _layer(self, tensor: Tensor) -> Optional[str]:
        if self._op(ctypes.byref(tensor)) != b"MUL_MAT":
            return None
        weight = re.fullmatch(rb"blk\.(\d+)\.attn_(k|qkv|kv_a_mqa)\.weight", tensor.src[0].contents.name)
        return weight[1].decode() if weight else None


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("variant", ["retention-mlp", "pairwise-mean"])
def test_an_indexer_reads_what_keys_are_made_of(tiny: Tiny, name: str, variant: str, tmp_path: Path) -> None:
    path, config = tiny(name)
    tokens = tokens_of(config, N, seed=5)
    inputs, sidecar = KeyInputs(), tmp_path / "i.gguf"
    with open_model(path) as model:
        with Context(model, **BARE | EXACT | dict(n_ubatch=N), capture=inputs) as stock:
            stock.decode(tokens)
        with Context(model, **SETTINGS) as c:
            n_head_kv = max(api.n_head_kv(c.ctx, il) for il in bounded_layers(config))
        indexer = random_indexer(variant, config.n_layer, config.n_embd, n_head_kv, 0)
        indexer = write_sidecar(sidecar, indexer, "f32", architecture=config.arch)
        with Context(model, **SETTINGS | ONE_UBATCH | dict(policy="indexer", sidecar=sidecar)) as c:
            c.decode(tokens)
            held = c.positions()
    for il in bounded_layers(config):
        state, queries = indexer.state(il, inputs.found[il]), indexer.queries(il, inputs.found[il])
        for h, positions in enumerate(held[il]):
            ranks = indexer.rank(state[:, h % state.shape[1]], np.arange(N), N - 1, queries)
            least_leave(positions, ranks, f"layer {il}, head {h}")
