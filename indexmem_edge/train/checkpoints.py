"""All that a training goes on from, in one safetensors file that is replaced as a whole.

Tensors: `weights.<part>.<layer>.<parameter>`, `best.<part>. ...` of the best evaluation so far, `before.<part>. ...` from before the
first step of an objective that needs them, and `optimizer.<number>.<name>`.
Metadata: one JSON text under `indexmem-train` with the position (objective, step), what was measured, and the options that
decide the weights. Data and objectives draw from (seed, step) alone, so no state of a random generator belongs to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined, unused-ignore]
from safetensors.torch import save
from torch import Tensor

from ..errors import ConvertError, TrainingCheckpointError
from ..files.atomic import replacing
from .options import difference

NAME = "checkpoint.safetensors"
METADATA_KEY = "indexmem-train"
SCHEMA = 2
_PARTS = ("weights", "best", "before", "optimizer")

Weights = dict[str, Tensor]


@dataclass
class Position:
    """Where a training is, and what it has measured."""

    stage: int = 0  # number of the objective
    step: int = 0  # done of it
    loss: Optional[float] = None  # of the last one
    recall: Optional[float] = None  # of the best weights; None: not measured
    recall_step: int = 0  # of this objective, at which they were
    value: Optional[float] = None  # by which they are the best: recall, or minus the objective's own held-out loss
    waited: int = 0  # evaluations since
    first_recall: Optional[float] = None  # before the first step of all
    stages: list[dict[str, Any]] = field(default_factory=list)  # results of the objectives that are through
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Snapshot:
    """Position and tensors. `best` is empty where no evaluation chooses, `before` where no objective asks for it."""

    position: Position
    weights: Weights
    best: Weights
    before: Weights
    optimizer: Weights


def save_snapshot(folder: Path, snapshot: Snapshot, deciding: Mapping[str, Any]) -> None:
    """Replaces the checkpoint of a run; the one before stays if that fails.

    Args:
        deciding: what decides the weights beside the code: options, model, text.

    Raises:
        TrainingCheckpointError: it cannot be written.
    """
    tensors = {
        f"{what}.{name}": t.detach().cpu().contiguous()
        for what in _PARTS
        for name, t in getattr(snapshot, what).items()
    }
    told = {"schema": SCHEMA, "position": asdict(snapshot.position), "deciding": dict(deciding)}
    path = folder / NAME
    try:
        with replacing(path, force=True) as temporary, open(temporary, "wb") as file:
            file.write(save(tensors, {METADATA_KEY: json.dumps(told)}))  # what fails here is an OSError with a reason
    except (ConvertError, OSError) as error:
        kept = "the one before is intact" if path.exists() else "there is none before it"
        raise TrainingCheckpointError(
            f"the checkpoint of step {snapshot.position.step} was not saved, {kept}: {error}. Free disk space or name "
            "another --run folder, then give the same command again"
        ) from None


def load_snapshot(folder: Path, deciding: Mapping[str, Any]) -> Optional[Snapshot]:
    """The checkpoint of a run; None if it has none yet.

    Raises:
        TrainingCheckpointError: it is damaged, or of a training with other options, another model or other text.
    """
    path = folder / NAME
    if not path.exists():
        return None
    parts: dict[str, Weights] = {what: {} for what in _PARTS}
    try:
        told = _metadata(path)
        found, position = told["deciding"], Position(**told["position"])
        if why := difference(deciding, found):
            raise TrainingCheckpointError(
                f"{folder} holds a training with other options: {why}. Name another folder with --run, or begin anew "
                "with --restart"
            )
        with safe_open(str(path), framework="pt") as file:  # type: ignore[no-untyped-call, unused-ignore]
            for key in file.keys():  # noqa: SIM118  it is no dict
                what, _, name = key.partition(".")
                parts[what][name] = file.get_tensor(key).clone()  # not mapped: Windows replaces no mapped file
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise TrainingCheckpointError(
            f"{path} cannot be read: {str(error) or type(error).__name__}. Begin anew with --restart"
        ) from None
    return Snapshot(position, **parts)


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt") as file:  # type: ignore[no-untyped-call, unused-ignore]
        metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        raise ValueError(f"it has no metadata {METADATA_KEY!r}")
    told = json.loads(metadata[METADATA_KEY])
    if not isinstance(told, dict) or told.get("schema") not in (1, SCHEMA):  # 1 has no `before`
        raise ValueError("it is of another version of indexmem-edge")
    return told


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Weights:
    """The state of an optimiser as tensors with names."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": t for i, values in state.items() for name, t in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Weights) -> None:
    """Puts it back, bit for bit."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        i, _, name = key.partition(".")
        state.setdefault(int(i), {})[name] = t
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def remove_snapshot(folder: Path) -> None:
    """Forgets a training, so that the next one begins anew."""
    try:
        (folder / NAME).unlink(missing_ok=True)
    except OSError as error:
        raise TrainingCheckpointError(f"cannot remove {os.fspath(folder / NAME)}: {error.strerror or error}") from None
