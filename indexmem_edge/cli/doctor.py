"""`indexmem doctor`: what is in use, what is wrong, how to mend it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterable, Optional

from .. import __version__
from ..doctor import trial
from ..errors import DemoModelMissing, IndexMemError
from ..models.architectures import in_words
from ..models.demo import demo_model
from ..native import find
from ..native.processors import usable_processors
from ..stats import fixed_parts, format_bytes
from .terminal import printable

BUDGET = 1024


@dataclass(frozen=True)
class Finding:
    """One line of the report. `status` is "ok", "note" (not needed by everybody) or "wrong"."""

    name: str
    status: str
    found: str


def examine(model: Optional[Path] = None) -> list[Finding]:
    """Looks at everything; a part that is broken does not keep the others from being looked at."""
    findings = [
        Finding("indexmem-edge", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    ]
    findings += _guard("llama-cpp-python", _python_bindings)
    findings += _guard("library", _library)
    usable = findings[-1].status != "wrong"
    if usable:
        for name, part in (
            ("bounded cache", _bounded_cache),
            ("CPU", _cpu),  # loads the variant for this one
            ("loaded files", _loaded_files),
            ("backends", _backends),
        ):
            findings += _guard(name, part)
    findings += _guard("demo model", lambda: [Finding("demo model", "ok", str(demo_model()))], status="note")
    if model is not None and usable:
        findings += _guard("model", lambda: _model(model))
    if usable:
        findings += _guard("trial", lambda: _trial_run(model))
    return findings


def report(findings: Iterable[Finding], as_json: bool, verbose: bool = False) -> None:
    """Prints the findings, and what there is to choose from."""
    findings = list(findings)
    wrong = [f for f in findings if f.status == "wrong"]
    usable = all(f.status != "wrong" for f in findings if f.name in ("library", "bounded cache"))
    if as_json:
        found = {"ok": not wrong, "findings": [asdict(f) for f in findings]}
        print(json.dumps({**found, **(catalogue() if usable else {})}, indent=2))
        return
    width = max(len(f.name) for f in findings)
    for finding in findings:
        mark = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}[finding.status]
        print(f"{mark}  {finding.name:<{width}}  {printable(finding.found)}")
    print("\nEverything is in order." if not wrong else f"\n{len(wrong)} of {len(findings)} checks failed.")
    if usable:
        show_catalogue(verbose)


def _guard(name: str, part: Callable[[], list[Finding]], status: str = "wrong") -> list[Finding]:
    try:
        return part()
    except IndexMemError as error:
        return [Finding(name, status, str(error))]
    except Exception as error:  # a broken installation may fail in any way: that is a finding, too
        return [Finding(name, status, f"{type(error).__name__}: {error}")]


def _python_bindings() -> list[Finding]:
    found = find.bindings()
    if found is None:
        find.require()  # raises with what to do
        return []
    return [Finding("llama-cpp-python", "ok", f"{found.version} (the copy inside this package), {found.path}")]


def _library() -> list[Finding]:
    find.require()
    from ..native import api

    origin = f" (from {find.LIB_PATH_VARIABLE})" if os.environ.get(find.LIB_PATH_VARIABLE) else ""
    return [Finding("library", "ok", f"{api.llama_lib._lib._name}{origin}")]


def _bounded_cache() -> list[Finding]:
    from ..native import api

    api.library()
    return [Finding("bounded cache", "ok", f"interface version {api.API_VERSION}; {api.build_info()}")]


def catalogue() -> dict[str, dict[str, str]]:
    """What the library has to choose from, each with one line of help. Empty where there is no library."""
    from ..native import api

    try:
        return {"policies": api.policies(), "indexers": api.indexers(), "memories": api.memories()}
    except (IndexMemError, OSError):
        return {}


def show_catalogue(verbose: bool) -> None:
    """A line for each kind of choice, or for each choice."""
    for kind, choices in catalogue().items():
        if verbose:
            width = max(map(len, choices), default=0)
            print(f"\n{kind}:", *(f"  {name:<{width}}  {text}" for name, text in choices.items()), sep="\n")
        else:
            print(f"{kind}: {', '.join(choices)}")
    if not verbose:
        print("(-v says what each of them does)")


def _loaded_files() -> list[Finding]:
    """Another ggml in the same process would be mixed with ours by the dynamic linker."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(None, 5)[5].strip() for line in os.fsdecode(maps.read_bytes()).splitlines() if line.count("/")}
    ours = os.path.realpath(find.library_dir())
    files = {p for p in paths if os.path.basename(p).startswith(("libllama", "libggml"))}
    foreign = sorted(p for p in files if os.path.dirname(os.path.realpath(p)) != ours)
    if foreign:
        return [
            Finding(
                "loaded files",
                "wrong",
                f"{', '.join(foreign)} came from elsewhere than {ours}: look for LD_LIBRARY_PATH or LD_PRELOAD, or for "
                "another package that loads llama.cpp",
            )
        ]
    return []


