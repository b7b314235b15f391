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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from stablelm.data.storage.stall_monitor import Wait, noted
from stablelm.errors import DataError
from stablelm.redaction import redacted
from stablelm.small_files import NOT_REGULAR

FIRST_DELAY, LONGEST_DELAY = 0.25, 30.0
NO_RANGES = "the server does not serve parts of a file (HTTP range requests)"
PUT_BACK = "put the file back and make it readable, then run again"
GIVE_ACCESS = "make it readable with the credentials that the environment gives for this store, then run again"
NO_CURE = (PermissionError, IsADirectoryError, NotImplementedError, TypeError, AttributeError, ValueError)
T = TypeVar("T")

_jitter = random.Random()


class Retries:
    """The attempts of one read: `wait` is called with each failure, and returns when it is time for the next attempt.

    They last for at most `budget` seconds after the first failure; with `first_answer` only for so many, unless the
    store answers that it is busy or broken. A wait is as long as the store asks, else a jittered exponential back-off,
    and visible in `stall_monitor.waiting` until the with block ends.
    """

    def __init__(self, name: str, *, budget: float, first_answer: float | None = None):
        self._name, self._budget, self._first_answer = name, budget, first_answer
        self._wait: Wait | None = None
        self._began, self._delay, self._visible = 0.0, FIRST_DELAY, ExitStack()

    def __enter__(self) -> "Retries":
        return self

    def __exit__(self, *_: object) -> None:
        self._visible.close()

    def wait(self, error: Exception, where: str = "") -> None:
        """Raises DataError naming the file, `where` in it and the cause when the budget is spent, and at once when
        another attempt cannot help; a DataError is raised as it is."""
        if isinstance(error, DataError):
            raise error
        wait = self._noted(redacted(words(error)))
        if hopeless := _cause_and_fix(error):
            raise DataError(f"{self._name}: {'; '.join(hopeless)}") from error
        limit = self._first_answer if http_status(error) is None else None
        allowed = self._budget if limit is None else min(self._budget, limit)
        remaining = self._began + allowed - time.monotonic()
        if remaining <= 0:
            what = f"{self._name}: unreadable{where} for {allowed:g} s"
            raise DataError(_gave_up(what, error, limit is not None)) from error
        time.sleep(min(_pause(error, self._delay), remaining))
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        wait.attempt += 1

    def _noted(self, reason: str) -> Wait:
        if self._wait is None:
            self._wait, self._began = Wait(redacted(self._name), 1, time.time(), reason), time.monotonic()
            self._visible.enter_context(noted(self._wait))
        self._wait.cause = reason
        return self._wait


def persist(attempt: Callable[[], T], *, name: str, budget: float, first_answer: float | None = None) -> T:
    """What `attempt` returns, repeated as `Retries` allows."""
    with Retries(name, budget=budget, first_answer=first_answer) as retries:
        while True:
            try:
                return attempt()
            except Exception as error:
                retries.wait(error)


def _pause(error: Exception, delay: float) -> float:
    asked = asked_seconds(error)
    return delay * _jitter.uniform(0.5, 1.0) if asked is None else asked + _jitter.uniform(0, FIRST_DELAY)


def _gave_up(what: str, error: BaseException, unknown: bool) -> str:
    fix = "run again once the store answers, or raise data.retry_budget"
    return f"{what} ({words(error)}); {'check the address and that this machine reaches it' if unknown else fix}"


def _cause_and_fix(error: BaseException) -> tuple[str, str] | None:
    """Why another try cannot help, and what can; None when it may."""
    kind = type(error).__name__.lower()
    if isinstance(error, io.UnsupportedOperation) or "range requests" in str(error):
        return NO_RANGES, "download the files, or use a server that supports ranges"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return "too many open files", "use fewer data.lanes, or raise the limit with ulimit -n"
    if isinstance(error, OSError) and error.strerror == NOT_REGULAR:
        return NOT_REGULAR, PUT_BACK
    status = http_status(error)
    if status == 412:
        return "changed while it was read", "put the old file back, or start a new run"
    if status is not None:
        # Of the client errors only a time-out and "too many requests" pass by themselves.
        passes = not 400 <= status < 500 or status in (408, 425, 429)
        return None if passes else (f"the server answers {status}", GIVE_ACCESS if status in (401, 403) else PUT_BACK)
    if isinstance(error, FileNotFoundError):
        # fsspec says "not found" for any failed first request, with the real reason as the cause.
        return ("the file no longer exists", PUT_BACK) if error.__cause__ is None else _cause_and_fix(error.__cause__)
    if "credentials" in kind:
        return words(error), "set the variables or files with which the store's own tools find its credentials"
    if isinstance(error, ImportError):
        return words(error), "install the package that reads this store"
    return (words(error), PUT_BACK) if isinstance(error, NO_CURE) else None


def http_status(error: BaseException) -> int | None:
    """HTTP status of the answer in an error or its cause."""
    return next((status for status, _ in _answers(error) if isinstance(status, int)), None)


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
    found = next((headers for _, headers in _answers(error) if isinstance(headers, Mapping)), {})
    return {str(name).lower(): str(value) for name, value in found.items()}


def _answers(error: BaseException) -> Iterator[tuple[Any, Any]]:
    """Status and headers that aiohttp, the hub's client or botocore carry in an error or its causes."""
    for link in causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            about = response.get("ResponseMetadata", {})
            yield getattr(link, "status", None) or about.get("HTTPStatusCode"), about.get("HTTPHeaders")
        else:
            status = getattr(link, "status", None) or getattr(response, "status_code", None)
            yield status, getattr(link, "headers", None) or getattr(response, "headers", None)


def causes(error: BaseException | None, *, context: bool = False) -> list[Any]:
    """The error and its causes; with `context` also what was handled when one without a cause was raised."""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or (error.__context__ if context else None)
    return links


def words(error: BaseException) -> str:
    """An error in one short line."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return words(error.__cause__)  # see `hopeless`
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return " ".join(str(text).split())[:200]
