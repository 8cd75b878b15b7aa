"""Starts llama-cpp-python's server."""

from __future__ import annotations

import importlib.util
import sys

from ..errors import IndexMemError, LibraryError

_NEEDED = ("fastapi", "uvicorn", "pydantic_settings", "sse_starlette", "starlette_context", "yaml")


def require_packages() -> None:
    """Raises LibraryError if what the server is made with is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LibraryError(
            f"the server needs {', '.join(missing)}, which are not installed: pip install 'indexmem-edge[server]'; "
            "`indexmem serve` needs nothing"
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
