"""A batch that is run again: what counts as the same, who is named where it differs."""

import math
from typing import Any

import pytest
import torch

from stablelm.config.schema import Config, TrainConfig
from stablelm.engine.interface import StepResult
from stablelm.engine.process.torch_settings import set_switches, switches_kept
from stablelm.engine.ranks import Ranks
from stablelm.train.guards import NO_UPDATE, differing, recheck

ALONE = Ranks(0, 1, torch.device("cpu"), None, None)
HOSTS = ["left", "right"]


def result(loss: float, norm: float, *, skipped: bool = True) -> StepResult:
    return StepResult(torch.tensor(loss), torch.tensor(1), torch.tensor(norm), torch.tensor(skipped))


@pytest.mark.parametrize(
    ("again", "words"),
    [
        ((math.nan, math.inf), "the same in every bit: the data or the model, not the hardware"),
        ((3.0, math.inf), "it differs (loss of rank 0 on left: nan, then 3): hardware"),
        ((math.nan, 2.5), "it differs (gradient norm: inf, then 2.5): hardware"),
    ],
)
def test_what_is_said_of_a_step_that_was_left_out(again: tuple[float, float], words: str):
    said: list[str] = []

    def take(*, largest_norm: float) -> StepResult:
        assert largest_norm == NO_UPDATE
        return result(*again)

    recheck(7, result(math.nan, math.inf), take, ALONE, HOSTS, said.append)
    assert said[0].startswith("step 7: run again, ")
    assert words in said[0]


def test_on_gpus_the_gradients_bits_count_only_with_deterministic_kernels():
    """The backward pass of flash attention adds up in another order each time."""
    on_gpu, said = Ranks(0, 1, torch.device("cuda", 0), None, None), []

    def take(*, largest_norm: float) -> StepResult:
        return result(math.nan, 2.5)

    recheck(7, result(math.nan, 2.25), take, on_gpu, HOSTS, said.append)
    assert said.pop() == (
        "step 7: run again, its loss is the same in every bit: the data or the model, not the hardware"
    )
    with switches_kept():
        set_switches(Config(train=TrainConfig(deterministic=True)))
        recheck(7, result(math.nan, 2.25), take, on_gpu, HOSTS, said.append)
    assert "it differs (gradient norm: 2.25, then 2.5)" in said[0]


def test_a_step_that_was_made_is_not_run_again():
    def never(*words: str, **options: float) -> Any:
        raise AssertionError

    recheck(7, result(3.0, 1.0, skipped=False), never, ALONE, HOSTS, never)


def test_the_rank_whose_loss_differs_is_named():
    one, other = [3.0, 1.0], [3.0000002, 1.0]
    assert differing([(0, one, one), (1, one, one)], HOSTS) == ""
    assert differing([(0, one, one), (1, one, other)], HOSTS) == "loss of rank 1 on right: 3, then 3.0000002"
