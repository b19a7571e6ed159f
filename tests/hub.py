"""A Hub on this machine, as far as downloading a model needs one: the real client talks to it over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, does wrong, and was asked for.

    Attributes:
        files: of the one repository, `owner/tiny`.
        cut: a file whose transfer breaks off in the middle.
        gated: refuse everything.
        asked: the paths that were asked for.
    """

    files: dict[str, bytes]
    cut: str | None = None
    gated: bool = False
    asked: list[str] = field(default_factory=list)
    address: str = ""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve a model folder as `owner/tiny`."""
    hub = Hub({path.name: path.read_bytes() for path in folder.iterdir()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.reply(False)

        def do_GET(self) -> None:
            self.reply(True)

        def reply(self, with_body: bool) -> None:
            hub.asked.append(self.path)
            path = self.path.split("?")[0]
            if "/owner/tiny" not in path:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
            elif hub.gated:
                self.send(403, b"", {"X-Error-Code": "GatedRepo"}, with_body)
            elif path.startswith("/api/models/owner/tiny/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in hub.files.items()
                ]
                self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, with_body)
            elif path.startswith("/api/models/owner/tiny"):
                if path.rsplit("/", 1)[-1] not in ("tiny", "main", COMMIT, "v1"):
                    self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
                    return
                siblings = [{"rfilename": name} for name in hub.files]
                told = {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
                self.send(200, json.dumps(told).encode(), {"Content-Type": "application/json"}, with_body)
            elif (name := path.rsplit("/", 1)[-1]) in hub.files:
                content = hub.files[name]
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self.send(200, content, headers, with_body, cut=with_body and name == hub.cut)
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)

        def send(self, code: int, body: bytes, headers: dict[str, str], with_body: bool, cut: bool = False) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
