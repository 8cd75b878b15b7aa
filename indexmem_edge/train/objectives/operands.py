"""A sample's way through the frozen model with a full cache, one layer at a time: what objectives of single layers read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..data.sample import Sample
from ..model.attention import Heads, causal
from ..model.decoder import Decoder


@torch.no_grad()  # also as a generator it leaves the caller's gradients on between two layers
def operands(decoder: Decoder, sample: Sample, dtype: torch.dtype | None = None) -> Iterator[tuple[Heads, Tensor]]:
    """The operands of the attention of each bounded layer, and its output with every token kept, [1, Hq, T, D].

    `dtype`: of queries, keys, values and output, and what the output is computed in; else that of the model. Nothing of a
    layer is held once the next one is asked for.
    """
    tokens = torch.from_numpy(sample.tokens).to(decoder.device, torch.long)[None]
    positions = torch.arange(tokens.shape[1], device=decoder.device)
    x = decoder.embed(tokens)
    for il in range(decoder.config.n_layer):
        heads = decoder.heads(il, x, positions)
        if dtype is not None:
            heads = replace(heads, q=heads.q.to(dtype), k=heads.k.to(dtype), v=heads.v.to(dtype))
        attended = causal(heads)
        if il in decoder.config.bounded:
            yield heads, attended
        x = decoder.finish(il, x, attended)
