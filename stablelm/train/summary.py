"""`summary.json`: how an attempt ended, for programs that decide whether to start another."""

import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from stablelm.errors import EXIT_FINISHED, EXIT_STOPPED_EARLY
from stablelm.json_text import Count, Number, as_number, parse
from stablelm.new_files import replace_file
from stablelm.small_files import read_small
from stablelm.supervise import attempts


class Summary(TypedDict, total=False):
    """What is read back of a summary; the rest may be anything."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    exit_code: int | None
    reason: str
    attempts: Count
    step: Count
    tokens: Count
    loss: Number | str | None
    val_loss: dict[str, Number | str] | None
    tokens_per_second: Number | str | None
    params: Count


def write_summary(run_dir: str | Path, summary: dict[str, Any]) -> None:
    """Replaces the file in one step, but not the word of a later attempt, nor an attempt's own.

    When one rank fails, its peers fail after it for lack of it: the first cause is the true one. Nor does an attempt
    tell of a failure once a later one has begun, which it may fail for.
    """
    path, attempt = Path(run_dir) / "summary.json", summary.get("attempts", 0)
    earlier = read_summary(run_dir)
    told = earlier.get("attempts", 0)
    if told > attempt or (told == attempt and earlier.get("exit_code") is not None):
        return
    succeeded = summary.get("exit_code") in (EXIT_FINISHED, EXIT_STOPPED_EARLY)
    if attempts.newest(Path(run_dir)) > attempt and not succeeded:
        return
    replace_file(path, json.dumps(as_number(summary), indent=2, allow_nan=False) + "\n")


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """The last attempt's summary; empty where there is none, or it is not as we write it."""
    try:
        return dict(parse(read_small(Path(run_dir) / "summary.json"), Summary))
    except (OSError, ValueError):
        return {}
