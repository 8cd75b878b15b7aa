"""huggingface_hub, as far as it is used: what a repository has, a file of it, and its errors in our words."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

from .. import __version__
from ..errors import DownloadError
from ..files.untrusted import quote

_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_OF_THIS_SIDE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
_MISSING = "this needs the package huggingface_hub, which is not installed: `pip install huggingface_hub`, or the extra `pull` of indexmem-edge"
_LOG_IN = "log in with `hf auth login`, or give a token in HF_TOKEN"


class Hub:
    """One repository after the other, with the files of each from one commit.

    Args:
        folder: where files go; None: the cache that programs share.
        force: fetch what is there already.
        bars: show how far it is, on standard error.

    Raises:
        DownloadError: the package is not installed.
    """

    def __init__(self, folder: Union[str, os.PathLike[str], None], force: bool, bars: bool) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import errors, utils
        except ImportError as error:
            raise DownloadError(_MISSING) from error
        self._hub, self._errors = huggingface_hub, errors
        if not bars:
            utils.disable_progress_bars()
            utils.logging.set_verbosity_error()
        self._folder = None if folder is None else Path(folder).expanduser().absolute()
        self._force = force
        self._repo = ""
        self._commit: Optional[str] = None
        self._sizes: dict[str, Any] = {}

    def files(self, repo: str) -> list[str]:
        """Names of all files of a repository, as it says them: they are not checked.

        Raises:
            DownloadError: there is no such repository, none that may be read, or no network.
        """
        api = self._hub.HfApi(endpoint=_endpoint(), library_name="indexmem-edge", library_version=__version__)
        with self._in_words(repo):
            info = api.model_info(repo, files_metadata=True, timeout=30)
        self._repo = repo
        self._commit = info.sha if _COMMIT.fullmatch(info.sha or "") else None
        self._sizes = {file.rfilename: file.size for file in info.siblings or []}
        return list(self._sizes)

    def fetch(self, file: str) -> str:
        """The path of a file of the repository, fetched if it is not there; its name has to be safe.

        Raises:
            DownloadError: it failed, or another file of that name is in the way.
        """
        if self._folder is not None:
            self._require_ours(self._folder / file, file)
        with self._in_words(f"{self._repo}/{file}"):
            return str(
                self._hub.hf_hub_download(
                    self._repo, file, revision=self._commit, local_dir=self._folder, force_download=self._force,
                    endpoint=_endpoint(), library_name="indexmem-edge", library_version=__version__,
                )
            )  # fmt: skip

    def _require_ours(self, there: Path, file: str) -> None:
        """Raises DownloadError if a file that is there is not the one to fetch, by its size."""
        if not self._force and there.is_file() and there.stat().st_size != self._sizes.get(file):
            raise DownloadError(f"{there} is there, and is another file than that of {self._repo}: name another folder, or replace it with --force")

    @contextlib.contextmanager
    def _in_words(self, what: str) -> Iterator[None]:
        errors = self._errors
        try:
            yield
        except errors.GatedRepoError as error:
            raise DownloadError(f"{what} is only for people whom its owner lets in: ask for access on its page, then {_LOG_IN}") from error
        except errors.RepositoryNotFoundError as error:
            raise DownloadError(f"there is no model {what}, or it is private: look at the spelling, or {_LOG_IN}") from error
        except errors.LocalEntryNotFoundError as error:
            raise DownloadError(f"cannot fetch {what}: {_first_line(error.__cause__ or error)}. {_no_network()}") from error
        except errors.EntryNotFoundError as error:
            raise DownloadError(f"{what} is listed, but cannot be had: it may just have been replaced; try again") from error
        except errors.HFValidationError as error:
            raise DownloadError(f"{quote(what)} is not a name that a model can have") from error
        except errors.HfHubHTTPError as error:
            raise DownloadError(f"cannot fetch {what}: {_status(error)}") from error
        except OSError as error:
            if error.filename is not None or error.errno in _OF_THIS_SIDE:
                where = error.filename or self._folder or "the cache of models (HF_HOME moves it)"
                raise DownloadError(f"cannot write to {where}: {error.strerror or error}") from error
            raise DownloadError(f"cannot fetch {what}: {_first_line(error)}. {_no_network()}") from error
        except Exception as error:  # of the library that speaks HTTP, which differs from release to release
            raise DownloadError(f"cannot fetch {what}: {_first_line(error)}. {_no_network()}") from error


def _status(error: Any) -> str:
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code == 401:
        return f"the other side does not accept the token (401): {_LOG_IN}"
    if code == 403:
        return f"it is not for everybody (403): ask its owner for access, then {_LOG_IN}"
    if code == 404:
        return "there is none (404): look at the spelling"
    if code == 429:
        return "too many requests (429): wait a while, or log in with `hf auth login`"
    return f"the other side answered with {code}: try again later" if code else _first_line(error)


def _no_network() -> str:
    endpoint = _endpoint()
    where = f", and HF_ENDPOINT, which is {quote(endpoint)}" if endpoint else ""
    return f"What was fetched so far is kept: look at the network (and a proxy){where}, and try again"


def _endpoint() -> Optional[str]:
    """Where the hub is, if not where huggingface_hub knows it."""
    return os.environ.get("HF_ENDPOINT") or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
