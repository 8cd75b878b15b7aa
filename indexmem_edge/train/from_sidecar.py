"""Modules with the weights of a sidecar: to measure them, or to train them further."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Optional, Union

import torch
from torch import nn

from indexmem_edge.convert.sidecar import read_sidecar

from ..errors import SidecarError
from .indexers.scorers import SCORERS
from .model.frozen import Geometry


def modules_from_sidecar(path: Union[str, os.PathLike[str]], config: Optional[Geometry] = None) -> nn.ModuleList:
    """The indexer of a sidecar, one module per layer that it is for, float32 on the CPU. A memory beside it is left out.

    Args:
        config: the decoder that it is for; the shapes are compared, and modules are those of its bounded layers.

    Raises:
        ConvertError: the sidecar cannot be read.
        SidecarError: it holds no indexer of a kind that is trained here, or is for another model.
    """
    checkpoint = read_sidecar(path).checkpoint
    if checkpoint.kind not in SCORERS:
        what = "no indexer" if checkpoint.kind == "none" else f"an indexer of kind {checkpoint.kind}"
        raise SidecarError(f"{os.fspath(path)} holds {what}: expected one of kind {', '.join(SCORERS)}")
    g = checkpoint.geometry
    if config is not None:
        found = g.block_count, g.embedding_length, g.head_count_kv
        expected = config.n_layer, config.n_embd, config.n_head_kv
        if found != expected:
            raise SidecarError(
                f"{os.fspath(path)} is for another model: layers, hidden size and KV heads are {_show(found)}, "
                f"the model has {_show(expected)}"
            )
        if absent := [il for il in config.bounded if il not in checkpoint.numbers]:
            raise SidecarError(
                f"{os.fspath(path)} is for the layers {_show(checkpoint.numbers)}, and a budget bounds the layers "
                f"{_show(absent)} of this model, too"
            )
    modules = nn.ModuleList()
    gates = checkpoint.constants.get("gate_scale") or [1.0] * g.block_count  # of training alone, so it may be missing
    for il in checkpoint.numbers if config is None else config.bounded:
        module = SCORERS[checkpoint.kind](g.embedding_length, g.head_count_kv, checkpoint.constants)
        arrays = {name: torch.tensor(array) for name, array in checkpoint.layers[il].items()}
        weights = {"gate_scale": torch.tensor([gates[il]]), **arrays}
        module.load_state_dict({name: weights[name] for name in module.state_dict()})
        modules.append(module)
    return modules


def needs_from_sidecar(path: Union[str, os.PathLike[str]]) -> tuple[Optional[tuple[float, ...]], Optional[tuple[int, ...]]]:
    """What of a budget each layer gets with a sidecar, relative to the others, and the entries that it gets first, [n_layer] each, or
    [n_layer * n_head_kv] where KV heads differ; None: all the same.

    Raises:
        ConvertError: the sidecar cannot be read.
    """
    checkpoint = read_sidecar(path).checkpoint
    return checkpoint.budget_share, checkpoint.budget_least


def _show(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
