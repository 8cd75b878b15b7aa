"""PyTorch is an extra: what needs it asks here first, so that its absence is one line and not a traceback."""

from __future__ import annotations

from ..errors import TorchMissing

_HOW = "install it with `pip install torch`"


def require_torch() -> None:
    """Called before anything of `indexmem_edge.train` is imported.

    Raises:
        TorchMissing: PyTorch is not installed, or does not start.
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise TorchMissing(f"PyTorch is installed, but lacks the module {error.name}: re{_HOW}") from None
        raise TorchMissing(f"training needs PyTorch, which is not installed: {_HOW}") from None
    except (ImportError, OSError) as error:  # OSError: a library of it, on Windows
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise TorchMissing(f"PyTorch is installed, but does not start ({reason}): re{_HOW}") from None
