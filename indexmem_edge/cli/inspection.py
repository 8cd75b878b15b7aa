"""`indexmem inspect`: what a sidecar, a model or a session holds, and whether they fit.

The library judges a file first; its metadata is read in Python only when it has passed. Text in a file is data: it is
escaped before a terminal gets it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, Iterable, Optional, Union

import numpy as np

from ..errors import ConvertError, ModelFileError, SessionError, SidecarError
from ..files.gguffile import GGUFFile
from ..files.modelfile import check_gguf_file, check_model_file, fingerprint, gguf_strings, loaded_model
from ..models.architectures import in_words, kinds
from ..models.sidecars import named_after
from ..native import api
from ..sessions.file import is_session
from ..sessions.info import SessionInfo
from ..stats import format_bytes
from ..train.model.architectures import trainable
from .console import console
from .terminal import printable

Facts = dict[str, Any]
_F16 = 2  # bytes


def examine(path: Union[str, os.PathLike[str]], model: Union[str, os.PathLike[str], None] = None) -> Facts:
    """Checks a file and returns what is in it, as plain values that json.dumps takes.

    Raises:
        SidecarError: the sidecar is damaged, or is not for `model`.
        SessionError: the session is damaged, or is not of `model`.
        ModelFileError: the model cannot be loaded, or the file is none of these.
    """
    if is_session(path):
        return _session_facts(path, None if model is None else check_model_file(model))
    name = check_gguf_file(path)
    try:
        api.check_sidecar(name)
    except SidecarError:
        if model is not None or _says_sidecar(name):
            raise
        return _model_facts(name)
    return _sidecar_facts(name, None if model is None else check_model_file(model))


def _session_facts(path: Union[str, os.PathLike[str]], model: Optional[str]) -> Facts:
    info = SessionInfo.read(path, verify=True)
    if model is not None and fingerprint(model) != info.model:
        raise SessionError(f"{info.path} was saved with another model file than {model}: name that one")
    fits = None if model is None else {"file": os.path.basename(model)}
    return {"what": "session", **info.to_dict(), "file": os.path.basename(info.path), "fits": fits}


def _says_sidecar(name: str) -> bool:
    """Whether a file that is no sidecar was meant to be one, or is another kind of adapter."""
    return name.endswith(".indexmem.gguf") or gguf_strings(name, ["general.type"]).get("general.type") == "adapter"


class _Metadata:
    """A GGUF file that has been checked: its keys, and its tensors as (name, type, shape, bytes)."""

    def __init__(self, name: str) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        types = {int(kind): (kind.name, *GGML_QUANT_SIZES.get(kind, (1, 0))) for kind in GGMLQuantizationType}
        try:
            with GGUFFile(name) as file:
                self._values, tensors = file.metadata, list(file.tensors.values())
        except ConvertError as error:
            raise ModelFileError(f"cannot read the metadata of {name}: {error}") from error
        self.tensors = []
        for tensor in tensors:
            kind, values, size = types.get(tensor.type, (f"type {tensor.type}", 1, 0))
            self.tensors.append((tensor.name, kind, list(tensor.dims), math.prod(tensor.dims) // values * size))

    def get(self, key: str) -> Any:
        """Text, a number, a truth value or a list of them; None if the key is not there."""
        found = self._values.get(key)
        if found is None:
            return None
        values = found.value if found.type.endswith("array") else [found.value]
        plain = [_plain(value, found.type) for value in values]
        return plain if found.type.endswith("array") else plain[0]

    def below(self, prefix: str) -> Facts:
        """All keys with a prefix, without it."""
        return {key[len(prefix) :]: self.get(key) for key in self._values if key.startswith(prefix)}


def _plain(value: Any, kind: str) -> Any:
    """What can be written as JSON; of 32-bit floats the digits that were meant."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if kind.startswith("f32"):
        value = float(str(np.float32(value)))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def _sidecar_facts(name: str, model: Optional[str]) -> Facts:
    fits = None
    if model is not None:
        with loaded_model(model) as loaded:
            api.check_sidecar(name, loaded)
            fits = {"file": os.path.basename(model), "fingerprint": api.fingerprint(loaded)}
    meta = _Metadata(name)
    kind, memory = meta.get("indexmem.indexer.kind"), meta.get("indexmem.memory.kind")
    return {
        "what": "sidecar",
        "file": os.path.basename(name),
        "bytes": os.path.getsize(name),
        "schema_version": meta.get("indexmem.schema_version"),
        "base_model": {
            "architecture": meta.get("general.architecture"),
            "name": meta.get("general.base_model.0.name"),
            "layers": meta.get("indexmem.block_count"),
            "covered": meta.get("indexmem.layers"),
            "embedding_length": meta.get("indexmem.embedding_length"),
            "heads": meta.get("indexmem.attention.head_count"),
            "kv_heads": meta.get("indexmem.attention.head_count_kv"),
            "head_size": meta.get("indexmem.attention.key_length"),
            "fingerprint": meta.get("indexmem.base_model.norms_fnv1a64"),
        },
        "fits": fits,
        "indexer": {"kind": kind, "input": meta.get("indexmem.indexer.input"), **meta.below(f"indexmem.{kind}.")},
        "memory": {"kind": memory, **meta.below(f"indexmem.{memory}.")},
        "budget_share": meta.get("indexmem.budget_share"),
        "budget_least": meta.get("indexmem.budget_least"),
        "defaults": meta.below("indexmem.defaults."),
        "tensors": _by_name(meta.tensors),
        "provenance": meta.below("indexmem.provenance."),
        "scores": meta.below("indexmem.scores."),
    }


