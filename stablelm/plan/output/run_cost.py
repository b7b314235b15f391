"""What a whole run takes: time, GPU-hours, money and energy, from the estimated rate of its steps.

Time is that of training steps alone: start, evaluation, checkpoints and restarts come on top. Energy is an upper bound
for the accelerators, as if each drew its vendor's power limit all the time; hosts, network and cooling come on top.
"""

from dataclasses import dataclass

from stablelm.config.schema import Config
from stablelm.observe.accelerators import Accelerator


@dataclass(frozen=True)
class RunCost:
    """`dollars` and `kilowatt_hours` are None where the price or the power is not known."""

    steps: int
    tokens: int
    hours: float
    gpu_hours: float
    dollars: float | None
    kilowatt_hours: float | None


def run_cost(
    config: Config, tokens_per_second: float, world_size: int, accelerator: Accelerator, price: float | None
) -> RunCost:
    """The cost of a resolved config's run; `tokens_per_second` of all ranks, `price` in dollars per GPU-hour."""
    train = config.train
    assert train.steps is not None
    tokens = train.steps * train.global_batch_size * config.data.seq_len
    hours = tokens / tokens_per_second / 3600
    gpu_hours = hours * world_size
    return RunCost(
        train.steps,
        tokens,
        hours,
        gpu_hours,
        None if price is None else gpu_hours * price,
        None if accelerator.power is None else gpu_hours * accelerator.power / 1000,
    )
