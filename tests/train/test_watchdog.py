"""Who is named when a run gets no further, and how ranks agree on it."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks

from stablelm.config.schema import Config, DataConfig, ObserveConfig, RunConfig
from stablelm.data.storage.stall_monitor import Wait, noted
from stablelm.engine.mesh import Ranks
from stablelm.train import board, watchdog
from stablelm.train.board import FileBoard, SafeBoard, StoreBoard
from stablelm.train.culprit import culprit
from stablelm.train.pulse import Pulse, in_collective, waits_for
from stablelm.train.watchdog import Watch

HOSTS = ["n0", "n0", "n1", "n1", "n2"]


def note(count: int, *, collective: bool = True, where: str = "step 12, step") -> dict[str, Any]:
    return {"count": count, "collective": collective, "where": where, "waits_for": "f (x.py:1)", "seconds": 9.0}


def test_the_one_furthest_behind_is_named():
    notes = {0: note(40), 1: note(40), 2: note(39, where="step 12, data"), 3: note(40)}
    assert culprit(notes, HOSTS) == "rank 2 on n1 is stuck: step 12, data, in f (x.py:1), for 9 s"


def test_of_those_at_one_place_the_one_that_waits_for_nobody_is_named():
    notes = {0: note(40), 1: note(40, collective=False), 2: note(40)}
    assert culprit(notes, HOSTS).startswith("rank 1 on n0 is stuck")


def test_silence_is_told_first():
    assert culprit({0: note(40), 1: note(39), 2: None}, HOSTS) == "rank 2 on n1 does not answer any more"
    many = culprit(dict.fromkeys(range(5)), HOSTS)
    assert many == "rank 0 on n0, rank 1 on n0, rank 2 on n1 and 2 more do not answer any more"


def test_nobody_is_blamed_where_all_wait_for_each_other():
    assert culprit({0: note(40), 1: note(40)}, HOSTS).startswith("all 2 ranks are stuck at the same place, none behind")


def test_a_pulse_counts_places_alike_on_all_ranks():
    pulse = Pulse()
    pulse.at("data", 1)
    pulse.at("step", 1)
    pulse.reached("micro-batch 1 of 2")
    assert (pulse.now.count, pulse.now.words()) == (3, "step 1, step (micro-batch 1 of 2)")
    pulse.finished(1)
    assert (pulse.steps, pulse.now.phase) == (1, "record")


def test_where_a_thread_is():
    release = threading.Event()

    def waiting() -> None:
        release.wait()

    thread = threading.Thread(target=waiting)
    thread.start()
    try:
        assert thread.ident is not None
        assert waits_for(thread.ident).startswith("wait (threading.py:")
        assert not in_collective(thread.ident)
    finally:
        release.set()
        thread.join()


class Silent:
    """A store whose process is suspended until `wakes` is set."""

    def __init__(self) -> None:
        self.wakes, self.notes = threading.Event(), {}

    def put(self, name: str, value: Any) -> None:
        self.wakes.wait()
        self.notes[name] = value

    def get(self, name: str) -> Any:
        self.wakes.wait()
        return self.notes.get(name)

    def claim(self, name: str) -> bool:
        self.wakes.wait()
        return self.notes.setdefault(f"claim/{name}", claimed := object()) is claimed


def test_a_silent_store_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(board, "STORE_SECONDS", 0.3)
    store, files = Silent(), FileBoard(tmp_path, 1)
    ranks = [SafeBoard(store, files) for _ in range(2)]
    began = time.monotonic()
    assert ranks[0].get("alarm") is None
    ranks[0].put("alarm", "hang")
    ranks[0].put("rank/0", {"a": 1})
    assert [rank.claim("told") for rank in ranks] == [True, False]
    assert ranks[1].get("alarm") == "hang"
    assert ranks[1].get("rank/0") == {"a": 1}
    assert time.monotonic() - began < 3
    assert not any(rank.lost for rank in ranks)
    # It may wake again: whoever asks it then learns what was said meanwhile.
    store.wakes.set()
    deadline = time.monotonic() + 10
    while "rank/0" not in store.notes:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    files.put("alarm", "of the folder")
    assert ranks[1].get("alarm") == "hang"


class Broken:
    def put(self, name: str, value: Any) -> None:
        raise ConnectionError

    get = claim = lambda self, name: (_ for _ in ()).throw(ConnectionError())


def test_files_take_over_from_a_store_that_has_gone(tmp_path: Path):
    notes = SafeBoard(Broken(), FileBoard(tmp_path, 1))  # type: ignore[arg-type]
    assert not notes.lost
    assert notes.get("alarm") is None
    assert notes.lost
    notes.put("rank/1", {"a": 1})
    assert FileBoard(tmp_path, 1).get("rank/1") == {"a": 1}
    assert notes.claim("told")
    assert not FileBoard(tmp_path, 1).claim("told")
    assert FileBoard(tmp_path, 2).claim("told")


def claims(rank: int, world_size: int, folder: str) -> tuple[list[bool], Any, Any]:
    store = dist.distributed_c10d._get_default_store()
    notes = SafeBoard(StoreBoard(store, 1), FileBoard(Path(folder), 1))
    mine = [notes.claim(f"told {turn}") for turn in range(5)]
    notes.put(f"rank/{rank}", rank)
    dist.barrier()
    return mine, notes.get("rank/0"), FileBoard(Path(folder), 1).claim("told 0")


def test_one_rank_speaks(tmp_path: Path):
    found = run_ranks(claims, 3, str(tmp_path))
    assert [sum(turn) for turn in zip(*(mine for mine, _, _ in found), strict=True)] == [1] * 5
    assert [note for _, note, _ in found] == [0, 0, 0]
    assert not any(claimed for _, _, claimed in found)


def watch(tmp_path: Path, **observe: Any) -> Watch:
    config = Config(
        run=RunConfig(dir=str(tmp_path)), data=DataConfig(retry_budget=5.0), observe=ObserveConfig(**observe)
    )
    ranks = Ranks(0, 1, torch.device("cpu"), None, None)
    return Watch(config, ranks, ["here"], 1, lambda code, words: None)


def test_what_counts_as_stuck(tmp_path: Path):
    watched = watch(tmp_path, hang_seconds=10.0, first_step_seconds=30.0)
    assert not any(watched._stuck(4.0) for _ in range(7))
    assert watched._stuck(4.0)  # 32 s at "starting"
    watched.pulse.at("step", 1)
    watched.pulse.steps = 1
    assert not any(watched._stuck(4.0) for _ in range(3))
    assert watched._stuck(4.0)
    watched.pulse.reached("somewhere")
    assert not watched._stuck(100.0)
    watched.extra_seconds["save"] = 5.0
    watched.pulse.at("save", 1)
    assert not any(watched._stuck(4.0) for _ in range(4))
    assert watched._stuck(4.0)


def test_a_rank_that_waits_for_a_store_is_not_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    watched = watch(tmp_path, hang_seconds=10.0)
    watched.pulse.steps = 1
    watched.pulse.at("data", 3)
    assert not any(watched._stuck(4.0) for _ in range(10))  # a first try that stalls is not known of
    monkeypatch.setattr(watchdog, "STALL_SECONDS", 0.0)
    with noted(Wait("https://h/a.json.gz", 4, time.time(), "503")):
        assert not any(watched._stuck(4.0) for _ in range(10))
        told = watched.note()["store"]
        assert (told["file"], told["attempt"], told["cause"], told["reads"]) == ("https://h/a.json.gz", 4, "503", 1)
        watched.pulse.at("step", 3)  # only the threads that read ahead wait
        assert not any(watched._stuck(4.0) for _ in range(3))
        assert watched._stuck(4.0)
    assert "store" not in watched.note()
    # A try that never ends is found all the same, once the budget of 5 s is over.
    watched.pulse.at("data", 4)
    with noted(Wait("https://h/a.json.gz", 4, time.time() - 5.0 - 1.0, "503")):
        assert not any(watched._stuck(4.0) for _ in range(3))
        assert watched._stuck(4.0)


def test_nor_are_those_that_wait_for_it(tmp_path: Path):
    reader, other = (watch(tmp_path, hang_seconds=10.0) for _ in range(2))
    reader._board = other._board
    for watched, phase in ((reader, "data"), (other, "step")):
        watched.pulse.steps = 1
        watched.pulse.at(phase, 3)
    with noted(Wait("f", 2, time.time(), "gone")):
        assert not any(watched._stuck(4.0) for _ in range(10) for watched in (reader, other))
    assert [other._stuck(4.0) for _ in range(8)].index(True) <= 4


def test_a_heartbeat_tells_where_the_rank_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.05)
    watched = watch(tmp_path)
    watched.start()
    watched.pulse.at("evaluate", 7)
    deadline, told = time.monotonic() + 20, {}
    while told.get("phase") != "evaluate":
        assert time.monotonic() < deadline
        path = tmp_path / "heartbeat" / "rank-0.json"
        told = json.loads(path.read_text()) if path.exists() else {}
    watched.stop()
    assert (told["rank"], told["host"], told["step"]) == (0, "here", 7)
    assert told["waits_for"]
    assert told["since"] <= told["written"]
    assert list((tmp_path / "heartbeat").glob("*.json")) == [path]
