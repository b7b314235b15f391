"""A file server with byte ranges on 127.0.0.1, or a proxy before another server, that can be told to misbehave."""

import hashlib
import http.client
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Twist = Callable[[int, dict[str, str], bytes, str], tuple[int, dict[str, str], bytes]]
"""(status, headers, body, requested range) of a GET's answer -> what is sent; the body may differ from its length."""


class FaultyServer:
    """Serves a folder, or what the server at `upstream` does, at `url`.

    The attributes are faults, changed at any time by the test.
    """

    def __init__(self, folder: Path | None = None, upstream: str = "", *, host: str = "127.0.0.1", port: int = 0):
        self.folder, self._host = folder, host
        self.upstream = upstream
        self.ranges = True  # whether Range headers are honoured
        self.tags = False  # whether files have an ETag, and If-Match is honoured
        self.failures = 0  # answer so many requests (HEAD too) with `status`
        self.status = 503
        self.failure_headers: dict[str, str] = {}
        self.cuts = 0  # cut so many GET bodies after `cut_after` bytes
        self.cut_after = 1000
        self.draw: random.Random | None = None  # cut anywhere instead, and cut and fail only now and then
        self.down = False  # close every connection without an answer
        self.ask: Callable[[str | None], str | None] | None = None  # the Range header that is served instead
        self.twist: Twist | None = None  # what is sent instead
        self.trickle: tuple[int, float] = (0, 0.0)  # bytes a piece of a body, and seconds between pieces
        self.before: Callable[[str], None] | None = None  # called with each request, and may change the faults
        self.moved: tuple[int, str] | None = None  # a redirect that answers everything: status and address
        self.wanted: tuple[str, str] | None = None  # a header without which all answers are 401
        self.requests: list[str] = []  # "GET /name bytes=0-9"
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(_Handler):
            faults = server

        self._handler = Handler
        self._listen(port)
        self.url = f"http://{host}:{self._server.server_address[1]}"

    def _listen(self, port: int) -> None:
        self._server = _Server((self._host, port), self._handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nothing listens any more, and open connections are cut at their next request."""
        self.down = True
        self.close()

    def start(self) -> None:
        """Listens again at the same address."""
        self.down = False
        self._listen(int(self.url.rsplit(":", 1)[1]))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may leave when it likes
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: FaultyServer
    requested = ""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    do_POST = do_PUT = do_GET

    def _answer(self, *, body: bool) -> None:
        faults = self.faults
        wanted = self.headers.get("Range")
        request = f"{self.command} {self.path} {wanted or ''}".strip()
        faults.requests.append(request)
        faults.headers.append(dict(self.headers))
        if faults.before is not None:
            faults.before(request)
        if faults.ask is not None and body:
            served = faults.ask(wanted)
            if served is not None:
                self.headers.replace_header("Range", served)
            self.requested, wanted = wanted or "", served
        else:
            self.requested = wanted or ""
        if faults.down:
            return self._hang_up()
        if faults.failures > 0 and (faults.draw is None or faults.draw.random() < 0.5):
            faults.failures -= 1
            return self._empty(faults.status, faults.failure_headers)
        if faults.wanted is not None and self.headers.get(faults.wanted[0]) != faults.wanted[1]:
            return self._empty(401)
        if faults.moved is not None:
            return self._empty(faults.moved[0], {"Location": faults.moved[1]})
        if faults.upstream:
            return self._forward(body=body)
        assert faults.folder is not None
        file = faults.folder / self.path.lstrip("/").split("?")[0]
        if not file.is_file():
            return self._empty(404)
        data = file.read_bytes()
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        if faults.tags and self.headers.get("If-Match", tag) != tag:
            return self._empty(412)
        headers = {"ETag": tag} if faults.tags else {}
        self._send(data, wanted if faults.ranges else None, headers, body=body)

    def _forward(self, *, body: bool) -> None:
        other = http.client.HTTPConnection(urlsplit(self.faults.upstream).netloc, timeout=30)
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        other.request(self.command, self.path, sent, headers)
        answer = other.getresponse()
        data = answer.read()
        headers = {
            name.title().replace("Etag", "ETag"): value
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server")
        }
        # The length of a HEAD's answer is that of the body which is not there.
        length = answer.headers.get("Content-Length") if self.command == "HEAD" else None
        other.close()
        self._emit(answer.status, {**headers, "Content-Length": length or str(len(data))}, data, body=body)

    def _send(self, data: bytes, wanted: str | None, headers: dict[str, str], *, body: bool) -> None:
        total, part, first = len(data), data, 0
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if match:
            first = int(match[1])
            part = data[first : int(match[2]) + 1 if match[2] else None]
        if match and not part:
            return self._empty(416)
        if match:
            headers = {**headers, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{total}"}
        self._emit(206 if match else 200, {**headers, "Content-Length": str(len(part))}, part, body=body)
        return None

    def _emit(self, status: int, headers: dict[str, str], part: bytes, *, body: bool) -> None:
        if self.faults.twist is not None and body:
            status, headers, part = self.faults.twist(status, headers, part, self.requested)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self._write(part)
        if int(headers.get("Content-Length", -1)) != len(part):
            self.close_connection = True

    def _write(self, part: bytes) -> None:
        faults = self.faults
        after = faults.draw.randrange(max(len(part), 1)) if faults.draw else faults.cut_after
        if faults.cuts > 0 and len(part) > after and (faults.draw is None or faults.draw.random() < 0.7):
            faults.cuts -= 1
            self.wfile.write(part[:after])
            return self._hang_up()
        size, seconds = faults.trickle
        for at in range(0, len(part), size or max(len(part), 1)):
            self.wfile.write(part[at : at + (size or len(part))])
            time.sleep(seconds)
        return None

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)


@contextmanager
def serve(folder: Path | None = None, upstream: str = ""):
    """A FaultyServer for the time of a with-block."""
    server = FaultyServer(folder, upstream)
    try:
        yield server
    finally:
        server.close()


if __name__ == "__main__":  # FOLDER HOST PORT, until it is killed
    forever = FaultyServer(Path(sys.argv[1]), host=sys.argv[2], port=int(sys.argv[3]))
    forever.before = lambda request: print(request, flush=True)
    threading.Event().wait()
