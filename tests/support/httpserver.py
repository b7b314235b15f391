"""A file server with byte ranges on 127.0.0.1 that can be told to misbehave."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer:
    """Serves a folder at `url`; the attributes are faults, changed at any time by the test."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ranges = True  # whether Range headers are honoured
        self.failures = 0  # answer so many requests (HEAD too) with `status`
        self.status = 503
        self.cuts = 0  # cut so many GET bodies after `cut_after` bytes
        self.cut_after = 1000
        self.down = False  # close every connection without an answer
        self.requests: list[str] = []  # "GET /name bytes=0-9"
        server = self

        class Handler(_Handler):
            faults = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: FaultyServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        faults = self.faults
        wanted = self.headers.get("Range")
        faults.requests.append(f"{self.command} {self.path} {wanted or ''}".strip())
        if faults.down:
            return self._hang_up()
        if faults.failures > 0:
            faults.failures -= 1
            return self._empty(faults.status)
        file = faults.folder / self.path.lstrip("/").split("?")[0]
        if not file.is_file():
            return self._empty(404)
        self._send(file.read_bytes(), wanted if faults.ranges else None, body=body)

    def _send(self, data: bytes, wanted: str | None, *, body: bool) -> None:
        total, part, first = len(data), data, 0
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if match:
            first = int(match[1])
            part = data[first : int(match[2]) + 1 if match[2] else None]
        if match and not part:
            return self._empty(416)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{total}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not body:
            return None
        if self.faults.cuts > 0 and len(part) > self.faults.cut_after:
            self.faults.cuts -= 1
            self.wfile.write(part[: self.faults.cut_after])
            return self._hang_up()
        self.wfile.write(part)
        return None

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)


@contextmanager
def serve(folder: Path):
    """A FaultyServer over `folder` for the time of a with-block."""
    server = FaultyServer(folder)
    try:
        yield server
    finally:
        server.close()
