"""`kvzap`: a folder with the config.json and the safetensors file of KVzap (arXiv 2601.07891).

config.json    input_dim, output_dim, n_modules, hidden_dim (null: linear), and what transformers adds
linear         layers.<n>.weight, .bias
mlp            layers.<n>.0.weight, .0.bias, .2.weight, .2.bias     with an exact GELU in between
"""

from __future__ import annotations

import re

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.untrusted import quote

from ..model import Checkpoint, Geometry, Layer, contiguous
from ..safefile import SafeFile
from ..sources import JSON, SAFETENSORS, ReadOptions, SourceFile, Sources, mapping, to_array
from ..spec import LIMITS, check_u32

NAME = "kvzap"
_PARAM = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.((?:[02]\.)?(?:weight|bias))")
_NAMES = {
    True: {
        "0.weight": "in_proj.weight",
        "0.bias": "in_proj.bias",
        "2.weight": "out_proj.weight",
        "2.bias": "out_proj.bias",
    },
    False: {"weight": "out_proj.weight", "bias": "out_proj.bias"},
}


def detect(sources: Sources) -> bool:
    """A safetensors file whose names are all like this."""
    return any(f.keys and all(_PARAM.fullmatch(key) for key in f.keys) for f in sources.of(SAFETENSORS))


def read(sources: Sources, options: ReadOptions) -> Checkpoint:
    """Reads the weights and the config.json, named or found beside them.

    Raises:
        ConvertError: config.json is missing or contradicts the weights, or a name is unknown.
    """
    file = sources.one("a KVzap checkpoint", SAFETENSORS)
    companion = _companion(sources, file)
    sources.expect_only(file, companion)
    config = mapping(companion.path.name, companion.content)
    for key in ("input_dim", "output_dim", "n_modules", "hidden_dim"):
        if key not in config:
            raise ConvertError(f"{companion.path.name}: {key!r} is missing")
    geometry = Geometry(
        check_u32("n_modules", config["n_modules"], 1, LIMITS["block_count"]),
        check_u32("input_dim", config["input_dim"], 1, LIMITS["embedding_length"]),
        check_u32("output_dim", config["output_dim"], 1, LIMITS["head_count_kv"]),
    )
    mid_dim = 0 if config["hidden_dim"] is None else check_u32("hidden_dim", config["hidden_dim"], 1, 65536)
    names = _NAMES[mid_dim > 0]
    found: dict[int, Layer] = {}
    assert isinstance(file.content, SafeFile)
    for key, tensor in file.content.tensors.items():
        match = _PARAM.fullmatch(key)
        if match is None or match.group(2) not in names:
            raise ConvertError(
                f"unexpected tensor {quote(key)}: with hidden_dim {mid_dim or 'null'}, layers.<n>.{{{','.join(names)}}}"
            )
        found.setdefault(int(match.group(1)), {})[names[match.group(2)]] = to_array(key, tensor)
    called = {new: old for old, new in names.items()}
    return Checkpoint(
        geometry, "kvzap", {"mid_dim": mid_dim}, contiguous(found), sources.provenance(NAME), source_names=called
    )


def _companion(sources: Sources, file: SourceFile) -> SourceFile:
    if sources.of(JSON):
        return sources.one("the config.json of KVzap", JSON)
    beside = file.path.with_name("config.json")
    if not beside.is_file():
        raise ConvertError(f"{file.path} is a KVzap checkpoint, which takes its config.json: none is beside it")
    return sources.add(beside)
