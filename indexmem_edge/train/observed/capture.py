"""The operands of attention, copied out of the graph of a bounded cache while llama.cpp computes it."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from ...calibrate.capture import Array, Callback, Tensor as Node
from ..model.attention import Heads, Look

_HIDDEN = re.compile(rb"indexmem_hidden-(\d+)")  # the node that shows what an indexer reads (indexmem-scoring.cpp)
_ENTRIES = re.compile(rb"bounded_k_l(\d+)")
_ATTEND = 4  # enum indexmem_op


@dataclass
class _Layer:
    """What was seen of one in this text."""

    hidden: Optional[Tensor] = None
    queries: list[Tensor] = field(default_factory=list)  # of the layer and of those that read its entries, [Hq, T, D]
    sinks: list[Tensor] = field(default_factory=list)


class HeadsCapture(Callback):
    """Shows `look` the operands of each bounded layer as soon as all layers that read its entries have attended.

    How many do is not known before a first text has been through (`readers`): until then nothing is shown. Queries of several
    layers stand side by side in each group, as if they were more heads of the first.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.look: Optional[Look] = None
        self.readers: Counter[int] = Counter()  # by the layer that has the entries
        self.sizes: dict[int, tuple[int, int]] = {}  # of each layer: KV heads, size of a key
        self._known = False
        self._layers: dict[int, _Layer] = {}

    def begin(self, look: Optional[Look]) -> None:
        """Before each text; the first one is only looked at for what there is."""
        self._known = bool(self.readers)
        self.look, self._layers = look, {}

    def wants(self, tensor: Node) -> bool:
        return _HIDDEN.fullmatch(tensor.name) is not None or self._operands_of(tensor) is not None

    def take(self, tensor: Node) -> None:
        if shown := _HIDDEN.fullmatch(tensor.name):
            hidden = self._tensor(self.read(tensor).reshape(-1, tensor.ne[0]))
            self._layers.setdefault(int(shown[1]), _Layer()).hidden = hidden
            return
        found = self._operands_of(tensor)
        assert found is not None
        number, scale, softcap, sinks = found
        q, k = tensor.src[0].contents, tensor.src[1].contents
        n_kv = int(k.ne[2] * k.ne[3])
        layer = self._layers.setdefault(number, _Layer())
        if layer.hidden is None:
            raise ValueError(f"layer {number} attends before it is known what it reads")
        if not self._known:
            self.readers[number] += 1
            self.sizes[number] = n_kv, int(k.ne[0])
            return
        queries = self._tensor(self.read(q).reshape(-1, q.ne[1], q.ne[0]))
        layer.queries.append(queries * scale)  # which may differ among those that read the same entries
        if sinks is not None:
            layer.sinks.append(self._tensor(self.read(sinks).reshape(-1)))
        if len(layer.queries) < self.readers[number]:
            return
        del self._layers[number]
        keys, values = (self._entries(tensor.src[i].contents, n_kv, queries.shape[1]) for i in (1, 2))
        if self.look is not None:
            self.look(
                Heads(
                    number,
                    layer.hidden[None],
                    _side_by_side(layer.queries, n_kv)[None],
                    keys[None],
                    values[None],
                    1.0,
                    softcap=softcap,
                    sinks=_side_by_side(layer.sinks, n_kv) if layer.sinks else None,
                )
            )

    def _operands_of(self, tensor: Node) -> Optional[tuple[int, float, float, Optional[Node]]]:
        """If a node attends to the entries of a bounded cache: the layer that has them, scale, soft cap, sinks."""
        op = self._op(ctypes.byref(tensor))
        if op == b"FLASH_ATTN_EXT":
            first, at_scale, at_softcap, at_sinks = None, 0, 2, 4
        elif op == b"INDEXMEM":
            first, at_scale, at_softcap, at_sinks = _ATTEND, 3, 4, 5
        else:
            return None
        if first is not None and tensor.op_params[0] != first:
            return None
        entries = tensor.src[1].contents
        cell = _ENTRIES.fullmatch(entries.view_src.contents.name if entries.view_src else b"")
        if cell is None:
            return None  # of a window
        numbers = np.frombuffer(tensor.op_params, np.float32)
        sinks = tensor.src[at_sinks].contents if tensor.src[at_sinks] else None
        return int(cell[1]), float(numbers[at_scale]), float(numbers[at_softcap]), sinks

    def _entries(self, tensor: Node, n_head_kv: int, n: int) -> Tensor:
        """The first n rows of keys or values, [H, n, D]."""
        return self._tensor(self.read(tensor).reshape(n_head_kv, -1, tensor.ne[0])[:, :n])

    def _tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.device)


def _side_by_side(parts: list[Tensor], n_head_kv: int) -> Tensor:
    """Query heads of several layers, [Hq, ...] each, those of each KV head together."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([t.unflatten(0, (n_head_kv, -1)) for t in parts], dim=1).flatten(0, 1)
