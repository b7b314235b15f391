"""`metrics.jsonl`: every record of a run, always written, from which all other sinks are derived.

A record is a flat dict: `step`, other counters, and metrics by name; or `step`, counters and `samples`, a list of
`prompt` and `text`.
"""

import errno
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from stablelm.errors import ConfigError, StorageError
from stablelm.json_text import Count, as_number, parse
from stablelm.new_files import open_to_append

METRICS = "metrics.jsonl"
COUNTERS = ("step", "tokens", "attempt")
SAMPLES = "samples"
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def storage_error(path: Path, error: OSError) -> StorageError:
    """One sentence for a storage that does not take what we write."""
    fix = "make it writable, or name another run.dir"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space and run again"
    elif error.errno == errno.ENOENT:
        fix = "restore it to resume, or start a new run"
    return StorageError(f"{path} cannot be written ({error.strerror or error}); {fix}")


class Record(TypedDict):
    """A line of metrics.jsonl; metrics by name beside the counters."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    step: Count
    tokens: NotRequired[Count]
    attempt: NotRequired[Count]


class MetricsFile:
    """Append-only lines of JSON, each flushed when written. Floats keep their full precision.

    JSON has no non-finite numbers: they are written as the strings "nan", "inf" and "-inf", which
    `read_metrics` turns back. Opening drops a torn last line. Raises StorageError.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: after a failed write nothing is left to be written at the close.
            self._file = open_to_append(self._path)
            os.ftruncate(self._file.fileno(), _whole_lines(self._path))
        except OSError as error:
            raise storage_error(self._path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(as_number(record), allow_nan=False) + "\n"
        data = line.encode()
        try:
            if not self._path.exists():
                raise FileNotFoundError(errno.ENOENT, "it has been removed while the run was writing to it")
            while data:  # a disk that fills up takes a part first
                data = data[self._file.write(data) :]
        except OSError as error:
            raise storage_error(self._path, error) from error

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> int:
    """Length of the part of the file that ends with a line break, bytes."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete records in the order they were written; a torn last line is dropped.

    Raises ConfigError with the number of a line that is not as we write it.
    """
    records = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            record = parse(line, Record)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: not a record ({error}); delete the line and run again") from None
        records.append({k: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()})
    return records


def last_records(path: str | Path) -> dict[int, dict[str, Any]]:
    """What counts of each step, in the order of steps (see `what_counts`)."""
    return what_counts(read_metrics(path))


def what_counts(records: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """One record a step, in the order of steps, from all that were written.

    An attempt may write several records of a step (training, validation), which add up; a later
    attempt that trains a step again replaces it, one that only evaluates it adds to it, and an attempt's
    own later records replace its earlier ones, name by name.
    """
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        earlier = steps.get(record["step"], {})
        same = earlier.get("attempt") == record.get("attempt") or "loss" not in record
        steps[record["step"]] = {**earlier, **record} if same else record
    return dict(sorted(steps.items()))