def _backends() -> list[Finding]:
    from ..native import api
    from ..native.ggml import ggml_function

    count = ggml_function("ggml_backend_dev_count", ctypes.c_size_t)
    get = ggml_function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name_of, about_of = (
        ggml_function(f"ggml_backend_dev_{what}", ctypes.c_char_p, ctypes.c_void_p) for what in ("name", "description")
    )
    devices = []
    for i in range(count()):
        device = get(i)
        name = name_of(device).decode("utf-8", "replace")
        about = about_of(device).decode("utf-8", "replace").strip()
        devices.append(f"{name} ({about}{_where_caches_lie(i)})")
    if not devices:
        return [Finding("backends", "wrong", "none: the ggml libraries beside libllama are incomplete; reinstall")]
    gpu = "" if api.llama_lib.llama_supports_gpu_offload() else "; no GPU backend in this build, -ngl has no effect"
    return [Finding("backends", "ok", ", ".join(devices) + gpu)]


def _where_caches_lie(device: int) -> str:
    """What is to be said of bounded caches of the layers that a device computes; nothing if they lie there whatever the options."""
    from ..native import api

    if api.library().indexmem_device_supported(device):
        return ""
    if not (there := api.policies_on(device)):
        return "; bounded caches stay in host memory"
    return f"; bounded caches lie there with {', '.join(there)}; else in host memory"


def _cpu() -> list[Finding]:
    from ..native import api
    from ..native.logs import collected_errors

    with collected_errors(False):
        variant = api.cpu_variant()
    built = {"native": "built for this machine", "generic": "built for any CPU of its kind"}
    info = api.llama_lib.llama_print_system_info().decode("utf-8", "replace")
    features = [part.strip() for part in info.replace("CPU : ", "").split("|") if part.strip().endswith("= 1")]
    names = " ".join(feature.split("=")[0].split(":")[-1].strip() for feature in features)
    how = built.get(variant, f"variant {variant}")
    return [Finding("CPU", "ok", f"{usable_processors()} processors; {how}: {names or 'no vector features'}")]


def _model(path: Path) -> list[Finding]:
    from ..files.modelfile import check_model_file, loaded_model
    from ..native import api

    llama = api.llama_lib
    with loaded_model(check_model_file(path)) as model:
        about = f"{api.model_description(model)}, trained for {llama.llama_model_n_ctx_train(model):,} tokens"
        why = api.model_unsupported_reason(model)
        if why is not None:
            return [Finding("model", "wrong", f"{about}: no bounded cache, because {why}; it runs with --kv-budget 0")]
        layers = f"{in_words(api.model_layers(model))}; {_bytes_at(model)}"
    return [Finding("model", "ok", f"{about}: a bounded cache is possible"), Finding("layers", "ok", layers)]


def _bytes_at(model: int) -> str:
    """What each part of the cache takes with a usual budget."""
    from ..native import api
    from ..native.logs import collected_errors, reason

    llama = api.llama_lib
    params = llama.llama_context_default_params()
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    with collected_errors(False) as log:
        try:
            api.request_context(budget=BUDGET)
            context = llama.llama_init_from_model(model, params)
        finally:
            api.withdraw_request()
        if not context:
            return f"no context with a budget of {BUDGET:,}: {api.last_error() or reason(log)}"
        stats = api.get_stats(context)
        llama.llama_free(context)
    rest = "".join(f", {part}" for part in fixed_parts(stats))
    kv, meta = format_bytes(stats.kv_bytes), format_bytes(stats.meta_bytes)
    return f"with a budget of {BUDGET:,} KV {kv} and {meta} of positions{rest}"


def _trial_run(model: Optional[Path]) -> list[Finding]:
    """The model that was named, or the demo model, decodes in another process."""
    try:
        tried = model if model is not None else demo_model()
    except DemoModelMissing:
        return [Finding("trial", "note", "nothing was decoded: install the demo model, or name a model with -m FILE")]
    outcome = trial.try_out(tried)
    return [Finding("trial", "ok" if outcome.kind == "ok" else "wrong", outcome.text)]