def _by_name(tensors: Iterable[tuple[str, str, list[int], int]]) -> list[Facts]:
    """Tensors of all layers, one line a name; the layers of a sidecar differ in type at most."""
    found: dict[str, Facts] = {}
    for full, kind, shape, size in tensors:
        name = full.partition(".indexmem.")[2]
        row = found.setdefault(name, {"name": name, "layers": 0, "shape": shape, "type": kind, "bytes": 0})
        row["layers"] += 1
        row["bytes"] += size
        if kind not in row["type"].split(", "):
            row["type"] += f", {kind}"
    return list(found.values())


def _model_facts(name: str) -> Facts:
    llama = api.llama_lib
    with loaded_model(name) as model:
        why = api.model_unsupported_reason(model)
        identity = api.fingerprint(model)
        layers, width, heads = (
            int(get(model)) for get in (llama.llama_model_n_layer, llama.llama_model_n_embd, llama.llama_model_n_head)
        )
        trained = int(llama.llama_model_n_ctx_train(model))
        flags, rows = api.model_layers(model), api.model_rows(model)
        beside = [_beside(path, model) for path in named_after(name)]
    meta = _Metadata(name)
    arch = meta.get("general.architecture")
    kv_heads = meta.get(f"{arch}.attention.head_count_kv")
    per_layer = kv_heads if isinstance(kv_heads, list) else [heads if kv_heads is None else kv_heads]
    if len(per_layer) == layers:  # those of layers that can be bounded
        per_layer = [n for n, flag in zip(per_layer, flags) if flag & api.LAYER_BOUNDED] or per_layer
    sizes = [meta.get(f"{arch}.attention.{kind}_length") or width // max(heads, 1) for kind in ("key", "value")]
    return {
        "what": "model",
        "file": os.path.basename(name),
        "bytes": os.path.getsize(name),
        "architecture": arch,
        "name": meta.get("general.name"),
        "fingerprint": identity,
        "layers": layers,
        "embedding_length": width,
        "heads": heads,
        "kv_heads": per_layer[0] if len(set(per_layer)) == 1 else per_layer,
        "head_size": sizes,
        "trained_length": trained,
        "files": meta.get("split.count") or 1,
        "types": _by_type(meta.tensors),
        "bounded": why is None,
        "why_not": why,
        "layers_by_kind": kinds(flags),
        "layers_in_words": in_words(flags),
        "kv_bytes_per_1024": None if why else 1024 * _bounded_row(flags, rows) * _F16,
        "untrainable": trainable(arch),
        "sidecars": beside,
    }


def _bounded_row(flags: Iterable[int], rows: Iterable[tuple[int, int]]) -> int:
    """Numbers that a token leaves in all layers that a budget bounds."""
    return sum(sum(row) for flag, row in zip(flags, rows) if flag & api.LAYER_BOUNDED)


def _by_type(tensors: Iterable[tuple[str, str, list[int], int]]) -> list[Facts]:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for _, kind, _, n in tensors:
        count[kind] += 1
        size[kind] += n
    return [{"type": kind, "tensors": count[kind], "bytes": n} for kind, n in size.most_common()]


def _beside(path: str, model: int) -> Facts:
    try:
        api.check_sidecar(path, model)
    except SidecarError as error:
        why = str(error)
        prefix = f"sidecar {path}: "
        return {
            "file": os.path.basename(path),
            "fits": False,
            "why_not": why[len(prefix) :] if why.startswith(prefix) else why,
        }
    return {"file": os.path.basename(path), "fits": True, "why_not": None}


# for people


def show(facts: Facts) -> None:
    """Prints the facts as tables."""
    out = console(width_in_pipes=120)
    tables = {"sidecar": _sidecar_tables, "session": _session_tables, "model": _model_tables}
    for part in tables[facts["what"]](facts):
        out.print(part)


def _table(title: Optional[str], columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=any(columns))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if name in ("layers", "tensors", "bytes") else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(printable(_shown(value))) for value in row))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        if len(value) > 8 and all(type(v) in (int, float) for v in value):
            return f"{len(value)} values from {min(value):g} to {max(value):g}"
        if len(value) > 8 and all(isinstance(v, bool) for v in value):
            return f"{sum(value)} of {len(value)}"
        return ", ".join(_shown(v) for v in value)
    return "not said" if value is None else str(value)


