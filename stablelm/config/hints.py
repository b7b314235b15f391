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
    by_last = {key: key.rpartition(".")[2] for key in keys()}
    same = [key for key, own in by_last.items() if own == last]
    if same:
        return difflib.get_close_matches(name, same, n=1, cutoff=0)[0]
    own = {key: each for key, each in by_last.items() if key.rpartition(".")[0] == section}
    whole = difflib.get_close_matches(name, keys(), n=1, cutoff=WITH_ITS_SECTION)
    return _best(last, own, IN_ITS_SECTION) or next(iter(whole), None) or _best(last, by_last, ELSEWHERE)


def _best(last: str, by_last: dict[str, str], bound: float) -> str | None:
    """The key, the first of those, whose own name is the likest."""
    found = difflib.get_close_matches(last, by_last.values(), n=1, cutoff=bound)
    return next((key for key, own in by_last.items() if own in found), None)
