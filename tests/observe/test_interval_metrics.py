"""Records of the training loop: what they hold, and model FLOPs utilisation where the peak is known."""

import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.data.storage.stall_monitor import Wait, noted
from stablelm.engine.interface import StepResult
from stablelm.engine.ranks import Ranks
from stablelm.methods.sizes import flops_per_token
from stablelm.observe import interval_metrics
from stablelm.observe.accelerators import ACCELERATORS, named_by
from stablelm.observe.interval_metrics import IntervalMetrics
from stablelm.observe.progress import Progress
from stablelm.observe.sinks import Records

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None, None)


def rate(step: int) -> float:
    return 3e-4 * step


class Read:
    """A loader's account of its text."""

    def __init__(self, epochs: dict[str, float] | None = None, skipped: int = 0, unknown: int = 0, tokens: int = 64):
        self._epochs = epochs or {}
        self._counts = {"skipped_rows": skipped, "unknown_tokens": unknown, "input_tokens": tokens}

    def epochs(self) -> dict[str, float]:
        return self._epochs

    def counts(self) -> dict[str, int]:
        return self._counts


def resolved() -> Config:
    loaded = load([], ["train.steps=5", "train.global_batch_size=4", "data.seq_len=8", "model.n_layers=2"]).config
    return resolve(loaded, pieces=100, world_size=1, accelerate_precision=None)


class Kept(list[dict[str, Any]], Records):
    """Records and messages that were written."""

    def __init__(self):
        self.told: list[str] = []

    def write(self, record: dict[str, Any]) -> None:
        self.append(record)

    def message(self, text: str) -> None:
        self.told.append(text)


def result(cross_entropy: float, valid: int, norm: float, *, skipped: bool = False) -> StepResult:
    return StepResult(torch.tensor(cross_entropy), torch.tensor(valid), torch.tensor(norm), torch.tensor(skipped))


def recorded(monkeypatch: pytest.MonkeyPatch, peak: float) -> tuple[dict[str, Any], float]:
    """The record of two steps of two seconds, and the FLOPs of one of their tokens."""
    monkeypatch.setattr(interval_metrics, "peak_flops", lambda device: peak)
    config, progress, records = resolved(), Progress(), Kept()
    made = IntervalMetrics(CPU, ALONE, config, progress, records, rate)
    for norm in (1.0, 3.0):
        made.add(result(96.0, 32, norm), wait=0.5, own=0.0, seconds=2.0)
        progress.step, progress.tokens = progress.step + 1, progress.tokens + 32
    made.write(Read({"web": 0.5, "code": 2.25}))
    made.write(Read())  # nothing since: no second record
    (record,) = records
    return record, flops_per_token(config.model, config.data.seq_len)


def test_a_record_holds_the_means_of_its_interval(monkeypatch: pytest.MonkeyPatch):
    record, _ = recorded(monkeypatch, 0.0)
    assert (record["step"], record["tokens"], record["loss"], record["grad_norm"]) == (2, 64, 3.0, 2.0)
    assert (record["step_seconds"], record["data_wait_seconds"], record["tokens_per_second"]) == (2.0, 0.5, 16.0)
    assert "mfu" not in record
    assert (record["data_epoch/web"], record["data_epoch/code"]) == (0.5, 2.25)


def test_bad_rows_add_up_and_many_unknown_tokens_are_told_once():
    records = Kept()
    progress = Progress()
    made = IntervalMetrics(CPU, ALONE, resolved(), progress, records, rate)
    for unknown in (3, 4, 32):
        made.add(result(96.0, 32, 1.0), wait=0.0, own=0.0, seconds=1.0)
        progress.step, progress.tokens = progress.step + 1, progress.tokens + 32
        made.write(Read(skipped=2, unknown=unknown, tokens=64))
    assert [record["skipped_rows"] for record in records] == [2, 4, 6] and progress.skipped_rows == 6
    assert [record["unknown_tokens"] for record in records] == [3 / 64, 4 / 64, 0.5]
    assert (
        len(records.told) == 1
        and records.told[0].startswith("warning: 6.2% of the tokens are unknown")
        and "data.tokenizer" in records.told[0]
    )


def test_utilisation_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch):
    record, flops = recorded(monkeypatch, 1e9)
    assert record["mfu"] == pytest.approx(flops * 16.0 / 1e9)


def test_records_leave_skipped_steps_out():
    records = Kept()
    progress = Progress(step=1, tokens=0)
    made = IntervalMetrics(CPU, ALONE, resolved(), progress, records, rate)
    rows = [(6.0, 2, 1.0, False), (math.nan, 5, math.inf, True), (2.0, 2, 3.0, False)]
    for row in rows:
        made.add(result(*row[:3], skipped=row[3]), wait=0.0, own=0.0, seconds=1.0)
    progress.tokens = 12
    made.write(Read())
    assert (records[0]["loss"], records[0]["grad_norm"], records[0]["skipped_steps"]) == (2.0, 2.0, 1)
    made.add(result(math.nan, 5, math.nan, skipped=True), wait=0.0, own=0.0, seconds=1.0)
    progress.tokens = 16
    made.write(Read())
    assert math.isnan(records[1]["loss"])
    assert (records[1]["skipped_steps"], progress.loss) == (2, 2.0)


def wait_for_a_store(rank: int, world_size: int) -> tuple[float, dict[str, Any]]:
    """Rank 1 waits with two reads at a time, after a wait of both ranks before the interval."""
    group, records, progress = dist.group.WORLD, Kept(), Progress()
    with noted(Wait("early", 1, 0.0, "gone")):
        time.sleep(0.3)
    made = IntervalMetrics(CPU, Ranks(rank, world_size, CPU, group, group), resolved(), progress, records, rate)
    began = time.monotonic()
    if rank == 1:
        with noted(Wait("a", 1, 0.0, "gone")), noted(Wait("b", 1, 0.0, "gone")):
            time.sleep(0.2)
    seconds = time.monotonic() - began
    made.add(result(1.0, 1, 1.0), wait=0.0, own=0.0, seconds=1.0)
    progress.step, progress.tokens = 1, 1
    made.write(Read())
    return seconds, records[0]


def test_waits_for_stores_are_told_of_the_rank_where_they_were_longest():
    (_, of_first), (seconds, of_second) = run_ranks(wait_for_a_store, 2)
    assert of_first["store_wait_seconds"] == of_second["store_wait_seconds"]
    assert 0.2 <= of_first["store_wait_seconds"] <= seconds


def straggle(rank: int, world_size: int, own: tuple[float, ...]) -> dict:
    group = dist.group.WORLD
    ranks, records = Ranks(rank, world_size, CPU, group, group), Kept()
    progress = Progress()
    made = IntervalMetrics(CPU, ranks, resolved(), progress, records, rate, ["left", "right"])
    for _ in range(2):
        made.add(result(1.0, 1, 1.0), wait=0.0, own=own[rank], seconds=1.0)
    progress.step, progress.tokens = 2, 2
    made.write(Read())
    return {name: value for name, value in records[0].items() if name.startswith("slowest")}


def test_the_slowest_rank_is_named_where_it_matters():
    told = {"slowest_rank": 1, "slowest_host": "right", "slowest_rank_seconds": 0.3}
    assert run_ranks(straggle, 2, (0.1, 0.3)) == [told, told]
    assert run_ranks(straggle, 2, (0.1, 0.15)) == [{}, {}]


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
    assert named_by("NVIDIA GeForce RTX 3060") is None
    assert interval_metrics.peak_flops(CPU) == 0.0
