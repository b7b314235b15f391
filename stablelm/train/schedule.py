"""Learning rate and other settings as pure functions of the step, so that a resumed run cannot jump."""

import math
from collections.abc import Sequence
from dataclasses import replace

from stablelm.config.load import typed
from stablelm.config.schema import TrainConfig
from stablelm.config.segments import BATCH, CHANGEABLE, Segment


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (1 is the first), of a resolved configuration.

    Linear warm-up from lr / warmup_steps; then to min_lr at the last step by a half cosine
    (Loshchilov and Hutter, 2017, eq. 5) or a line, or constant with a cooldown (wsd;
    Hu et al., 2024, section 4.2), or constant up to `power_after` and then a power of the step with a cooldown (power;
    Shen et al., 2024, eq. 4, steps in place of tokens), or constant. A cooldown is linear, or falls as 1 - sqrt
    (Hägele et al., 2024, section 3.1).
    """
    steps, low = train.steps, train.min_lr
    assert steps is not None and low is not None, "schedules need a resolved configuration"
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    cools = train.schedule in ("wsd", "power")
    start = cooldown_start(train) if cools else train.warmup_steps
    high = _before_cooldown(min(step, start), train)
    if step <= start:
        return high
    done = min(1.0, (step - start) / max(1, steps - start))
    if train.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        share = 1 - (math.sqrt(done) if cools and train.cooldown_shape == "1-sqrt" else done)
    return low + (high - low) * share


def _before_cooldown(step: int, train: TrainConfig) -> float:
    """The rate of a step after the warm-up; that of power never falls below min_lr."""
    if train.schedule != "power":
        return train.lr
    assert train.power_after is not None and train.min_lr is not None
    return max(train.min_lr, train.lr * (max(step, train.power_after) / train.power_after) ** -train.power_exponent)


def cooldown_start(train: TrainConfig) -> int:
    """Last step of wsd and power before the cooldown."""
    assert train.steps is not None and train.cooldown_steps is not None
    return max(train.warmup_steps, train.steps - train.cooldown_steps)


class TrainHistory:
    """The training settings of each optimizer step: those of now, and before each change what they were.

    The batch sizes are those of now: they are a function of the data step in themselves. ConfigError if a change holds
    values that its keys do not take.
    """

    def __init__(self, train: TrainConfig, segments: Sequence[Segment]):
        self._last = train
        self._earlier: list[tuple[int, TrainConfig]] = []  # until which step, the latest change first
        for segment in reversed(segments):
            before = {name: value for name, (value, _) in segment["keys"].items() if name in CHANGEABLE}
            before.pop(BATCH, None)
            values = typed(before, f"the identity's change at step {segment['step']}")
            train = replace(train, **{name.removeprefix("train."): value for name, value in values.items()})
            self._earlier.append((segment["step"], train))

    def at(self, step: int) -> TrainConfig:
        """The settings of an optimizer step, counted from 1."""
        found = self._last
        for last, train in self._earlier:
            if step <= last:
                found = train
        return found
