"""The few endpoints of the Hugging Face hub that a download needs, served from memory on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Repos = dict[str, dict[str, bytes]]


@contextmanager
def serve(repos: Repos) -> Iterator[tuple[str, list[str]]]:
    """Yield the server's address and the list of files fetched so far (as `org/name/file`).

    `org/gated` answers as a gated repository, `org/broken` with status 500; what is not in `repos` does not exist.
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.api("/".join(parts[2:4]), parts[4:])
            elif parts[2:3] == ["resolve"]:
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.fail(404, "EntryNotFound")

        def api(self, repo: str, rest: list[str]) -> None:
            if not self.known(repo, rest[1] if len(rest) > 1 else "main"):
                return
            files = repos[repo]
            if rest[:1] == ["tree"]:
                listing = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.answer(json.dumps(listing).encode())
            else:
                siblings = [{"rfilename": name} for name in files]
                self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

        def file(self, repo: str, revision: str, name: str) -> None:
            if not self.known(repo, revision):
                return
            data = repos[repo].get(name)
            if data is None:
                self.fail(404, "EntryNotFound")
                return
            if self.command == "GET":
                fetched.append(f"{repo}/{name}")
            self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"')

        def known(self, repo: str, revision: str) -> bool:
            if repo == "org/broken":
                self.fail(500, "")
            elif repo == "org/gated":
                self.fail(403, "GatedRepo")
            elif repo not in repos:
                self.fail(401, "RepoNotFound")
            elif revision not in ("main", COMMIT):
                self.fail(404, "RevisionNotFound")
            else:
                return True
            return False

        def fail(self, status: int, code: str) -> None:
            self.answer(b'{"error": "no"}', status, **{"X-Error-Code": code})

        def answer(self, data: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
