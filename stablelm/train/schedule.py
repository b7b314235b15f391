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
    (Loshchilov and Hutter, 2017, eq. 5) or a line, or constant with a linear cooldown (wsd;
    Hu et al., 2024, section 4.2), or constant.
    """
    steps, low = train.steps, train.min_lr
    assert steps is not None and low is not None, "schedules need a resolved configuration"
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    start = cooldown_start(train) if train.schedule == "wsd" else train.warmup_steps
    if step <= start:
        return train.lr
    done = min(1.0, (step - start) / max(1, steps - start))
    share = 0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1 - done
    return low + (train.lr - low) * share


def cooldown_start(train: TrainConfig) -> int:
    """Last step of wsd at the full learning rate."""
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
