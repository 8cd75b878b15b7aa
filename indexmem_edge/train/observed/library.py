"""`LibraryModel`: the model of a training, computed by the library that runs it.

It reads a text with a bounded cache that is large enough to keep all of it, beside an indexer that ranks nothing. So an
indexer sees here what it will see in use, whatever the architecture, and what a budget is refused for is refused here.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from indexmem_edge.convert.basemodel import BaseModel
from indexmem_edge.convert.model import Checkpoint, Provenance
from indexmem_edge.convert.writer import write_sidecar

from ...calibrate.passages import TextContext
from ...errors import ModelNotSupported, TrainingError
from ...files.modelfile import check_model_file, loaded_model
from ...native import api
from ...options import CacheOptions
from ...runtime.choice import INDEXER_POLICY
from ..indexers.scorers import Retention
from ..model.attention import Look
from ..model.frozen import Frozen
from .capture import HeadsCapture

_PROBE = 4  # tokens of the text that shows what there is


@dataclass(frozen=True)
class LibraryGeometry:
    """The numbers of `model.frozen.Geometry`."""

    n_layer: int
    n_embd: int
    n_head_kv: int
    head_dim: int
    bounded: tuple[int, ...]


class LibraryModel(Frozen):
    """A model that is loaded in the library. Texts have at most `longest` tokens."""

    def __init__(self, context: TextContext, capture: HeadsCapture, base: BaseModel, bounded: tuple[int, ...], longest: int) -> None:
        self._context, self._capture, self._longest = context, capture, longest
        capture.begin(None)
        context.decode(np.zeros(_PROBE, np.int32))
        if missing := [il for il in bounded if not capture.readers[il]]:
            raise ModelNotSupported(f"the attention of layer {missing[0]} cannot be observed: training cannot learn what it asks for")
        n_head_kv, head_dim = capture.sizes[bounded[0]]
        g = base.geometry
        self._geometry = LibraryGeometry(g.block_count, g.embedding_length, n_head_kv, head_dim, bounded)

    @property
    def geometry(self) -> LibraryGeometry:
        return self._geometry

    @property
    def device(self) -> torch.device:
        return self._capture.device

    @torch.no_grad()
    def observe(self, tokens: Tensor, look: Look) -> None:
        if len(tokens) > self._longest:
            raise TrainingError(f"a text of {len(tokens):,} tokens is to be observed, expected at most {self._longest:,}")
        self._context.clear()
        self._capture.begin(look)
        self._context.decode(tokens.cpu().numpy().astype(np.int32))


def check_bounded(path: Path) -> None:
    """
    Raises:
        ModelNotSupported: no budget can bound the model; the message says why.
        ModelFileError: it does not load.
    """
    with loaded_model(check_model_file(path), dry=True) as loaded:
        if why := api.model_unsupported_reason(loaded):
            raise ModelNotSupported(f"{path} cannot have a bounded KV cache, so nothing can be trained for it: {why}")


@contextlib.contextmanager
def open_library_model(
    path: Path, base: BaseModel, longest: int, device: torch.device, n_threads: Optional[int] = None
) -> Iterator[LibraryModel]:
    """Loads a model, on the devices that llama.cpp takes by itself.

    Args:
        longest: tokens of the longest text. All of a text is evaluated at once, so that one layer after the other is seen.
        device: where what is observed is looked at.

    Raises:
        ModelNotSupported: its attention cannot be observed. Whether a budget can bound it is for `check_bounded` to say.
        ContextError: there is no memory for texts of that length.
    """
    with loaded_model(check_model_file(path), as_used=True, offload=True) as loaded, contextlib.ExitStack() as stack:
        bounded = tuple(il for il, kind in enumerate(api.model_layers(loaded)) if kind & api.LAYER_BOUNDED)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="indexmem-"))
        sidecar = _write_silent(Path(folder) / "silent.indexmem.gguf", base, bounded)
        options = CacheOptions(budget=longest, sidecar=str(sidecar), policy=INDEXER_POLICY, sinks=0, window=1, pin=0, span=0)
        capture = HeadsCapture(device)
        context = TextContext(loaded, longest, longest, n_threads, options, capture)
        stack.callback(context.close)
        yield LibraryModel(context, capture, base, bounded, longest)


def _write_silent(path: Path, base: BaseModel, bounded: tuple[int, ...]) -> Path:
    """A sidecar whose indexer says nothing: it makes the graph show what an indexer reads, and costs next to nothing."""
    g = base.geometry
    constants = Retention.defaults(mid_dim=0)
    state = Retention(g.embedding_length, g.head_count_kv, constants).state_dict()
    layer = {name: np.zeros(t.shape, np.float32) for name, t in state.items() if name != "gate_scale"}
    checkpoint = Checkpoint(
        geometry=g,
        kind=Retention.kind,
        constants=constants,
        layers=[layer if il in bounded else {} for il in range(g.block_count)],
        only=bounded,
        provenance=Provenance("indexmem-edge", ("nothing",), ("0" * 64,)),
        architecture=base.architecture,
    )
    write_sidecar(path, checkpoint, "f32", force=True)
    return path
