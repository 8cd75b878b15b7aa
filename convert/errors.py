"""The error of this package."""

from __future__ import annotations

from indexmem_edge.errors import IndexMemError


class ConvertError(IndexMemError, ValueError):
    """A checkpoint or sidecar cannot be read, converted or written; the message says why and what to do."""
