"""Engines and world sizes train the same model: a part of `engine/matrix.py`, and what a resume needs."""

import pytest
from engine.matrix import Cell, checkpoints, equality, worst

TOLERANCE = {"fp32": 1e-6, "fp64": 1e-9, "bf16": 2e-3}
CELLS: list[Cell] = [
    *[("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
    ("hsdp", 4),
]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_do_not_depend_on_engine_or_world_size(precision: str):
    found = equality(CELLS if precision == "fp32" else CELLS[1:5:3], [f"train.precision={precision}"])
    assert max(found.values()) <= TOLERANCE[precision], found
    assert min(found.values()) > 0  # other sums in another order: equal to the bit would be the same engine twice


def test_double_precision_leaves_no_doubt():
    found = equality([("ddp", 2), ("fsdp2", 3), ("hsdp", 4)], ["train.precision=fp64", "model.method=catformer"])
    assert max(found.values()) <= TOLERANCE["fp64"], found


def test_the_measure_sees_a_small_difference():
    assert worst([1.0, 2.0], [1.0, 2.000004]) > 1e-6


def test_any_engine_goes_on_from_any_other(tmp_path):
    sources: list[Cell] = [("single", 1), ("zero1", 2), ("zero3", 2), ("hsdp", 4)]
    targets: list[Cell] = [("fsdp2", 2), ("zero2", 2), ("zero3", 3)]
    found = checkpoints(sources, targets, str(tmp_path))
    assert len(found) == len(sources) * len(targets)
    assert max(found.values()) <= TOLERANCE["fp32"], found
