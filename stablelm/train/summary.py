"""`summary.json`: how an attempt ended, for programs that decide whether to start another."""

import json
from pathlib import Path
from typing import Any

from stablelm.new_files import replace_file
from stablelm.small_files import read_small


def write_summary(run_dir: str | Path, summary: dict[str, Any]) -> None:
    """Replaces the file in one step; a failing rank's word about this attempt is not overwritten.

    When one rank fails, its peers fail after it for lack of it: the first cause is the true one.
    """
    path = Path(run_dir) / "summary.json"
    earlier = read_summary(run_dir)
    if earlier.get("attempts") == summary.get("attempts") and earlier.get("exit_code") is not None:
        return
    replace_file(path, json.dumps(summary, indent=2) + "\n")


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """The last attempt's summary; empty where there is none or it is torn."""
    try:
        return json.loads(read_small(Path(run_dir) / "summary.json"))
    except (OSError, ValueError):
        return {}
