"""A store's failures: which of them another attempt can cure, and how long to wait before it.

tenacity 9.2.1 was tried: a budget that counts from the first failure and depends on the answer, pauses cut at its end,
waits that are reported and messages of our own are all callbacks there, and the file became longer.
"""

import email.utils
import errno
import io
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from stablelm.data.storage.stall_monitor import Wait, noted
from stablelm.errors import DataError
from stablelm.redaction import redacted
from stablelm.small_files import NOT_REGULAR

FIRST_DELAY, LONGEST_DELAY = 0.25, 30.0
T = TypeVar("T")

_jitter = random.Random()


def persist(
    attempt: Callable[[], T],
    *,
    name: str,
    budget: float,
    first_answer: float | None = None,
    failed: Callable[[Exception], str] = lambda error: "",
) -> T:
    """What `attempt` returns; it is repeated for at most `budget` seconds after the first failure.

    With `first_answer` only for so many seconds, unless the store answers that it is busy or broken. `failed` is called
    with each failure and returns where in the file it was, for the message. A wait is as long as the store asks, else a
    jittered exponential back-off, and visible in `stall_monitor.waiting`. Raises DataError naming the file and the
    cause when the budget is spent, and at once when another attempt cannot help; a DataError is raised as it is.
    """
    wait, began, delay = None, 0.0, FIRST_DELAY
    with ExitStack() as visible:
        while True:
            try:
                return attempt()
            except DataError:
                raise
            except Exception as error:
                where, reason = failed(error), redacted(words(error))
                if wait is None:
                    wait, began = Wait(redacted(name), 1, time.time(), reason), time.monotonic()
                    visible.enter_context(noted(wait))
                wait.cause = reason
                if cause := hopeless(error):
                    raise DataError(f"{name}: {cause}; {_fix(error)}") from error
                limit = first_answer if http_status(error) is None else None
                allowed = budget if limit is None else min(budget, limit)
                remaining = began + allowed - time.monotonic()
                if remaining <= 0:
                    what = f"{name}: unreadable{where} for {allowed:g} s"
                    raise DataError(_gave_up(what, error, limit is not None)) from error
                time.sleep(min(_pause(error, delay), remaining))
                delay = min(2 * delay, LONGEST_DELAY)
                wait.attempt += 1


def _pause(error: Exception, delay: float) -> float:
    asked = asked_seconds(error)
    return delay * _jitter.uniform(0.5, 1.0) if asked is None else asked + _jitter.uniform(0, FIRST_DELAY)


def _gave_up(what: str, error: BaseException, unknown: bool) -> str:
    fix = "run again once the store answers, or raise data.retry_budget"
    return f"{what} ({words(error)}); {'check the address and that this machine reaches it' if unknown else fix}"


def hopeless(error: BaseException) -> str | None:
    """Why another try cannot help; None when it may."""
    if isinstance(error, io.UnsupportedOperation) or "range requests" in str(error):
        return "the server does not serve parts of a file (HTTP range requests)"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "too many open files"
    if isinstance(error, OSError) and error.strerror == NOT_REGULAR:
        return NOT_REGULAR
    status = http_status(error)
    if status == 412:
        return "changed while it was read"
    if status is not None:
        # Of the client errors only a time-out and "too many requests" pass by themselves.
        return f"the server answers {status}" if 400 <= status < 500 and status not in (408, 425, 429) else None
    if isinstance(error, FileNotFoundError):
        # fsspec says "not found" for any failed first request, with the real reason as the cause.
        return "the file no longer exists" if error.__cause__ is None else hopeless(error.__cause__)
    if isinstance(error, (PermissionError, IsADirectoryError)) or "credentials" in type(error).__name__.lower():
        return words(error)
    if isinstance(error, (ImportError, NotImplementedError, TypeError, AttributeError, ValueError)):
        return words(error)
    return None


def http_status(error: BaseException) -> int | None:
    """HTTP status that aiohttp, the hub's client or botocore carry in an error or its cause."""
    for link in causes(error):
        response = getattr(link, "response", None)
        status = getattr(link, "status", None)
        if status is None and isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif status is None:
            status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def asked_seconds(error: BaseException) -> float | None:
    """Seconds for which the store requests no further attempt, None when it requests nothing."""
    headers = _headers(error)
    after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", after):
        return float(after)
    if after:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
        except (TypeError, ValueError):
            return None
    if http_status(error) == 429:
        # RateLimit: "api";r=0;t=55 or RateLimit-Reset: 55, in seconds
        match = re.search(r"(?:^|;)\s*(?:t|reset)=(\d+)", headers.get("ratelimit", "").replace(",", ";"))
        reset = match[1] if match else headers.get("ratelimit-reset", "").strip()
        return float(reset) if reset.isdigit() else None
    return None


def _headers(error: BaseException) -> dict[str, str]:
    for link in causes(error):
        response = getattr(link, "response", None)
        headers = getattr(link, "headers", None) or getattr(response, "headers", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        if isinstance(headers, Mapping):
            return {str(name).lower(): str(value) for name, value in headers.items()}
    return {}


def causes(error: BaseException | None, *, context: bool = False) -> list[Any]:
    """The error and its causes; with `context` also what was handled when one without a cause was raised."""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or (error.__context__ if context else None)
    return links


def _fix(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return "install the package that reads this store"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "use fewer data.lanes, or raise the limit with ulimit -n"
    if isinstance(error, io.UnsupportedOperation) or "range requests" in str(error):
        return "download the files, or use a server that supports ranges"
    if http_status(error) == 412:
        return "put the old file back, or start a new run"
    if http_status(error) in (401, 403):
        return "make it readable with the credentials that the environment gives for this store, then run again"
    if "credentials" in type(error).__name__.lower():
        return "set the variables or files with which the store's own tools find its credentials"
    return "put the file back and make it readable, then run again"


def words(error: BaseException) -> str:
    """An error in one short line."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return words(error.__cause__)  # see `hopeless`
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return " ".join(str(text).split())[:200]
