"""Starts llama-cpp-python's server."""

from __future__ import annotations

import importlib.util
import sys

from ..errors import IndexMemError, LibraryError

# modules, and how pip calls what has them
_NEEDED = {
    "fastapi": "fastapi", "uvicorn": "uvicorn", "pydantic_settings": "pydantic-settings", "sse_starlette": "sse-starlette",
    "starlette_context": "starlette-context<0.4", "yaml": "PyYAML",
}  # fmt: skip


def require_packages() -> None:
    """Raises LibraryError if what the server is made with is not installed."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise LibraryError(
            f"the server needs packages that are not installed: pip install {' '.join(missing)}. `indexmem serve` needs nothing"
        )


def main() -> None:
    try:
        require_packages()
        from .._vendor.llama_cpp.server.__main__ import main as serve

        serve()
    except IndexMemError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
