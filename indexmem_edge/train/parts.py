"""What is trained: an indexer for each layer that a budget bounds, and a residual memory where there is to be one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Optional, cast

import torch
from torch import Tensor, nn

from indexmem_edge.convert.spec import needs_of_heads

from ..errors import TrainingError
from .from_sidecar import modules_from_sidecar, needs_from_sidecar
from .indexers.scorers import SCORERS, with_decay
from .model.decoder import Decoder
from .model.frozen import Frozen, Geometry
from .objectives.objective import Objective
from .options import TrainOptions


@dataclass(frozen=True)
class Parts:
    """Modules of all bounded layers, on the device of the decoder, float32."""

    indexer: nn.ModuleList
    memory: Optional[nn.ModuleList] = None
    # of a budget, by layer or KV head, as the sidecar has them that training began with: shares, and entries before the rest is shared
    shares: Optional[tuple[float, ...]] = None
    least: Optional[tuple[int, ...]] = None

    def weights(self) -> dict[str, Tensor]:
        """Copies of all parameters, named `<part>.<layer>.<parameter>`."""
        return {
            f"{name}.{key}": t.detach().clone() for name, part in self._named() for key, t in part.state_dict().items()
        }

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Puts such copies back."""
        for name, part in self._named():
            part.load_state_dict({key: weights[f"{name}.{key}"] for key in part.state_dict()})

    def _named(self) -> list[tuple[str, nn.ModuleList]]:
        return [("indexer", self.indexer), *([("memory", self.memory)] if self.memory is not None else [])]


def build_parts(config: Geometry, options: TrainOptions, device: torch.device) -> Parts:
    """Modules to train: those of the sidecar `options.start`, or untrained ones, the same for the same seed.

    Raises:
        TrainingError: the kind is unknown, or the sidecar's is another; or no layer would ever lose an entry.
        ConvertError: the sidecar cannot be read.
        SidecarError: it is for another model, or holds no indexer that is trained here.
    """
    if options.kind not in SCORERS:
        raise TrainingError(f"--kind {options.kind!r}: expected one of {', '.join(SCORERS)}")
    layers = config.bounded
    if not layers:
        raise TrainingError("no budget bounds a layer of this model: all have sliding windows or recurrent states, and there is nothing to train")
    torch.manual_seed(options.seed)
    shares, least = None, None
    if options.start is not None:
        indexer = modules_from_sidecar(options.start, config)
        shares, least = needs_from_sidecar(options.start)
        found = indexer[0].kind
        if found != options.kind:
            raise TrainingError(f"--kind {options.kind}: the indexer of {options.start} is of kind {found}")
        if options.decay:
            indexer = with_decay(indexer)
    else:
        scorer = SCORERS[options.kind]
        constants = scorer.defaults(mid_dim=options.mid_dim, decay=options.decay)
        indexer = nn.ModuleList([scorer(config.n_embd, config.n_head_kv, constants) for _ in layers])
    memory = None
    if options.memory == "residual":
        from .indexers.residual import Residual

        memory = nn.ModuleList([Residual(Residual.defaults(config.head_dim)) for _ in layers]).to(device)
    return Parts(indexer.to(device), memory, shares, least)


def digest(weights: Mapping[str, Tensor]) -> str:
    """Short, and another one for other weights."""
    found = sha256()
    for name, t in sorted(weights.items()):
        found.update(name.encode() + t.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def trains_memory(objective: type[Objective]) -> bool:
    """Whether an objective trains the memory: those that do take the trained indexers as `scorers`."""
    return "scorers" in inspect.signature(objective).parameters


def make_objective(objective: type[Objective], decoder: Frozen, parts: Parts, options: TrainOptions, length: int) -> Objective:
    """The objective with the modules that it trains, on sequences of `length` tokens.

    Raises:
        TrainingError: they are not there, or not of the kind that it trains; or it computes more of the model than the engine
            shows; or learns nothing from sequences as short as these.
    """
    made = _made(objective, decoder, parts, options)
    if length < made.shortest:
        raise TrainingError(f"{made.name} learns nothing from sequences of {length:,} tokens: give a --length of at least {made.shortest:,}")
    return made


def _made(objective: type[Objective], decoder: Frozen, parts: Parts, options: TrainOptions) -> Objective:
    if not objective.observes and not isinstance(decoder, Decoder):
        raise TrainingError(
            f"the objective {objective.name} computes the model in PyTorch, and --engine native only watches it: take --objective "
            "asked-kl, regress, told-apart or pooled-kl, or --engine torch"
        )
    decoder = cast(Decoder, decoder)  # those that only observe ask for nothing else of it
    if not trains_memory(objective):
        made = objective(decoder, parts.indexer, options.sinks, options.window)
        if parts.shares is not None:
            config = decoder.geometry
            H = config.n_head_kv
            of_heads = needs_of_heads(parts.shares, config.n_layer, H, 1.0)
            shares = {il: of_heads[il * H : (il + 1) * H] for il in made.layers}
            mean = sum(map(sum, shares.values())) / (H * len(shares))
            made.shares = {il: [share / mean for share in here] for il, here in shares.items()}
        return made
    if parts.memory is None:
        raise TrainingError(f"the objective {objective.name} trains a memory: add --memory residual, or leave it out")
    return objective(decoder, parts.memory, options.sinks, options.window, scorers=parts.indexer)  # type: ignore[call-arg]
