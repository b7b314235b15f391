"""Records of the training loop: what they hold, and model FLOPs utilisation where the peak is known."""

from typing import Any

import pytest
import torch

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.engine.mesh import Ranks
from stablelm.model.flops import flops_per_token
from stablelm.plan.accelerators import ACCELERATORS, named_by
from stablelm.train import meter
from stablelm.train.progress import Progress
from stablelm.train.step import StepResult

CPU = torch.device("cpu")


def recorded(monkeypatch: pytest.MonkeyPatch, peak: float) -> tuple[dict[str, Any], float]:
    """The record of two steps of two seconds, and the FLOPs of one of their tokens."""
    monkeypatch.setattr(meter, "peak_flops", lambda device: peak)
    loaded = load([], ["train.steps=5", "train.global_batch_size=4", "data.seq_len=8", "model.n_layers=2"]).config
    config = resolve(loaded, pieces=100, world_size=1, accelerate_precision=None)
    progress, records = Progress(), []
    made = meter.Meter(CPU, Ranks(0, 1, CPU, None, None), config, progress, records.append)
    for norm in (1.0, 3.0):
        result = StepResult(torch.tensor(96.0), torch.tensor(32), torch.tensor(norm))
        made.add(result, wait=0.5, seconds=2.0)
        progress.step, progress.tokens = progress.step + 1, progress.tokens + 32
    made.write({"web": 0.5, "code": 2.25})
    made.write({})  # nothing since: no second record
    (record,) = records
    return record, flops_per_token(config.model, config.data.seq_len)


def test_a_record_holds_the_means_of_its_interval(monkeypatch: pytest.MonkeyPatch):
    record, _ = recorded(monkeypatch, 0.0)
    assert (record["step"], record["tokens"], record["loss"], record["grad_norm"]) == (2, 64, 3.0, 2.0)
    assert (record["step_seconds"], record["data_wait_seconds"], record["tokens_per_second"]) == (2.0, 0.5, 16.0)
    assert "mfu" not in record
    assert (record["data_epoch/web"], record["data_epoch/code"]) == (0.5, 2.25)


def test_utilisation_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch):
    record, flops = recorded(monkeypatch, 1e9)
    assert record["mfu"] == pytest.approx(flops * 16.0 / 1e9)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_accelerators_are_known_by_their_drivers_names(driver: str, name: str):
    assert named_by(driver) == ACCELERATORS[name]


def test_other_devices_have_no_peak():
    assert named_by("NVIDIA GeForce RTX 4090") is None
    assert meter.peak_flops(CPU) == 0.0
