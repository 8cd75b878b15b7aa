"""Writing a file so that it appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Union

from ..errors import ConvertError


def check_target(path: Union[str, os.PathLike[str]], force: bool) -> str:
    """The real path of a file to be written.

    Raises:
        ConvertError: it is a folder, its folder is missing, or it exists and `force` is false.
    """
    target = os.path.realpath(os.fspath(path))
    if os.path.isdir(target):
        raise ConvertError(f"cannot write {target}: it is a folder; name a file in it")
    if not os.path.isdir(os.path.dirname(target)):
        raise ConvertError(f"cannot write {target}: its folder does not exist")
    if os.path.lexists(target) and not force:
        raise ConvertError(f"{target} exists: name another file, or overwrite it with --force")
    return target


@contextlib.contextmanager
def replacing(path: Union[str, os.PathLike[str]], force: bool = False) -> Iterator[str]:
    """Yields the name of a temporary file beside `path`, which takes its place when the block succeeds.

    Raises:
        ConvertError: as `check_target`, or the file could not be written. What was there before is intact then.
    """
    target = check_target(path, force)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=".indexmem-", suffix=".tmp", dir=os.path.dirname(target))
        os.close(handle)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; weights are not
        os.replace(temporary, check_target(target, force))
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise ConvertError(f"cannot write {target}: {error.strerror or error}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
