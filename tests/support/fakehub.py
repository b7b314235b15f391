"""A stand-in for the file API of the Hugging Face hub, on loopback: one data set, held in memory."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"


class FakeHub:
    """Serves `files` (path in the data set -> content) as the data set `name` at `url` inside a with block.

    `requests` are the (method, path) seen. `failures` holds HTTP statuses that the next reads of .gz
    files answer before the server gets well.
    """

    def __init__(self, files: dict[str, bytes], *, name: str = "allenai/c4", commit: str = COMMIT):
        self.files, self.name, self.commit = files, name, commit
        self.requests: list[tuple[str, str]] = []
        self.failures: list[int] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "FakeHub":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

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
        api, content = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
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
            revision, _, name = path.removeprefix(content).partition("/")
            return self._content(name) if revision in ("main", hub.commit) else self._missing("RevisionNotFound")
        return self._missing("RepoNotFound")

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def _missing(self, code: str) -> None:
        self._json({"error": code}, 404, **{"X-Error-Code": code, "X-Error-Message": code})

    def _content(self, name: str) -> None:
        if name not in self.hub.files:
            return self._missing("EntryNotFound")
        if self.command == "GET" and name.endswith(".gz") and self.hub.failures:
            return self._json({"error": "overloaded"}, self.hub.failures.pop(0))
        data = self.hub.files[name]
        headers = {"ETag": f'"{_oid(name)}"', "X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
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
