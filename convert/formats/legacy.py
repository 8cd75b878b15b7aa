"""`indexmem-legacy`: the older `.pt` of IndexMem++, with the old names, and its `scorer.json`.

indexer    "model.layers.<n>.self_attn.indexer.<old name>" -> tensor
config     incomplete: norm_eps, pos_slope, age_scale, ... are in scorer.json alone
step, and after some runs: optim, model
"""

from __future__ import annotations

import re
from pathlib import Path

from indexmem_edge.errors import ConvertError
from indexmem_edge.files.untrusted import quote

from ..model import Checkpoint, Layer
from ..sources import JSON, TORCH, ReadOptions, SourceFile, Sources, expect_keys, mapping, to_array
from .indexmem import build, check_config, refuse_joint

NAME = "indexmem-legacy"
_PARAM = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.self_attn\.indexer\.(.+)", re.S)
_OLD = {"w_in": "input_proj", "w_out": "magnitude_proj", "w_decay": "retention_proj"}


def detect(sources: Sources) -> bool:
    """A PyTorch file with `indexer`."""
    return any("indexer" in f.keys for f in sources.of(TORCH))


def read(sources: Sources, options: ReadOptions) -> Checkpoint:
    """Reads the file and its scorer.json, named or found beside it.

    Raises:
        ConvertError: scorer.json is missing, a key is missing or unknown, or it was trained with its base model.
    """
    file = sources.one("a legacy indexmem checkpoint", TORCH)
    content = mapping(str(file.path), file.content)
    refuse_joint(content, "model", "backbone")
    expect_keys(str(file.path), content, ("indexer",), ("config", "step", "optim"))
    companion = _companion(sources, file)
    sources.expect_only(file, companion)
    config = check_config(companion.path.name, companion.content)
    found: dict[int, Layer] = {}
    for key, value in mapping("indexer", content["indexer"]).items():
        match = _PARAM.fullmatch(key)
        if match is None:
            raise ConvertError(
                f"indexer: unexpected key {quote(key)}, expected model.layers.<n>.self_attn.indexer.<param>"
            )
        old, dot, rest = match.group(2).partition(".")
        name = _OLD.get(old, old) + dot + rest
        array = to_array(key, value)
        if name == "gate_scale":
            if array.size != 1:
                raise ConvertError(f"{quote(key)} is {list(array.shape)}, expected one number")
            array = array.reshape(1)
        layer = found.setdefault(int(match.group(1)), {})
        if name in layer:
            raise ConvertError(f"indexer: {quote(key)} is there under its new name as well")
        layer[name] = array
    names = {new: old for old, new in _OLD.items()}
    called = {f"{new}.{part}": f"{old}.{part}" for new, old in names.items() for part in ("weight", "bias")}
    return build(config, found, sources.provenance(NAME, content.get("step")), called)


def _companion(sources: Sources, file: SourceFile) -> SourceFile:
    named = sources.of(JSON)
    if named:
        return sources.one("the scorer.json of a legacy checkpoint", JSON)
    beside: list[Path] = [file.path.with_name(f"{file.path.stem}.scorer.json"), file.path.with_name("scorer.json")]
    for path in beside:
        if path.is_file():
            return sources.add(path)
    raise ConvertError(
        f"{file.path} is a legacy checkpoint, whose constants are in a scorer.json: none was named, and there is no "
        f"{beside[0].name} or {beside[1].name} beside it"
    )