def _geometry(facts: Facts, kv_heads: Any, head_size: Any) -> str:
    parts = [f"{facts['layers']} layers", f"embedding {facts['embedding_length']}"]
    if facts["heads"] is not None:
        parts.append(f"{facts['heads']} heads")
    return ", ".join(parts) + f", {_shown(kv_heads)} KV heads" + (f" of {head_size}" if head_size is not None else "")


def _needs(values: Sequence[float], n_layer: int, other: float) -> str:
    """Of layers, or of KV heads as `layer.head`: those that have another value than most."""
    heads = len(values) // n_layer
    found: dict[float, list[str]] = {}
    for i, value in enumerate(values):
        if value != other:
            found.setdefault(value, []).append(str(i) if heads == 1 else f"{i // heads}.{i % heads}")
    what = "layer" if heads == 1 else "layer.head"
    return "; ".join(f"{value:g}: {what} {' '.join(where)}" for value, where in sorted(found.items())) or "the same for all"


def _sidecar_tables(facts: Facts) -> list[Any]:
    base, indexer, memory = (dict(facts[name]) for name in ("base_model", "indexer", "memory"))
    provenance = dict(facts["provenance"])
    about = [
        (
            "file",
            f"{facts['file']}: a sidecar, schema {facts['schema_version']}, {format_bytes(facts['bytes'])}, whole",
        ),
        ("base model", f"{base['architecture']}" + (f", {base['name']}" if base["name"] else "")),
        ("", _geometry(base, base["kv_heads"], base["head_size"])),
        ("fingerprint", base["fingerprint"]),
    ]
    if base["covered"] is not None:
        numbers = ", ".join(map(str, base["covered"]))
        about.insert(3, ("layers covered", f"{len(base['covered'])} of {base['layers']}: {numbers}"))
    if facts["fits"] is not None:
        about.append(("fits", f"{facts['fits']['file']} (fingerprint {facts['fits']['fingerprint']})"))
    about += [(f"indexer {name}", value) for name, value in indexer.items()]
    about += [(f"memory {name}", value) for name, value in memory.items()]
    if facts["budget_share"] is not None:
        about.append(("share of a budget", _needs(facts["budget_share"], base["layers"], 1)))
    if facts["budget_least"] is not None:
        about.append(("entries before", _needs(facts["budget_least"], base["layers"], 0)))
    about += [(f"default {name}", value) for name, value in facts["defaults"].items()]
    sources = list(zip(provenance.pop("source_files", []), provenance.pop("source_sha256", [])))
    about += [(name.replace("_", " "), value) for name, value in provenance.items()]
    about += [("source", f"{file}  sha256 {digest}") for file, digest in sources]
    about += [(f"score {name}", value) for name, value in facts["scores"].items()]
    tensors = [
        (t["name"], t["layers"], " x ".join(map(str, t["shape"])), t["type"], format_bytes(t["bytes"]))
        for t in facts["tensors"]
    ]
    return [_table(None, ("", ""), about), _table("Tensors", ("name", "layers", "shape", "type", "bytes"), tensors)]


