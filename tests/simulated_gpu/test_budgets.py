"""Kernels and bytes of a layer on a GPU, eager and bf16 at d_model 1,024: the figures of `count.py` do not grow."""

from typing import NamedTuple

import pytest
from simulated_gpu.conftest import Simulator


class Budget(NamedTuple):
    """Of both passes together, of the update, and kB a token (1,024 bytes) of pointwise traffic of both passes."""

    launches: float
    update: float
    traffic: float


# What is measured. The goals: 60 launches and 300 kB; 400 kB; 90 launches, 8 for the update and 380 kB.
LAYERS = {
    "pre_ln": Budget(47, 0, 259),
    "magneto": Budget(55, 0, 309),
    "deepscalelm_sigma": Budget(87, 7.5, 327),
}


@pytest.mark.parametrize("method", LAYERS)
def test_a_layer_stays_within_its_budget(simulator: Simulator, method: str):
    from simulated_gpu import count

    found, tokens = simulator(count.of_layers, f"model.method={method}")
    launches, update = (found.count(*phases) / count.LAYERS for phases in (count.BOTH, ("update",)))
    used = Budget(launches, update, found.pointwise_bytes(*count.BOTH) / 1024 / tokens)
    assert all(here <= most for here, most in zip(used, LAYERS[method], strict=True)), used
