"""A stock llama-cpp-python of the release that this package is built on, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from indexmem_edge.native.find import LLAMA_CPP_PYTHON_VERSION, library_file

from ..cached import cache_folder
from ..runner import BenchError

NAME = "llama-cpp-python"
# Where the shared libraries lie below the folder that somebody may name: it itself, a package, an environment, a build.
PLACES = ("", "lib", "llama_cpp/lib", "lib/python*/site-packages/llama_cpp/lib", "Lib/site-packages/llama_cpp/lib", "bin")


def stock_library(folder: Path | None, say: Callable[[str], None]) -> Path:
    """The folder with the shared libraries of a stock llama.cpp.

    Args:
        folder: an environment or a folder that has them; None: one that is kept among the temporary files, where pip builds the
            release once from its sources (CMAKE_ARGS counts, as always with that package).
        say: is told what takes long.

    Raises:
        BenchError: `folder` has none, they are ours, or pip cannot build them.
    """
    if folder is not None:
        found = _find(folder)
        if found is None:
            raise BenchError(f"{folder}: expected an environment with {NAME}, or a folder with libllama; found neither")
        return found
    environment = cache_folder() / f"stock-{LLAMA_CPP_PYTHON_VERSION}"
    found = _find(environment)
    if found is None:
        say(f"building {NAME} {LLAMA_CPP_PYTHON_VERSION} in {environment}: once, some ten minutes")
        _build(environment)
        found = _find(environment)
        if found is None:
            raise BenchError(f"pip installed {NAME} in {environment}, but there is no libllama in it")
    return found


def _find(folder: Path) -> Path | None:
    for place in PLACES:
        for candidate in sorted(folder.glob(place)) if place else [folder]:
            file = library_file(candidate)
            if file is not None:
                if b"indexmem_api_version" in file.read_bytes():
                    raise BenchError(f"{file} has the bounded cache: name a stock llama.cpp with --stock")
                return candidate.resolve()
    return None


def _build(environment: Path) -> None:
    try:
        venv.create(environment, with_pip=True, symlinks=os.name != "nt")  # a copy may not find the library that it is linked to
    except subprocess.CalledProcessError as error:
        raise BenchError(f"no environment could be made in {environment} ({error}): name one that has {NAME} with --stock") from error
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    command: Sequence[str] = [
        str(python), "-m", "pip", "install", "--quiet", "--no-binary", NAME, f"{NAME}=={LLAMA_CPP_PYTHON_VERSION}",
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "it said nothing")
        raise BenchError(
            f"pip could not build {NAME} {LLAMA_CPP_PYTHON_VERSION} ({last.strip()}): name an environment that has it with --stock"
        )
