"""A Hub on this machine, as far as models are downloaded and pushed: the real client talks to it over HTTP.

It has no xet storage, so the client is to be told so (HF_HUB_DISABLE_XET=1); large files go by Git LFS then.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_QuiteSecretTokenThatMustNotBeSeen"
READ_TOKEN = "hf_AnotherTokenThatMayReadAndNoMore"
USER, ORGANISATION = "somebody", "some-lab"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
"""What every repository has, and nobody needs who loads the model."""
PART = 96 * 1024
"""Objects that are larger are uploaded in parts of that size."""


@dataclass
class Fault:
    """What the server does wrong to requests that fit.

    Attributes:
        method, path: of the request; the path is an expression that is searched for.
        code, headers: the answer instead of the true one; 0 for the true one.
        message: the error's text.
        cut: break the connection off in the middle of the content, whichever way it goes.
        times: how often.
    """

    method: str
    path: str
    code: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    cut: bool = False
    times: float = math.inf


@dataclass
class Repository:
    """A model: what each commit holds, and which commit each branch, tag and pull request is at."""

    commits: dict[str, dict[str, bytes]]
    heads: dict[str, str]
    private: bool = False
    gated: bool = False
    log: list[str] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.heads.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.heads["main"]]


@dataclass
class Hub:
    """What the server has, does wrong, and was asked for.

    Attributes:
        repositories: by name.
        objects: large files that have arrived, by sha256; parts of one that has not, by (sha256, number).
        faults: what it does wrong; the first that fits is done.
        harmed: files that are delivered with one byte changed.
        asked: method and path of each request.
        received: bytes of each object's content that arrived, however often, by sha256.
        leaked: requests to the storage, which is no part of the Hub, that had a token with them.
        waited: the seconds that a client in this process would have slept.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=lambda: {TOKEN: "write", READ_TOKEN: "read"})
    faults: list[Fault] = field(default_factory=list)
    harmed: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)
    leaked: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    address: str = ""

    @property
    def storage(self) -> str:
        """Where large files lie: at another host."""
        return f"{self.address.replace('127.0.0.1', 'localhost')}/storage"

    def add(self, name: str, files: dict[str, bytes], commit: str = COMMIT, tags: tuple[str, ...] = ()) -> Repository:
        made = Repository({commit: files}, {"main": commit, **dict.fromkeys(tags, commit)})
        self.repositories[name] = made
        return made


