"""Lengths of time as Slurm and people write them."""

import math
import re

from stablelm.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(value: str | float | None) -> float | None:
    """Seconds of `90`, `90s`, `10m`, `2h`, `MM:SS`, `HH:MM:SS` or `D-HH:MM:SS`; None stays None.

    Raises ConfigError for anything else and for what is not above zero.
    """
    if value is None:
        return None
    seconds = _seconds(str(value).strip())
    if seconds is None or not 0 < seconds < math.inf:
        raise ConfigError(
            f"run.time_limit={value} is not a length of time above zero; "
            "write seconds, 90s, 10m, 2h, MM:SS, HH:MM:SS or D-HH:MM:SS"
        )
    return seconds


def _seconds(words: str) -> float | None:
    if match := re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)([smhd]?)", words):
        return float(match[1]) * _UNITS[match[2] or "s"]
    if match := re.fullmatch(r"(?:(?:(?P<d>\d+)-)?(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)", words):
        d, h, m, s = (int(match[part] or 0) for part in "dhms")
        return float(((d * 24 + h) * 60 + m) * 60 + s)
    return None
