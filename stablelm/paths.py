"""Paths as a user writes them, in a key or an option: `~` is the home directory, variables are the shell's business.

A model on the Hugging Face hub may stand where a path may, by its bare name.
"""

import os
import re

from stablelm.errors import ConfigError

FILE = "file://"
HUB = "hf://"
_LOCAL_NAME = re.compile(r"[/.~].*|.*\.(model|json)", re.DOTALL)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[^\s@]+)?", re.ASCII)


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


def is_hub_model(name: str) -> bool:
    """Whether a name is that of a model on the hub: `hf://...`, or `org/name[@revision]` where there is no such path.

    What is named like a file of this machine is one, whether it exists or not.
    """
    if name.startswith(HUB):
        return True
    if _LOCAL_NAME.fullmatch(name) or not _HUB_NAME.fullmatch(name):
        return False
    return not os.path.lexists(name)