def _session_tables(facts: Facts) -> list[Any]:
    of_another = f", the first {facts['background']:,} of another conversation" if facts["background"] else ""
    about = [
        ("file", f"{facts['file']}: a session, format {facts['format']}, {format_bytes(facts['bytes'])}, whole"),
        ("model", (f"{facts['model_name']}, " if facts["model_name"] else "") + f"file {facts['model']}"),
        ("tokens", f"{facts['tokens']:,}" + (f", {facts['kept']:,} kept" if facts["kept"] is not None else "") + of_another),
        ("messages", "none: it was not saved by a chat" if facts["messages"] is None else facts["messages"]),
    ]
    if facts["fits"] is not None:
        about.insert(2, ("fits", facts["fits"]["file"]))
    if facts["least_budget"]:
        needs = f"--kv-budget {facts['least_budget']} or more; {facts['whole_budget']} keeps all of it"
        about.append(("needs", needs))
    else:
        about.append(("needs", "no --kv-budget: it was saved without one"))
    about += [(name, value) for name, value in facts["options"].items() if name not in ("memory_slots",) or value]
    if facts["sidecar_hash"]:
        about.append(("sidecar", f"{facts['sidecar']} ({facts['sidecar_hash']})"))
    about += [(name, value) for name, value in facts["context"].items() if name in ("type_k", "type_v", "n_ubatch", "lora")]
    if facts["checkpoints"]:
        about.append(("checkpoints", f"{facts['checkpoints']}, {format_bytes(facts['checkpoint_bytes'])}"))
    return [_table(None, ("", ""), about)]


def _model_tables(facts: Facts) -> list[Any]:
    k, v = facts["head_size"]
    one_of = f", the first of {facts['files']} files" if facts["files"] > 1 else ""
    about = [
        ("file", f"{facts['file']}: a model, {format_bytes(facts['bytes'])}{one_of}"),
        ("architecture", f"{facts['architecture']}" + (f", {facts['name']}" if facts["name"] else "")),
        ("", _geometry(facts, facts["kv_heads"], k if k == v else f"{k} and {v}")),
        ("trained for", f"{facts['trained_length']:,} tokens"),
        ("fingerprint", facts["fingerprint"]),
    ]
    if facts["bounded"]:
        about.append(("bounded cache", f"possible: {facts['layers_in_words']}"))
        if facts["trained_length"] > 0:
            below = f"below {facts['trained_length']:,} with a budget"
            about.append(("positions", f"{below}, if its keys can get new ones: `indexmem doctor -m` tries it"))
        fixed = ", and what the other layers keep" if set(facts["layers_by_kind"]) & {"with a window", "recurrent"} else ""
        about.append(("KV memory", f"{format_bytes(facts['kv_bytes_per_1024'])} per 1024 slots, f16{fixed}"))
    else:
        about.append(("bounded cache", f"not possible: {facts['why_not']}"))
    if facts["bounded"]:
        training = facts["untrainable"] and f"`indexmem train --engine native` can make one; not --engine torch: {facts['untrainable']}"
        about.append(("indexer", training or "`indexmem train` can make one"))
    about += [
        ("sidecar", f"{sidecar['file']}: " + ("fits" if sidecar["fits"] else sidecar["why_not"])) for sidecar in facts["sidecars"]
    ]
    if not facts["sidecars"]:
        stem = facts["file"].rpartition(".")[0]
        about.append(("sidecar", f"none beside it (looked for {stem}*.indexmem.gguf)"))
    types = [(t["type"], t["tensors"], format_bytes(t["bytes"])) for t in facts["types"]]
    return [_table(None, ("", ""), about), _table("Weights", ("type", "tensors", "bytes"), types)]
