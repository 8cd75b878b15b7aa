"""From trained modules to the sidecar that the runtime loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from torch import nn

from indexmem_edge.convert.basemodel import BaseModel
from indexmem_edge.convert.model import Checkpoint, Layer, Provenance
from indexmem_edge.convert.sources import file_sha256
from indexmem_edge.convert.spec import BOOLS, F32S, INDEXERS, MEMORIES, Kind, find

from ..errors import TrainingError
from ..files.untrusted import MAX_TEXT
from .options import TrainOptions
from .parts import Parts

TRAINING_ONLY = "gate_scale"  # ranks do not read it, and only some kinds have a place for it


def to_checkpoint(
    parts: Parts,
    base: BaseModel,
    options: TrainOptions,
    *,
    texts: Sequence[str],
    step: int,
    source: Path,
    bounded: Optional[Sequence[int]] = None,
    enabled: Optional[Sequence[bool]] = None,
    scores: Mapping[str, float] | None = None,
) -> Checkpoint:
    """What `convert.write_sidecar` takes.

    Args:
        texts: names of the books.
        step: of all objectives together.
        source: the training checkpoint that the weights are of; its hash becomes the provenance.
        bounded: the layers that the modules are for; None: all.
        enabled: which of these use a residual memory; None: all.

    Raises:
        TrainingError: the modules are not what docs/sidecar.md says of their kind.
    """
    numbers = range(base.geometry.block_count) if bounded is None else bounded
    spread = _Spread(numbers, base.geometry.block_count)
    indexer = find(INDEXERS, "indexer", options.kind)
    constants, layers = _contents(indexer, parts.indexer)
    memory, memory_constants = "none", dict[str, Any]()
    if options.memory == "centroid":  # no weights; `indexmem calibrate-memory --indexmem` measures better gates
        memory, memory_constants = "centroid", {"slot_count": options.memory_slots, "gate": [1.0] * len(numbers)}
    elif parts.memory is not None:
        memory = "residual"
        memory_constants, more = _contents(find(MEMORIES, "memory", memory), parts.memory)
        layers = [{**a, **b} for a, b in zip(layers, more)]
    if memory != "none":
        memory_constants["enabled"] = list(enabled) if enabled is not None else [True] * len(numbers)
    return Checkpoint(
        geometry=base.geometry,
        kind=options.kind,
        constants=spread.constants(constants),
        layers=spread.over(layers, {}),
        only=None if bounded is None else tuple(bounded),
        provenance=Provenance(
            "indexmem-edge", (source.name,), (file_sha256(source),), trained_on=_trained_on(texts, options), step=step
        ),
        memory=memory,
        memory_constants=spread.constants(memory_constants),
        architecture=base.architecture,
        base_model=base.name,
        fingerprint=base.fingerprint,
        budget_share=parts.shares,
        budget_least=parts.least,
        defaults={"sinks": options.sinks, "window": options.window},
        scores=dict(scores or {}),
    )


class _Spread:
    """From values of the layers that have modules to values of all layers, as a sidecar has them."""

    def __init__(self, numbers: Sequence[int], n_layer: int) -> None:
        self.numbers, self.n_layer = numbers, n_layer

    def over(self, values: Sequence[Any], other: Any) -> list[Any]:
        found = dict(zip(self.numbers, values))
        return [found.get(il, other) for il in range(self.n_layer)]

    def constants(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """Lists have a value for each layer; those of layers without modules are not read, and flags are false there."""
        return {
            name: self.over(value, False if isinstance(value[0], bool) else 1.0) if isinstance(value, list) else value
            for name, value in constants.items()
        }


def _contents(kind: Kind, modules: Iterable[nn.Module]) -> tuple[dict[str, Any], list[Layer]]:
    """Constants and tensors of all layers. A scalar parameter of every layer is a constant with one value a layer."""
    states = [
        {name: t.detach().float().cpu().numpy() for name, t in module.state_dict().items()} for module in modules
    ]
    known: Mapping[str, Any] = next(iter(modules)).constants  # type: ignore[assignment]
    constants = {c.name: known[c.name] for c in kind.constants if c.name in known}
    for c in kind.constants:
        if c.type == F32S and c.name in states[0]:
            constants[c.name] = [float(state.pop(c.name).reshape(())) for state in states]
    for state in states:
        state.pop(TRAINING_ONLY, None)
    names = {t.name for t in kind.tensors}
    if extra := [name for name in states[0] if name not in names]:
        raise TrainingError(f"a sidecar has no place for {extra[0]!r} of an indexer or memory of kind {kind.name}")
    missing = [c.name for c in kind.constants if not c.optional and c.type != BOOLS and c.name not in constants]
    if missing:
        raise TrainingError(f"the modules of kind {kind.name} lack the constant {missing[0]!r}")
    return constants, [{name: np.ascontiguousarray(a) for name, a in state.items()} for state in states]


def _trained_on(texts: Sequence[str], options: TrainOptions) -> str:
    """For people: names of books, with anything that is no plain text replaced."""
    generated = f"; generated text, {options.generated:.0%} of the sequences" if options.generated else ""
    names = ", ".join("".join(c if c.isprintable() else "?" for c in name) for name in texts)
    room = MAX_TEXT - len(generated)
    return (names if len(names) <= room else names[: room - 5] + ", ...") + generated
