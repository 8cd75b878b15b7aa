"""`indexmem`: the native `.pt` of IndexMem++ (https://github.com/Chooovy/kvpress), kinds mlp and linear.

    scorer_config    kind, hidden_size, n_heads, mid_dim, norm_eps, pos_slope, gate_scale, decay, age_scale, decay_init
    scorers          "<layer>.<param>" -> tensor
    step, training_config, and after some runs: optimizer, schedule, source_config, backbone

Strict like the authors' own loader: a key more or less is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.untrusted import quote, show

from ..model import Checkpoint, Geometry, Layer, Provenance, contiguous
from ..sources import TORCH, ReadOptions, Sources, expect_keys, mapping, to_array
from ..spec import LIMITS, check_u32

NAME = "indexmem"
CONFIG = (
    "kind", "hidden_size", "n_heads", "mid_dim", "norm_eps", "pos_slope", "gate_scale", "decay", "age_scale",
    "decay_init",
)  # fmt: skip
_HISTORY = (
    "it scores a token by what came before it, and the released inference never keeps that history at decode, so new "
    "tokens would be scored without it; use a checkpoint of kind mlp, which its authors found no worse"
)
REFUSED = {
    "conv": _HISTORY,
    "rnn": _HISTORY,
    "prefix": "its scorer has a growing cache of its own, which bounded memory rules out; use one of kind mlp",
    "kvzip": "it is not supported; use a checkpoint of kind mlp or linear, or one of Fast-KVzip (format fast-kvzip)",
}
_PARAM = re.compile(r"(0|[1-9][0-9]{0,4})\.(.+)", re.S)


def detect(sources: Sources) -> bool:
    """One PyTorch file with `scorers` and `scorer_config`."""
    return any("scorers" in f.keys or "scorer_config" in f.keys for f in sources.of(TORCH))


def read(sources: Sources, options: ReadOptions) -> Checkpoint:
    """Reads the file.

    Raises:
        ConvertError: a key is missing or unknown, the kind is not supported, or it was trained with its base model.
    """
    file = sources.one("an indexmem checkpoint", TORCH)
    sources.expect_only(file)
    content = mapping(str(file.path), file.content)
    refuse_joint(content, "backbone", "model")
    required = ("scorer_config", "scorers", "step", "training_config")
    expect_keys(str(file.path), content, required, ("optimizer", "schedule", "source_config"))
    config = check_config("scorer_config", content["scorer_config"])
    found: dict[int, Layer] = {}
    for key, value in mapping("scorers", content["scorers"]).items():
        match = _PARAM.fullmatch(key)
        if match is None:
            raise ConvertError(f"scorers: unexpected key {quote(key)}, expected <layer>.<param>")
        array = to_array(key, value)
        if match.group(2) == "gate_scale" and (array.shape != (1,) or "float32" not in str(value.dtype)):
            raise ConvertError(f"{quote(key)} is {list(array.shape)} {value.dtype}, expected [1] float32")
        found.setdefault(int(match.group(1)), {})[match.group(2)] = array
    return build(config, found, sources.provenance(NAME, content["step"]), {})


def refuse_joint(content: Mapping[str, Any], *keys: str) -> None:
    """Raises ConvertError for a checkpoint that carries the base model it was trained together with."""
    for key in keys:
        if key in content:
            raise ConvertError(
                f"this is a joint checkpoint: {key!r} in it is the base model as it was trained together with the "
                "scorer, and the scorer must not be used with the unmodified base model"
            )


def check_config(where: str, value: Any) -> Mapping[str, Any]:
    """A complete `scorer_config` of kind mlp or linear.

    Raises:
        ConvertError: a field is missing or unknown, or the kind is another.
    """
    config = mapping(where, value)
    kind = config.get("kind")
    if isinstance(kind, str) and kind in REFUSED:
        raise ConvertError(f"kind {kind!r} is refused: {REFUSED[kind]}")
    expect_keys(where, config, CONFIG)
    if kind not in ("mlp", "linear"):
        raise ConvertError(f"{where}: kind must be mlp or linear, found {show(kind)}")
    for key in ("gate_scale", "decay"):
        if not isinstance(config[key], bool):
            raise ConvertError(f"{where}: {key} must be true or false, found {show(config[key])}")
    return config


def build(
    config: Mapping[str, Any], found: Mapping[int, Layer], provenance: Provenance, source_names: Mapping[str, str]
) -> Checkpoint:
    """The checkpoint of a complete configuration and its layers by number, gates among them."""
    layers = contiguous(found)
    constants = {key: config[key] for key in ("mid_dim", "norm_eps", "pos_slope", "age_scale", "decay")}
    constants["trunk"] = config["kind"]
    if config["gate_scale"]:
        constants["gate_scale"] = [_gate(i, layer) for i, layer in enumerate(layers)]
    # without gate_scale in the configuration a gate stays in its layer, where it is an unexpected tensor
    geometry = Geometry(
        len(layers),
        check_u32("hidden_size", config["hidden_size"], 1, LIMITS["embedding_length"]),
        check_u32("n_heads", config["n_heads"], 1, LIMITS["head_count_kv"]),
    )
    return Checkpoint(geometry, "retention", constants, layers, provenance, source_names=source_names)


def _gate(i: int, layer: Layer) -> float:
    if "gate_scale" not in layer:
        raise ConvertError(f"layer {i}: gate_scale is missing, and the configuration says that there is one")
    return float(layer.pop("gate_scale")[0])
