"""Answers to requests for a range that are not what was asked for; set on a `FaultyServer`."""

import gzip
import re
from collections.abc import Callable

from support.httpserver import FaultyServer, Twist

BY = 120


def bounds(requested: str) -> tuple[int, int] | None:
    """First and last byte of a Range header."""
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", requested)
    return (int(match[1]), int(match[2])) if match else None


def shift(requested: str | None) -> str | None:
    found = bounds(requested or "")
    if found is None or found[0] < BY:
        return requested
    return f"bytes={found[0] - BY}-{found[1] - BY}"


def _twist(change: Callable[[dict[str, str], bytes, str], tuple[dict[str, str], bytes]]) -> Callable[..., None]:
    """Sets a change of headers and body for answers with a part."""

    def twist(status: int, headers: dict[str, str], body: bytes, requested: str):
        if status == 206 and len(body) > BY:
            headers, body = change(dict(headers), body, requested)
        return status, headers, body

    def put(server: FaultyServer) -> None:
        server.twist = twist

    return put


def _length(headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    return {**headers, "Content-Length": str(len(body))}, body


def _range(headers: dict[str, str], text: str) -> dict[str, str]:
    return {**headers, "Content-Range": text}


def _lie(headers: dict[str, str], body: bytes, requested: str) -> tuple[dict[str, str], bytes]:
    first, last = bounds(requested) or (0, 0)
    return _range(headers, f"bytes {first}-{last}/{headers['Content-Range'].rpartition('/')[2]}"), body


def _shifted(server: FaultyServer) -> None:
    server.ask = shift


def _shifted_and_lying(server: FaultyServer) -> None:
    server.ask = shift
    _twist(_lie)(server)


def _other_total(headers: dict[str, str], body: bytes, requested: str) -> tuple[dict[str, str], bytes]:
    told, _, total = headers["Content-Range"].rpartition("/")
    return _range(headers, f"{told}/{int(total) + 1}"), body


def _compressed(headers: dict[str, str], body: bytes, requested: str) -> tuple[dict[str, str], bytes]:
    return _length({**headers, "Content-Encoding": "gzip"}, gzip.compress(body))


def _whole(status: int, headers: dict[str, str], body: bytes, requested: str) -> tuple[int, dict[str, str], bytes]:
    headers = {name: value for name, value in headers.items() if name != "Content-Range"}
    return 200 if status == 206 else status, headers, body


def _set(twist: Twist) -> Callable[[FaultyServer], None]:
    def put(server: FaultyServer) -> None:
        server.twist = twist

    return put


FAULTS: dict[str, Callable[[FaultyServer], None]] = {
    "shifted, as Content-Range says": _shifted,
    "shifted, which Content-Range denies": _shifted_and_lying,
    "other content under another ETag": _twist(lambda h, b, r: ({**h, "ETag": '"other"'}, b[::-1])),
    "other content without an ETag": _twist(lambda h, b, r: ({k: v for k, v in h.items() if k != "ETag"}, b[::-1])),
    "more bytes": _twist(lambda h, b, r: _length(h, b + b"x" * 50)),
    "more bytes without a length": _twist(
        lambda h, b, r: ({k: v for k, v in h.items() if k != "Content-Length"}, b + b"x" * 50)
    ),
    "fewer bytes": _twist(lambda h, b, r: _length(h, b[:-50])),
    "another total": _twist(_other_total),
    "no Content-Range": _twist(lambda h, b, r: ({k: v for k, v in h.items() if k != "Content-Range"}, b)),
    "no range at all": _twist(lambda h, b, r: (_range(h, "bytes */*"), b)),
    "several ranges": _twist(lambda h, b, r: (_range(h, "bytes 0-9/100, bytes 20-29/100"), b)),
    "compressed": _twist(_compressed),
    "a part as if it were all": _set(_whole),
}
"""What a server does with its answers from now on, each of which must end reading with a DataError."""


def well(server: FaultyServer) -> None:
    """No fault any more."""
    server.ask = server.twist = None
    server.failures = server.cuts = 0
    server.trickle = (0, 0.0)
