"""How much the choice of the learning rate matters to the loss of a model."""

import math
from collections.abc import Mapping


def lr_sensitivity(losses: Mapping[float, float], initial_loss: float) -> float:
    """Learning-rate sensitivity: mean over the learning rates of min(loss, initial_loss) - best loss.

    Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023
    (arXiv 2309.14322), section 2.2: the expected deviation from the optimum over a range of learning
    rates, where a failed run counts as one that learned nothing. The result depends on the learning
    rates, so compare only values over the same ones.

    `losses`: final loss of each learning rate, nats per token; one that is NaN or infinite is of a run
    that diverged and counts as `initial_loss`, the loss before the first update. The best loss is
    capped as well (ours; it matters only where no learning rate improved on the start, which gives 0).
    Raises ValueError where nothing can be said: no learning rate at all, no finite loss (the best is
    unknown, and 0 would call a hopeless model robust), or an `initial_loss` that is not finite.
    """
    if not losses:
        raise ValueError("learning-rate sensitivity needs the loss of at least one learning rate")
    if not math.isfinite(initial_loss):
        raise ValueError(f"the initial loss is {initial_loss}; it must be finite")
    if not any(math.isfinite(loss) for loss in losses.values()):
        raise ValueError("no learning rate has a finite loss, so there is no best one to compare with")
    capped = [min(loss, initial_loss) if math.isfinite(loss) else initial_loss for loss in losses.values()]
    return math.fsum(capped) / len(capped) - min(capped)
