"""Engines and world sizes train the same model: a part of `engine/matrix.py`, and what a resume needs."""

import pytest
from engine.matrix import Cell, checkpoints, equality, worst

TOLERANCE = {"fp32": 1e-6, "fp64": 1e-9, "bf16": 2e-3}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("precision", "cells", "method"),
    [
        ("fp32", [("ddp", 2), ("fsdp2", 2), ("hsdp", 4)], "magneto_sigma"),  # zero*: test_deepspeed_engine.py
        ("bf16", [("fsdp2", 2), ("zero3", 2)], "magneto_sigma"),
        ("fp64", [("ddp", 2), ("fsdp2", 3)], "catformer"),
    ],
)
def test_losses_do_not_depend_on_engine_or_world_size(precision: str, cells: list[Cell], method: str):
    found = equality(cells, [f"train.precision={precision}", f"model.method={method}"], steps=8)
    assert max(found.values()) <= TOLERANCE[precision], found
    assert min(found.values()) > 0  # other sums in another order: equal to the bit would be the same engine twice


def test_the_measure_sees_a_small_difference():
    assert worst([1.0, 2.0], [1.0, 2.000004]) > 1e-6


def test_any_engine_goes_on_from_any_other(tmp_path):
    sources: list[Cell] = [("single", 1), ("zero1", 2), ("hsdp", 4)]
    targets: list[Cell] = [("fsdp2", 2), ("zero3", 3)]
    found = checkpoints(sources, targets, str(tmp_path), steps=2)
    assert len(found) == len(sources) * len(targets)
    assert max(found.values()) <= TOLERANCE["fp32"], found
