"""Paths as a user writes them, in a key or an option: `~` is the home directory, variables are the shell's business."""

import os
import re

from stablelm.errors import ConfigError

FILE = "file://"


def expand(path: str, label: str) -> str:
    """`path` with a leading `~` or `~user` replaced by that home directory; URLs stay as they are.

    `label` comes before the path in messages: `run.dir=` or `--out `. Raises ConfigError for a `$`, which would
    otherwise become part of a name, and for an unknown user.
    """
    if "$" in path:
        home = re.match(r"\$(?:HOME\b|\{HOME\})", path)
        fix = f"write ~{path[home.end() :]}" if home else "write its value, or let the shell expand it"
        raise ConfigError(f"{label}{path} holds a $, but variables are not expanded in paths; {fix}")
    if path.startswith(FILE):
        return FILE + expand(path.removeprefix(FILE), label + FILE)
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        fix = f"write ./{path} for a name that begins so"
        raise ConfigError(f"{label}{path}: the home directory of {user} is not known; {fix}")
    return found
