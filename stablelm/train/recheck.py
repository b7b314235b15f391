"""A batch whose update was left out, run once more: the same figures speak for the data, others for the hardware."""

import math
from collections.abc import Callable, Sequence

from stablelm.engine.interface import StepResult
from stablelm.engine.ranks import Ranks

NO_UPDATE = -1.0
"""As the largest gradient norm of a step: nothing is updated, whatever comes out."""


def recheck(
    step: int,
    first: StepResult,
    take: Callable[..., StepResult],
    ranks: Ranks,
    hosts: Sequence[str],
    message: Callable[[str], None],
) -> None:
    """Takes the step `first` again, if its update was left out, and says whether all bits are the same. Collective.

    Nothing has changed since: weights, rows and dropout are those of the first time. Waits for the device.
    """
    if not bool(first.skipped):
        return
    again = take(largest_norm=NO_UPDATE)
    before, after = ([float(result.cross_entropy), float(result.grad_norm)] for result in (first, again))
    found = differing(ranks.gather((ranks.rank, before, after)), hosts)
    if found:
        message(f"step {step}: run again, it differs ({found}): hardware, unless kernels are not deterministic")
    else:
        message(f"step {step}: run again, it is the same in every bit: the data or the model, not the hardware")


def differing(told: Sequence[tuple[int, list[float], list[float]]], hosts: Sequence[str]) -> str:
    """Ranks whose summed loss is another at the second time, and the gradient norm if it is; '' if all are the same.

    `told`: a rank's number and its two pairs of loss (nats, of all its rows) and gradient norm.
    """
    words = [
        f"loss of rank {rank} on {hosts[rank]}: {before[0]:.8g}, then {after[0]:.8g}"
        for rank, before, after in told
        if not _same(before[0], after[0])
    ]
    _, before, after = told[0]
    if not _same(before[1], after[1]):
        words.append(f"gradient norm: {before[1]:.8g}, then {after[1]:.8g}")
    return "; ".join(words)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
