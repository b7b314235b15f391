"""Configurations that come with the package, by name: `quickstart`, `runs/c4-24x256`, `data/c4`.

The files are those of configs/ and data/ of the repository, to which `stablelm/configs` has links; a wheel has copies.
"""

import difflib
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "configs"
_SUFFIX = ".yaml"


def names() -> list[str]:
    """The name of every configuration."""
    files = (path for part in ("", "runs", "data") for path in (_FOLDER / part).glob(f"*{_SUFFIX}"))
    return sorted(str(path.relative_to(_FOLDER).with_suffix("")) for path in files)


def find(asked: str) -> Path | None:
    """The file of a configuration, None without one; its path in a checkout is a name too."""
    name = _name(asked)
    return _FOLDER / (name + _SUFFIX) if name in names() else None


def instead(asked: str) -> str:
    """The end of a sentence about what is neither a file nor a name: the nearest name, else all unless it is a path."""
    short = {name.rpartition("/")[2]: name for name in names()}
    near = difflib.get_close_matches(_name(asked), [*short, *short.values()], n=1)
    if near:
        return f", or the packaged {short.get(near[0], near[0])}"
    return "" if "/" in asked else f", or a packaged one: {', '.join(names())}"


def _name(asked: str) -> str:
    return asked.removeprefix("configs/").removesuffix(_SUFFIX)
