"""A stand-in for what the Hugging Face hub answers to uploads, on loopback: models in memory, one commit each."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class UploadHub:
    """Takes uploads at `url` inside a with block by whoever sends TOKEN; `refuses_uploads`: with status 500.

    `repositories`: name -> path -> content; `private`: name -> whether it was created so.
    """

    def __init__(self, *, refuses_uploads: bool = False):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuses_uploads = refuses_uploads
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "UploadHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: UploadHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        self._json({"id": name, "sha": "0" * 40, "siblings": []} if name in self.hub.repositories else {}, 200)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.repositories.setdefault(name, {})
            self.hub.private.setdefault(name, bool(asked.get("private", asked.get("visibility") == "private")))
            return self._json({"url": f"{self.hub.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main(\?.*)?", self.path)
        if found is None or found[1] not in self.hub.repositories:
            return self._json({"error": "Repository not found"}, 404)
        if found[2] == "preupload":
            files = [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
            return self._json({"files": files})
        if self.hub.refuses_uploads:
            return self._json({"error": "out of order"}, 400)
        for line in body.splitlines():
            each = json.loads(line)
            if each["key"] == "file":
                content = base64.b64decode(each["value"]["content"])
                self.hub.repositories[found[1]][each["value"]["path"]] = content
        url = f"{self.hub.url}/{found[1]}/commit/abc"
        return self._json({"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})

    def _json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
