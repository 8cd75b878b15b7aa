"""Writing a file so that it appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Union

from ..errors import ConvertError

_SUFFIX = ".tmp"
_MOST_OF_THE_NAME = 48  # characters, of which each may take four bytes, and a name of a file has 255


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


def same_file(a: Union[str, os.PathLike[str]], b: Union[str, os.PathLike[str]]) -> bool:
    """Whether two names are of one file: links, and capitals where the file system knows no difference, are looked through."""
    if os.path.realpath(os.fspath(a)) == os.path.realpath(os.fspath(b)):
        return True
    try:
        return os.path.samefile(a, b)
    except OSError:  # one is not there
        return False


@contextlib.contextmanager
def replacing(path: Union[str, os.PathLike[str]], force: bool = False) -> Iterator[str]:
    """Yields the name of a temporary file beside `path`, which takes its place when the block succeeds.

    Raises:
        ConvertError: as `check_target`, or the file could not be written. What was there before is intact then.
    """
    target = check_target(path, force)
    try:
        with replacing_private(target) as temporary:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())  # weights are for everybody
            check_target(target, force)
    except OSError as error:
        raise ConvertError(f"cannot write {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing_private(target: str) -> Iterator[str]:
    """The same for a file that its owner alone can read, whatever was there before.

    Raises:
        OSError: it could not be written. What was there before is intact then.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=_prefix(target), suffix=_SUFFIX, dir=os.path.dirname(target))
        os.close(handle)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise
    _sync_folder(os.path.dirname(target))


def remove_leftovers(target: str) -> None:
    """Removes the temporary files of writers of this file that were killed. For who knows that nobody is writing it now."""
    ours = re.compile(re.escape(_prefix(target)) + r"[a-z0-9_]{8}" + re.escape(_SUFFIX))
    if len(os.path.basename(target)) > _MOST_OF_THE_NAME:
        return  # they may be of another file whose name begins like this one
    with contextlib.suppress(OSError):
        for name in filter(ours.fullmatch, os.listdir(os.path.dirname(target))):
            os.unlink(os.path.join(os.path.dirname(target), name))


def _prefix(target: str) -> str:
    return f".{os.path.basename(target)[:_MOST_OF_THE_NAME]}-"


def _sync_folder(folder: str) -> None:
    """Makes the new name durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
