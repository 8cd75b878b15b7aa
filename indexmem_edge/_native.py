"""Finds our build of llama.cpp and makes sure that llama-cpp-python uses that one and no other.

llama-cpp-python loads its library when it is imported, from `LLAMA_CPP_LIB_PATH` if that is set. So `prepare()`, which
`import indexmem_edge` runs, sets the variable; `require()`, which runs before our `Llama` is used, verifies the result.
`prepare()` never raises: a broken installation can still run `indexmem doctor`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from .errors import LibraryError, VersionError

LLAMA_CPP_PYTHON_VERSION = "0.3.36"
PACKAGE_DIR = Path(__file__).resolve().parent


def _built_part(name: str) -> Path:
    """A folder that only the installed package has. The clone's sources, when they are first on sys.path, borrow it."""
    places = [PACKAGE_DIR, *(Path(entry or ".").resolve() / "indexmem_edge" for entry in sys.path)]
    return next((place / name for place in places if (place / name).is_dir()), PACKAGE_DIR / name)


VENDOR_DIR = _built_part("_vendor")
LIB_PATH_VARIABLE = "INDEXMEM_LIB_PATH"  # for developers: another folder with libllama
_LLAMA_CPP_VARIABLE = "LLAMA_CPP_LIB_PATH"


@dataclass(frozen=True)
class Bindings:
    """The llama-cpp-python that is, or would be, imported."""

    path: Path
    version: Optional[str]
    vendored: bool


def library_dir() -> Path:
    """The folder that holds (or should hold) our libllama."""
    override = os.environ.get(LIB_PATH_VARIABLE)
    return Path(override).expanduser().resolve() if override else _built_part("lib")


def library_file(directory: Optional[Path] = None, name: str = "llama") -> Optional[Path]:
    """Path of a library of our build in `directory`, or None if it is not there."""
    directory = directory or library_dir()
    names = {
        "win32": (f"{name}.dll", f"lib{name}.dll"),
        "darwin": (f"lib{name}.so", f"lib{name}.dylib"),
    }.get(sys.platform, (f"lib{name}.so",))
    return next((directory / n for n in names if (directory / n).is_file()), None)


def bindings() -> Optional[Bindings]:
    """Finds llama-cpp-python without importing it."""
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    init = Path(spec.origin)
    try:
        found = re.search(r"^__version__\s*=\s*[\"']([^\"']+)", init.read_text(encoding="utf-8"), re.M)
    except OSError:
        found = None
    return Bindings(init.parent, found.group(1) if found else None, VENDOR_DIR in init.parents)


def prepare() -> None:
    """Points llama-cpp-python, not yet imported, at our library, and offers the vendored copy if none is installed."""
    if "llama_cpp" in sys.modules:
        return  # too late to choose; require() judges what was loaded
    if not os.environ.get(_LLAMA_CPP_VARIABLE) and library_file() is not None:
        os.environ[_LLAMA_CPP_VARIABLE] = str(library_dir())
    if bindings() is None and VENDOR_DIR.is_dir() and str(VENDOR_DIR) not in sys.path:
        sys.path.append(str(VENDOR_DIR))


def _same_folder(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


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


def _require_bindings() -> None:
    found = bindings()
    if found is None:
        raise LibraryError(
            f"llama_cpp (llama-cpp-python {LLAMA_CPP_PYTHON_VERSION}) was not found, nor the copy that this package "
            f"carries in {VENDOR_DIR}: reinstall indexmem-edge"
        )
    if found.version != LLAMA_CPP_PYTHON_VERSION:
        raise VersionError(
            f"llama-cpp-python {LLAMA_CPP_PYTHON_VERSION} is needed, because our library is built from the llama.cpp "
            f"of that release; found {found.version or 'an unknown version'} in {found.path}. Uninstall it (this "
            f"package carries a copy) or install llama-cpp-python=={LLAMA_CPP_PYTHON_VERSION}"
        )


def loaded_library() -> Optional[Path]:
    """The libllama that llama-cpp-python has loaded in this process, or None if it has not been imported."""
    module = sys.modules.get("llama_cpp.llama_cpp")
    name = getattr(getattr(module, "_lib", None), "_name", None)
    return Path(name) if name else None


def require() -> Path:
    """Verifies that llama_cpp is the right version and runs on our library; returns the library's folder.

    Raises:
        LibraryError: our library is missing, or another one is loaded or asked for.
        VersionError: llama-cpp-python is not the release that the library was built from.
    """
    ours = _require_library()
    loaded = loaded_library()
    if loaded is not None:
        if not _same_folder(loaded.parent, ours):
            raise LibraryError(
                f"another llama.cpp library is already loaded in this process: {loaded} (expected one in {ours}). "
                "Put `import indexmem_edge` before the first `import llama_cpp`, and start the process again"
            )
        _require_bindings()
        return ours
    asked = os.environ.get(_LLAMA_CPP_VARIABLE)
    if asked and not _same_folder(Path(asked), ours):
        raise LibraryError(
            f"{_LLAMA_CPP_VARIABLE} names another llama.cpp library: {asked} (expected {ours}). Unset it, or, to use "
            f"a build of your own with the bounded cache, set {LIB_PATH_VARIABLE} instead"
        )
    os.environ[_LLAMA_CPP_VARIABLE] = str(ours)
    _require_bindings()
    return ours