def is_large(name: str, content: bytes) -> bool:
    return name.endswith((".safetensors", ".bin", ".model")) or len(content) > 10_000_000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    def __init__(self, code: int, message: str = "", **headers: str) -> None:
        self.code, self.message, self.headers = code, message, headers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.hub.asked.append(f"{self.command} {self.route}")
        fits = (
            fault
            for fault in self.hub.faults
            if fault.times > 0 and fault.method == self.command and re.search(fault.path, self.route)
        )
        fault = next(fits, None)
        if fault is not None:
            fault.times -= 1
        self.cut = fault is not None and fault.cut
        try:
            self.body = self.read_body()
            if fault is not None and fault.code:
                headers = {key.replace("_", "-"): value for key, value in fault.headers.items()}
                self.tell(fault.code, {"error": fault.message}, {**headers, "X-Error-Message": fault.message})
                return
            self.answer()
        except Refused as refused:
            headers = {key.replace("_", "-"): value for key, value in refused.headers.items()}
            if refused.message:
                headers["X-Error-Message"] = refused.message
            self.tell(refused.code, {"error": refused.message}, headers)
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        self.serve()

    def do_HEAD(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def do_PUT(self) -> None:
        self.serve()

    def read_body(self) -> bytes:
        """The content; where the connection is to be cut, only half of it."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
                if self.cut:
                    self.break_off()
            self.rfile.readline()
            return content
        length = int(self.headers.get("Content-Length", 0))
        if self.cut and length and self.command in ("PUT", "POST"):
            self.rfile.read(length // 2)
            self.break_off()
        return self.rfile.read(length)

    def break_off(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        raise ConnectionAbortedError

    def answer(self) -> None:
        if self.route.startswith("/storage/"):
            self.storage()
            return
        self.role = self.who()
        patterns = {
            r"GET /api/whoami-v2": self.whoami,
            r"POST /api/repos/create": self.create,
            r"POST /api/validate-yaml": self.validate,
            r"GET /api/models/([^/]+/[^/]+)/auth-check(?:/write)?": self.auth_check,
            r"GET /api/models/([^/]+/[^/]+)/tree/(.+)": self.tree,
            r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self.info,
            r"POST /api/models/([^/]+/[^/]+)/branch/(.+)": self.branch,
            r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)": self.preupload,
            r"POST /api/models/([^/]+/[^/]+)/commit/(.+)": self.commit,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.batch,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/verify": self.verify,
            r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)": self.resolve,
        }
        for pattern, method in patterns.items():
            if found := re.fullmatch(pattern, f"{self.command} {self.route}"):
                method(*found.groups())
                return
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    def who(self) -> str | None:
        """What the token may do; as on the Hub, a wrong one is refused even where none is needed."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        role = self.hub.tokens.get(given.removeprefix("Bearer "))
        if role is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return role

    def repository(self, name: str, write: bool = False) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.role is None):
            # The Hub does not tell strangers what there is not.
            raise Refused(404 if self.role else 401, "Repository not found", X_Error_Code="RepoNotFound")
        if found.gated:
            raise Refused(403, f"Access to model {name} is restricted.", X_Error_Code="GatedRepo")
        if write and (self.role != "write" or name.split("/")[0] not in (USER, ORGANISATION)):
            raise Refused(403, "You don't have the right to write to this repository")
        return found

    def revision(self, name: str, revision: str, write: bool = False) -> tuple[str, dict[str, bytes]]:
        found = self.repository(name, write).at(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", X_Error_Code="RevisionNotFound")
        return found

    def whoami(self) -> None:
        if self.role is None:
            raise Refused(401, "Unauthorized")
        orgs = [{"type": "org", "name": ORGANISATION, "roleInOrg": "write"}]
        token = {"displayName": "a token", "role": self.role}
        told = {"type": "user", "name": USER, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}
        self.tell(200, told)

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or USER
        name = f"{owner}/{asked['name']}"
        if self.role != "write" or owner not in (USER, ORGANISATION):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        told = {"name": name, "url": f"{self.hub.address}/{name}"}
        if name in self.hub.repositories:
            self.tell(409, {"error": "You already created this model repo", **told})
            return
        made = self.hub.add(name, {".gitattributes": ATTRIBUTES})
        made.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.tell(200, told)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        try:
            told = yaml.safe_load(block[1]) if block else {}
            for entry in told.get("model-index", ()):
                for result in entry["results"]:
                    _ = result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]
                    _ = [(metric["type"], metric["value"]) for metric in result["metrics"]]
            if told.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
                errors.append('"base_model_relation" must be one of [adapter, finetune, merge, quantized]')
        except (yaml.YAMLError, KeyError, AttributeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        shown = [{"message": message} for message in errors]
        self.tell(400 if errors else 200, {"errors": shown, "warnings": [], "error": "; ".join(errors) or None})

    def auth_check(self, name: str) -> None:
        self.repository(name, write=self.route.endswith("/write"))
        self.tell(200, {})

    def info(self, name: str, revision: str | None) -> None:
        commit, files = self.revision(name, revision or "main")
        told: dict[str, Any] = {"id": name, "sha": commit, "private": self.repository(name).private}
        card = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), re.DOTALL)
        told |= {"cardData": yaml.safe_load(card[1])} if card else {}
        self.tell(200, {**told, "siblings": [{"rfilename": file} for file in files]})

    def tree(self, name: str, revision: str) -> None:
        _, files = self.revision(name, revision)
        told = []
        for file, content in files.items():
            entry = {"type": "file", "path": file, "size": len(content), "oid": git_hash(content)}
            if is_large(file, content):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            told.append(entry)
        self.tell(200, told)

    def branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if branch in repository.heads:
            raise Refused(409, "Reference already exists")
        repository.heads[branch] = repository.heads["main"]
        self.tell(200, {})

    def preupload(self, name: str, revision: str) -> None:
        _, there = self.revision(name, revision, write="create_pr" not in self.query)
        told = []
        for file in json.loads(self.body)["files"]:
            path, known = file["path"], there.get(file["path"])
            large = is_large(path, b"") or file["size"] > 10_000_000
            oid = None if known is None else (sha256 if large else git_hash)(known)
            told.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self.tell(200, {"files": told})

    def batch(self, name: str) -> None:
        self.repository(name)
        told = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                place = f"{self.hub.storage}/{oid}"
                upload: dict[str, Any] = {"href": place}
                if size > PART:
                    numbers = range(1, math.ceil(size / PART) + 1)
                    upload["header"] = {"chunk_size": str(PART), **{f"{n:05d}": f"{place}/{n}" for n in numbers}}
                entry["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.hub.address}/{name}.git/info/lfs/verify"},
                }
            told.append(entry)
        self.tell(200, {"transfer": "multipart", "objects": told})

    def verify(self, name: str) -> None:
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "the object has not arrived")
        self.tell(200, {})

    def storage(self) -> None:
        """Where large files lie: another service than the Hub, which must never see a token."""
        if "Authorization" in self.headers:
            self.hub.leaked.append(f"{self.command} {self.route}")
        _, _, oid, *number = self.route.split("/")
        if self.command == "PUT":
            self.hub.received[oid] = self.hub.received.get(oid, 0) + len(self.body)
            if number:
                self.hub.parts[oid, int(number[0])] = self.body
            else:
                self.keep(oid, self.body)
            self.tell(200, {}, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})
        elif self.command == "POST":
            count = len(json.loads(self.body)["parts"])
            self.keep(oid, b"".join(self.hub.parts.pop((oid, n)) for n in range(1, count + 1)))
            self.tell(200, {})
        else:
            self.deliver(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def keep(self, oid: str, content: bytes) -> None:
        if sha256(content) != oid:
            raise Refused(400, "the content has another hash")
        self.hub.objects[oid] = content

    def commit(self, name: str, revision: str) -> None:
        pull = "create_pr" in self.query
        before, there = self.revision(name, revision, write=not pull)
        repository, files = self.repository(name), dict(there)
        summary = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                summary = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"{value['path']} points to a large file that has not arrived")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        made = hashlib.sha1(before.encode() + self.body).hexdigest()
        repository.commits[made] = files
        repository.log.append(summary)
        target = f"refs/pr/{sum(head.startswith('refs/pr/') for head in repository.heads) + 1}" if pull else revision
        repository.heads[target] = made
        told = {"success": True, "commitOid": made, "commitUrl": f"{self.hub.address}/{name}/commit/{made}"}
        if pull:
            told["pullRequestUrl"] = f"{self.hub.address}/{name}/discussions/{target.rsplit('/', 1)[-1]}"
        self.tell(200, told)

    def resolve(self, name: str, revision: str, file: str) -> None:
        commit, files = self.revision(name, revision)
        if file not in files:
            raise Refused(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[file]
        headers = {"X-Repo-Commit": commit}
        if not is_large(file, content):
            self.deliver(content, {**headers, "ETag": f'"{git_hash(content)}"'})
            return
        oid = sha256(content)
        self.hub.objects[oid] = bytes([content[0] ^ 1]) + content[1:] if file in self.hub.harmed else content
        place = f"{self.hub.storage}/{oid}"
        headers |= {"Location": place, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self.tell(302, {}, headers)

    def deliver(self, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the part of it that is asked for."""
        code, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            code, total, content = 206, len(content), content[first : last + 1]
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{total}"}
        self.send(code, content, headers)

    def tell(self, code: int, told: Any, headers: dict[str, str] | None = None) -> None:
        self.send(code, json.dumps(told, default=str).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.break_off()
        self.wfile.write(body)


@contextlib.contextmanager
def serving(folder: Path | None = None) -> Iterator[Hub]:
    """Serve a Hub; a model folder is on it as `owner/tiny`, with the tag `v1`."""
    hub = Hub()
    if folder is not None:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.add("owner/tiny", {".gitattributes": ATTRIBUTES, **files}, tags=("v1",))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: Hub, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
    """What a process needs to take the server for the Hub; its cache is in the folder."""
    told = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    told |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
    told |= {"LLMPRUNE_CACHE": str(folder / "llmprune")}
    return told if token is None else {**told, "HF_TOKEN": token}


def reach(hub: Hub, patch: pytest.MonkeyPatch, folder: Path, token: str | None = TOKEN) -> None:
    """Let this process take the server for the Hub, as `environment` does for one that begins; nothing waits."""
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(time, "sleep", lambda seconds: hub.waited.append(seconds))
    patch.setenv("LLMPRUNE_CACHE", str(folder / "llmprune"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
