"""A trace of exactly the steps that were asked for."""

import json

import pytest
import torch

from stablelm.config.schema import ObserveConfig
from stablelm.errors import StorageError
from stablelm.observe.profile.profiler import Profiler


def traces(folder):
    return sorted(path.name for path in (folder / "profile").glob("*"))


def run(profiler: Profiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        torch.dot(torch.ones(4), torch.ones(4))
        profiler.step(step)
    profiler.close()


def test_nothing_asked_nothing_done(tmp_path):
    run(Profiler(tmp_path, ObserveConfig(), 0), 1, 3)
    assert not (tmp_path / "profile").exists()


def test_the_steps_between_first_and_last(tmp_path):
    run(Profiler(tmp_path, ObserveConfig(profile=(2, 3)), 1), 1, 5)
    assert traces(tmp_path) == ["trace-rank1-steps-2-3.json"]
    events = json.loads((tmp_path / "profile" / "trace-rank1-steps-2-3.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::dot" and event.get("ph") == "X" for event in events) == 2


def test_the_first_step_of_all(tmp_path):
    run(Profiler(tmp_path, ObserveConfig(profile=(1, 1)), 0), 1, 2)
    assert traces(tmp_path) == ["trace-rank0-steps-1-1.json"]


def test_a_run_that_ends_sooner_keeps_what_there_is(tmp_path):
    run(Profiler(tmp_path, ObserveConfig(profile=(2, 9)), 0), 1, 3)
    assert traces(tmp_path) == ["trace-rank0-steps-2-3.json"]


@pytest.mark.parametrize(("resumed_at", "expected"), [(10, []), (2, ["trace-rank0-steps-3-3.json"])])
def test_a_resumed_run(tmp_path, resumed_at, expected):
    run(Profiler(tmp_path, ObserveConfig(profile=(2, 3)), 0, resumed_at), resumed_at + 1, resumed_at + 3)
    assert traces(tmp_path) == expected


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "profile").write_text("")
    profiler = Profiler(tmp_path, ObserveConfig(profile=(1, 1)), 0)
    with pytest.raises(StorageError, match="cannot be written"):
        profiler.step(1)


def test_a_memory_snapshot_needs_cuda(tmp_path):
    Profiler(tmp_path, ObserveConfig(memory_snapshot=True), 0).close()
    assert traces(tmp_path) == (["memory-rank0.pickle"] if torch.cuda.is_available() else [])
