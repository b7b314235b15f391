"""What an unknown name was probably meant to be: said only where it is near, else nothing."""

import difflib

from stablelm.config.keys import keys

IN_ITS_SECTION = 0.7
WITH_ITS_SECTION = 0.8
ELSEWHERE = 0.85


def nearest(name: str) -> str | None:
    """The key that `name` was probably meant to be, None if none is near.

    In this order: the key that `name` lies below, the same name in another section, a like name in its own section, a
    very like name anywhere.
    """
    parents = [name[:place] for place, letter in enumerate(name) if letter == "."]
    above = next((parent for parent in reversed(parents) if parent in keys()), None)
    if above is not None:
        return above
    name = name.lower()
    section, _, last = name.rpartition(".")
    same = [key for key in keys() if _split(key)[1] == last]
    if same:
        return max(same, key=lambda key: _likeness(name, key))
    own = [key for key in keys() if _split(key)[0] == section]
    best = _best(last, own, IN_ITS_SECTION)
    if best is not None:
        return best
    whole = max(keys(), key=lambda key: _likeness(name, key))
    return whole if _likeness(name, whole) >= WITH_ITS_SECTION else _best(last, list(keys()), ELSEWHERE)


def _best(last: str, candidates: list[str], bound: float) -> str | None:
    best = max(candidates, key=lambda key: _likeness(last, _split(key)[1]), default=None)
    return best if best is not None and _likeness(last, _split(best)[1]) >= bound else None


def _split(key: str) -> tuple[str, str]:
    section, _, last = key.rpartition(".")
    return section, last


def _likeness(one: str, other: str) -> float:
    """0 to 1."""
    return difflib.SequenceMatcher(None, one, other).ratio()
