"""A store's failures: which pass by themselves, and how long to wait for that."""

import email.utils
import errno
import io
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
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
    place: Callable[[], str] = lambda: "",
    failed: Callable[[], None] = lambda: None,
) -> T:
    """What `attempt` returns; it is repeated for at most `budget` seconds after its first failure.

    With `first_answer` only for so many seconds, unless the store answers that it is busy or broken.
    Waits as long as the store asks (Retry-After, RateLimit), else with a jittered exponential back-off.
    `failed` runs after each failure; `place` says where, for the message. Raises DataError naming the file
    and the cause when the budget is spent, and at once when another try cannot help.
    """
    try:
        return attempt()
    except DataError:
        raise
    except Exception as error:
        first = error
    wait = Wait(redacted(name), 1, time.time(), redacted(words(first)))
    began, delay, error = time.monotonic(), FIRST_DELAY, first
    with noted(wait):
        while True:
            failed()
            if cause := hopeless(error):
                raise DataError(f"{name}: {cause}; {_mend(error)}") from error
            unknown = first_answer is not None and http_status(error) is None
            allowed = min(budget, first_answer) if first_answer is not None and unknown else budget
            now, deadline = time.monotonic(), began + allowed
            if now >= deadline:
                raise DataError(_gave_up(f"{name}: unreadable{place()} for {allowed:g} s", error, unknown)) from error
            asked = asked_seconds(error)
            pause = delay * _jitter.uniform(0.5, 1.0) if asked is None else asked + _jitter.uniform(0, FIRST_DELAY)
            time.sleep(min(pause, deadline - now))
            delay = min(2 * delay, LONGEST_DELAY)
            wait.attempt += 1
            try:
                return attempt()
            except DataError:
                raise
            except Exception as again:
                error = again
                wait.cause = redacted(words(error))


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
        return "the file is not there any more" if error.__cause__ is None else hopeless(error.__cause__)
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
    """Seconds that the store asks to be left alone, None when it does not say."""
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


def _mend(error: BaseException) -> str:
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
