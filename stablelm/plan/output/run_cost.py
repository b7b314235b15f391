"""What a whole run takes: time, GPU-hours, money and energy, from the estimated rate of its steps.

Time is that of training steps alone: start, evaluation, checkpoints and restarts come on top. Energy is an upper bound
for the accelerators, as if each drew its vendor's power limit all the time; hosts, network and cooling come on top.
"""

from dataclasses import dataclass

from stablelm.plan.request import PlanRequest


@dataclass(frozen=True)
class RunCost:
    """`dollars` and `kilowatt_hours` are None where the price or the power is not known."""

    steps: int
    tokens: int
    hours: float
    gpu_hours: float
    dollars: float | None
    kilowatt_hours: float | None


def run_cost(request: PlanRequest, tokens_per_second: float) -> RunCost:
    """The cost of the run; `tokens_per_second` of all ranks."""
    config, power, price = request.config, request.accelerator.power, request.price
    assert config.train.steps is not None
    tokens = request.sequences * config.data.seq_len
    hours = tokens / tokens_per_second / 3600
    gpu_hours = hours * request.world_size
    return RunCost(
        config.train.steps,
        tokens,
        hours,
        gpu_hours,
        None if price is None else gpu_hours * price,
        None if power is None else gpu_hours * power / 1000,
    )
