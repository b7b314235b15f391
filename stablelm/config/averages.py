"""`evaluate.average`: which weights are evaluated and exported."""

import re
from typing import NamedTuple

from stablelm.config.schema import EvaluateConfig, TrainConfig
from stablelm.errors import ConfigError

NONE, EMA, LAST = "none", "ema", "last:"
MOST = 100
"""Checkpoints of a mean; more are a slip of the pen."""


class Average(NamedTuple):
    """`kind`: none or ema, or last with the number of `checkpoints`."""

    kind: str
    checkpoints: int = 1


def parse(text: str, key: str = "evaluate.average") -> Average:
    """Raises ConfigError."""
    if text in (NONE, EMA):
        return Average(text)
    number = re.fullmatch(rf"{LAST}([0-9]{{1,3}})", text)
    if number is not None and 2 <= int(number[1]) <= MOST:
        return Average("last", int(number[1]))
    raise ConfigError(f"{key}={text} must be none, ema or last:K with K from 2 to {MOST}")


def chosen(evaluate: EvaluateConfig, train: TrainConfig) -> Average:
    """What a configuration comes to: the average of `train.ema` where there is one and nothing else is asked for."""
    if evaluate.average is not None:
        return parse(evaluate.average)
    return Average(EMA if train.ema else NONE)
