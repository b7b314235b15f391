"""Learning rate as a pure function of the step, so that a resumed run cannot jump."""

import math

from stablelm.config.schema import TrainConfig


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
