"""A stand-in for the file API of the Hugging Face hub, on loopback: one data set or model, held in memory."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

COMMIT = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
FORMER_NAME = "somebody/former"  # of the data set, which the hub answers with a redirect
# Written in a way that a client would change if it did not follow to the letter.
SIGNATURE = "response-content-disposition=inline%3B+filename*%3DUTF-8%27%27a&Signature=%41b~c%2F"


class FakeHub:
    """Serves `files` (path in the data set -> content) as the data set `name` at `url` inside a with block.

    With `kind` models it is a model instead.

    `requests` are the (method, path) seen. `failures` holds HTTP statuses that the next reads of .gz
    files answer before the server gets well. `token` is asked for where it is not empty. With `elsewhere`
    contents are redirected to signed addresses of a second server, which answers to GET alone; `credentials` are
    the Authorization headers seen by the hub and by that one.
    """

    def __init__(
        self, files: dict[str, bytes], *, name: str = "allenai/c4", commit: str = COMMIT, elsewhere: bool = False,
        kind: str = "datasets",
    ):  # fmt: skip
        self.kind = kind
        self.files, self.name, self.commit = files, name, commit
        self.requests: list[tuple[str, str]] = []
        self.failures: list[int] = []
        self.token = ""
        self.credentials: dict[str, set[str | None]] = {"hub": set(), "elsewhere": set()}
        self._servers = [_server(self, _Handler)] + ([_server(self, _Elsewhere)] if elsewhere else [])
        self.url, *others = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        self.elsewhere = others[0] if others else ""
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in self._servers
        ]

    def __enter__(self) -> "FakeHub":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    @property
    def api_calls(self) -> list[str]:
        return [path for _, path in self.requests if path.startswith("/api/")]

    def entry(self, path: str) -> dict[str, Any]:
        """What the tree API tells of one file."""
        content = self.files[path]
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"type": "file", "oid": _oid(path), "size": len(content), "path": path, "lfs": lfs}

    def children(self, folder: str) -> list[dict[str, Any]]:
        """Files and folders directly below `folder` ('' is the root)."""
        prefix = f"{folder}/" if folder else ""
        below = sorted({path[len(prefix) :].split("/")[0] for path in self.files if path.startswith(prefix)})
        return [self.describe(prefix + name) for name in below]

    def describe(self, path: str) -> dict[str, Any]:
        return self.entry(path) if path in self.files else {"type": "directory", "oid": _oid(path), "path": path}


def _oid(path: str) -> str:
    return hashlib.sha1(path.encode()).hexdigest()


def _server(hub: FakeHub, handler: type["_Handler"]) -> ThreadingHTTPServer:
    return ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, self.path))
        hub.credentials["hub"].add(self.headers.get("Authorization"))
        api = f"/api/{hub.kind}/{hub.name}"
        content = f"/{hub.name}/resolve/" if hub.kind == "models" else f"/{hub.kind}/{hub.name}/resolve/"
        if path == api or re.fullmatch(re.escape(api) + "/revision/[^/]+", path):
            if path.rsplit("/revision/", 1)[-1] not in (path, "main", hub.commit):
                return self._missing("RevisionNotFound")
            siblings = [{"rfilename": name} for name in hub.files]
            return self._json({"id": hub.name, "sha": hub.commit, "private": False, "tags": [], "siblings": siblings})
        if path.startswith(api + "/paths-info/"):
            wanted = json.loads(body)["paths"]
            known = [p for p in wanted if p in hub.files or hub.children(p)]
            return self._json([hub.describe(p) for p in known])
        if path.startswith(api + "/tree/"):
            folder = path.removeprefix(api + "/tree/").partition("/")[2].rstrip("/")
            return self._json(hub.children(folder))
        if path.startswith(content):
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._json({"error": "GatedRepo"}, 401, **{"X-Error-Code": "GatedRepo"})
            revision, _, name = path.removeprefix(content).partition("/")
            return self._content(name) if revision in ("main", hub.commit) else self._missing("RevisionNotFound")
        if path.startswith(f"/datasets/{FORMER_NAME}/"):
            return self._send(b"", 307, {"Location": self.path.replace(FORMER_NAME, hub.name, 1)})
        return self._missing("RepoNotFound")

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def _missing(self, code: str) -> None:
        self._json({"error": code}, 404, **{"X-Error-Code": code, "X-Error-Message": code})

    def _content(self, name: str) -> None:
        if name not in self.hub.files:
            return self._missing("EntryNotFound")
        if self.hub.elsewhere:
            location = f"{self.hub.elsewhere}/{quote(name)}?{SIGNATURE}"
            linked = {"X-Linked-Size": str(len(self.hub.files[name])), "X-Linked-ETag": f'"{_oid(name)}"'}
            return self._send(b"", 302, {"Location": location, **linked})
        self._serve(name, {"ETag": f'"{_oid(name)}"', "Accept-Ranges": "bytes"})

    def _serve(self, name: str, headers: dict[str, str]) -> None:
        if self.command == "GET" and name.endswith(".gz") and self.hub.failures:
            return self._json({"error": "overloaded"}, self.hub.failures.pop(0))
        data = self.hub.files[name]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return self._send(data, 200, headers)
        start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        self._send(data[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": self.hub.commit}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Elsewhere(_Handler):
    """Where contents are redirected to: it knows neither the hub's tags nor its tokens."""

    def _answer(self) -> None:
        path, _, signature = self.path.partition("?")
        given = self.headers.get("Authorization")
        self.hub.credentials["elsewhere"].add(given)
        if self.command != "GET" or signature != SIGNATURE or given is not None:
            return self._send(b"", 403, {})
        if "If-Match" in self.headers:
            return self._send(b"", 412, {})
        return self._serve(unquote(path.lstrip("/")), {"ETag": '"of-its-own"'})
