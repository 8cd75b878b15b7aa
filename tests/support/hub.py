"""A stand-in for the hub: what huggingface_hub asks of it to list a repository and to fetch its files, on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """What there is of one name."""

    files: dict[str, bytes] = field(default_factory=dict)
    token: str = ""  # that one needs, "" none
    gated: bool = False  # whether it can be seen, but not had
    breaks: dict[str, int] = field(default_factory=dict)  # bytes after which the connection ends, once for each file
    status: int = 0  # of every answer, 0: the right one

    @property
    def commit(self) -> str:
        """Another one when a file is another."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """A running server."""

    repos: dict[str, Repo]
    url: str = ""
    asked: list[str] = field(default_factory=list)  # method, path and range of each request

    def bytes_asked(self, file: str) -> list[str]:
        """The range of each request for the content of a file, "" for all of it."""
        return [line.split(" ", 2)[2] for line in self.asked if line.startswith("GET") and line.split(" ")[1].endswith(f"/{file}")]


@contextlib.contextmanager
def serving(repos: dict[str, Repo]) -> Iterator[Hub]:
    """A hub with these repositories, for as long as the block runs."""
    hub = Hub(repos)

    class Handler(_Handler):
        the_hub = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    the_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, with_content: bool) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.the_hub.asked.append(f"{self.command} /{path} {self.headers.get('Range', '')}")
        about = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo = self.the_hub.repos.get("/".join(parts[:2]))
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is not None and repo.status:
            self._refuse(repo.status)
        elif repo is None:
            self._refuse(401 if not given else 404, "RepoNotFound", "Repository not found")
        elif given and given != repo.token:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repo.gated and repo.token != given and not about:
            self._refuse(403 if given else 401, "GatedRepo", "Access to this model is restricted")
        elif about:
            files = [{"rfilename": name, "size": len(content)} for name, content in repo.files.items()]
            self._send(200, json.dumps({"id": "/".join(parts[:2]), "sha": repo.commit, "siblings": files}).encode(), {"Content-Type": "application/json"})
        elif (file := "/".join(parts[4:])) not in repo.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._file(repo, file, with_content)

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _file(self, repo: Repo, file: str, with_content: bool) -> None:
        whole = repo.files[file]
        begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if "Range" in self.headers else 0
        headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest()}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(whole) - 1}/{len(whole)}"
        breaks = repo.breaks.pop(file, None) if with_content else None
        self._send(206 if begin else 200, whole[begin:], headers, breaks)

    def _send(self, status: int, content: bytes, headers: dict[str, str], breaks: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if breaks is None else content[:breaks])
        self.close_connection = self.close_connection or breaks is not None
