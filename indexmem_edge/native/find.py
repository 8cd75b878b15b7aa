"""Finds our build of llama.cpp, and the copy of llama-cpp-python that drives it.

That copy is `indexmem_edge._vendor.llama_cpp`: a module of its own name with libraries of their own names, so that another
llama-cpp-python can be in the same environment, and in the same process.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import LibraryError

LLAMA_CPP_PYTHON_VERSION = "0.3.36"
PACKAGE_DIR = Path(__file__).resolve().parents[1]
LIB_PATH_VARIABLE = "INDEXMEM_LIB_PATH"  # for developers: another folder with libllama


def _built_part(name: str, mark: str = "") -> Path:
    """A folder that only the installed package has. The clone's sources, when they are first on sys.path, borrow it."""
    places = [PACKAGE_DIR, *(Path(entry or ".").resolve() / "indexmem_edge" for entry in sys.path)]
    return next((place / name for place in places if (place / name / mark).is_dir()), PACKAGE_DIR / name)


def vendor_dir() -> str:
    """The folder that holds (or should hold) our copy of llama_cpp."""
    return str(_built_part("_vendor", "llama_cpp"))


@dataclass(frozen=True)
class Bindings:
    """Our copy of llama-cpp-python."""

    path: Path
    version: str


def library_dir() -> Path:
    """The folder that holds (or should hold) our libllama."""
    override = os.environ.get(LIB_PATH_VARIABLE)
    return Path(override).expanduser().resolve() if override else _built_part("lib")


def library_file(directory: Path | None = None, name: str = "llama") -> Path | None:
    """Path of a library of our build in `directory`, or None if it is not there.

    Those that others need by name carry ours: the loader takes one of that name that is already in the process.
    """
    directory = directory or library_dir()
    for stem in (f"{name}-indexmem", name):
        names = {
            "win32": (f"{stem}.dll", f"lib{stem}.dll"),
            "darwin": (f"lib{stem}.so", f"lib{stem}.dylib"),
        }.get(sys.platform, (f"lib{stem}.so",))
        for file in names:
            if (directory / file).is_file():
                return directory / file
    return None


def program(name: str) -> Path | None:
    """Path of a program of llama.cpp, built on our library, or None if it is not there."""
    file = f"{name}.exe" if sys.platform == "win32" else name
    places = [library_dir() / file, _built_part("bin") / file]
    return next((place for place in places if os.access(place, os.X_OK) and place.is_file()), None)


def bindings() -> Bindings | None:
    """Finds our copy of llama-cpp-python without importing it."""
    init = Path(vendor_dir()) / "llama_cpp" / "__init__.py"
    try:
        found = re.search(r"^__version__\s*=\s*[\"']([^\"']+)", init.read_text(encoding="utf-8"), re.M)
    except OSError:
        return None
    return Bindings(init.parent, found.group(1) if found else "an unknown version")


def _require_library() -> Path:
    ours = library_dir()
    if library_file(ours) is not None:
        return ours
    if os.environ.get(LIB_PATH_VARIABLE):
        raise LibraryError(
            f"{LIB_PATH_VARIABLE} names {ours}, where there is no libllama: build it there, or unset the variable"
        )
    raise LibraryError(
        f"the native library is missing: expected libllama in {ours}. Install the package from its source tree with "
        f"`pip install .`, or name the folder of a build in {LIB_PATH_VARIABLE}"
    )


def require() -> Path:
    """Verifies that library and bindings are there; returns the library's folder.

    Raises:
        LibraryError: one is missing.
    """
    ours = _require_library()
    if bindings() is None:
        raise LibraryError(
            f"the copy of llama-cpp-python {LLAMA_CPP_PYTHON_VERSION} that this package carries was not found in "
            f"{vendor_dir()}: reinstall indexmem-edge"
        )
    return ours
