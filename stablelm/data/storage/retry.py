"""A store's failures: which of them another attempt can cure, and how long to wait before it."""

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
T = TypeVar("T")

_jitter = random.Random()


class Retries:
    """The attempts of one read, which may fail for at most `budget` seconds after the first failure.

    With `first_answer` only for so many seconds, unless the store answers that it is busy or broken.

        with Retries(url, budget=600) as retries:
            while True:
                try:
                    return read()
                except Exception as error:
                    retries.wait(error)
    """

    def __init__(self, name: str, *, budget: float, first_answer: float | None = None):
        self._name, self._budget, self._first_answer = name, budget, first_answer
        self._delay, self._began = FIRST_DELAY, 0.0
        self._wait: Wait | None = None
        self._noted = ExitStack()

    def __enter__(self) -> "Retries":
        return self

    def __exit__(self, *_: object) -> None:
        self._noted.close()

    def wait(self, error: Exception, *, where: str = "") -> None:
        """Waits before another attempt: as long as the store asks, else with a jittered exponential back-off.

        Raises DataError naming the file and the cause when the budget is spent, and at once when another attempt
        cannot help; a DataError is raised as it is. `where` in the file is for the message.
        """
        if isinstance(error, DataError):
            raise error
        self._note(error)
        if cause := hopeless(error):
            raise DataError(f"{self._name}: {cause}; {_fix(error)}") from error
        unknown = self._first_answer is not None and http_status(error) is None
        allowed = min(self._budget, self._first_answer) if self._first_answer is not None and unknown else self._budget
        now, deadline = time.monotonic(), self._began + allowed
        if now >= deadline:
            raise DataError(_gave_up(f"{self._name}: unreadable{where} for {allowed:g} s", error, unknown)) from error
        asked = asked_seconds(error)
        pause = self._delay * _jitter.uniform(0.5, 1.0) if asked is None else asked + _jitter.uniform(0, FIRST_DELAY)
        time.sleep(min(pause, deadline - now))
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        assert self._wait is not None
        self._wait.attempt += 1

    def _note(self, error: Exception) -> None:
        """Makes the failure visible in `stall_monitor.waiting`."""
        cause = redacted(words(error))
        if self._wait is None:
            self._wait = Wait(redacted(self._name), 1, time.time(), cause)
            self._began = time.monotonic()
            self._noted.enter_context(noted(self._wait))
        else:
            self._wait.cause = cause


def persist(attempt: Callable[[], T], *, name: str, budget: float, first_answer: float | None = None) -> T:
    """What `attempt` returns; it is repeated as `Retries` allows."""
    with Retries(name, budget=budget, first_answer=first_answer) as retries:
        while True:
            try:
                return attempt()
            except Exception as error:
                retries.wait(error)


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
    for link in _causes(error):
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
    for link in _causes(error):
        response = getattr(link, "response", None)
        headers = getattr(link, "headers", None) or getattr(response, "headers", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        if isinstance(headers, Mapping):
            return {str(name).lower(): str(value) for name, value in headers.items()}
    return {}


def _causes(error: BaseException | None) -> Iterator[Any]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__


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
