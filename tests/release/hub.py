"""A small in-memory hub: the endpoints that huggingface_hub uses to make repositories and branches, to commit and to
download. A branch is a tree of files; large files use git LFS's basic transfer."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Tree = dict[str, bytes]
LARGE = (".safetensors", ".parquet", ".png")


@dataclass
class Hub:
    """State of the server.

    After `held_after` commits, requests wait until `let_go` is set. `refuse` maps a pattern of paths to the HTTP status
    to answer with."""

    branches: dict[str, Tree] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # the branch of each commit, oldest first
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: int = 0
    visibility: str | None = None
    held_after: int | None = None
    let_go: threading.Event = field(default_factory=threading.Event)
    refuse: dict[str, int] = field(default_factory=dict)
    url: str = ""


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.let_go.set()
        server.shutdown()
        server.server_close()


def oid_of(tree: Tree) -> str:
    """Return a digest of the tree's names and contents, as the id of a commit."""
    digest = hashlib.sha1()
    for name in sorted(tree):
        digest.update(name.encode() + b"\0" + tree[name])
    return digest.hexdigest()


def entry(name: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    listed: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if name.endswith(LARGE):
        listed["oid"] = hashlib.sha1(b"pointer" + content).hexdigest()
        listed["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return listed


class Handler(BaseHTTPRequestHandler):
    """Handler of requests; `serving` makes a subclass with `hub` set."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunked()
        path = self.path.partition("?")[0]
        for pattern, status in self.hub.refuse.items():
            if re.search(pattern, path):
                return self.answer(status, {"error": "refused by the test"})
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, body, *match.groups())
        return self.answer(404, {"error": f"no such thing: {self.command} {path}"}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_POST = do_PUT = do_HEAD = route

    def chunked(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        received = b""
        while size := int(self.rfile.readline(), 16):
            received += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return received

    def create(self, body: bytes) -> None:
        self.hub.visibility = json.loads(body).get("visibility") or (
            "private" if json.loads(body).get("private") else None
        )
        self.hub.branches.setdefault("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, {"url": f"{self.hub.url}/lab/tiny", "name": "lab/tiny"})

    def refs(self, _: bytes) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid_of(tree)}
            for name, tree in self.hub.branches.items()
        ]
        self.answer(200, {"branches": branches, "converts": [], "tags": []})

    def branch(self, _: bytes, name: str) -> None:
        if name in self.hub.branches:
            return self.answer(409, {"error": "exists"})
        self.hub.branches[name] = dict(self.hub.branches["main"])
        return self.answer(200, {})

    def tree(self, _: bytes, name: str) -> None:
        self.answer(200, [entry(path, content) for path, content in self.hub.branches[name].items()])

    def preupload(self, body: bytes, _: str) -> None:
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for one in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, body: bytes) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            if one["oid"] not in self.hub.objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}"}}
            objects.append(one)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if self.hub.held_after is not None and len(self.hub.commits) >= self.hub.held_after:
            self.hub.let_go.wait(300)
            self.close_connection = True
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.uploads += 1
        self.answer(200, {})

    def commit(self, body: bytes, name: str) -> None:
        tree = dict(self.hub.branches[name])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        self.hub.branches[name] = tree
        self.hub.commits.append(name)
        oid = oid_of(tree)
        self.answer(200, {"commitUrl": f"{self.hub.url}/lab/tiny/commit/{oid}", "commitOid": oid})

    def resolve(self, _: bytes, revision: str, path: str) -> None:
        trees = {**{oid_of(tree): tree for tree in self.hub.branches.values()}, **self.hub.branches}
        tree = trees.get(revision)
        if tree is None:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        commit = {"X-Repo-Commit": oid_of(tree)}
        if path not in tree:
            return self.answer(404, {}, {**commit, "X-Error-Code": "EntryNotFound"})
        return self.answer(200, tree[path], {**commit, "ETag": f'"{hashlib.sha256(tree[path]).hexdigest()}"'})

    def yaml(self, _: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def who(self, _: bytes) -> None:
        self.answer(200, {"name": "lab", "type": "user", "orgs": []})


API = "/api/models/lab/tiny"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.yaml),
    (("GET",), "/api/whoami-v2", Handler.who),
    (("GET",), f"{API}/refs", Handler.refs),
    (("POST",), f"{API}/branch/(.+)", Handler.branch),
    (("GET",), f"{API}/tree/([^/]+)", Handler.tree),
    (("POST",), f"{API}/preupload/(.+)", Handler.preupload),
    (("POST",), "/lab/tiny.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/storage/(.+)", Handler.store),
    (("POST",), f"{API}/commit/(.+)", Handler.commit),
    (("GET", "HEAD"), "/lab/tiny/resolve/([^/]+)/(.+)", Handler.resolve),
]
