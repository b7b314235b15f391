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
from stablelm.engine.consensus import Consensus
from stablelm.engine.ranks import Ranks
from stablelm.supervise import heartbeat, rank_store
from stablelm.supervise.hang_diagnosis import HangDetector, diagnose
from stablelm.supervise.heartbeat import Watchdog
from stablelm.supervise.progress_marker import ProgressMarker
from stablelm.supervise.rank_store import FallbackStore, FolderStore, LocalStore, ProcessGroupStore, RankStore

HOSTS = ["n0", "n0", "n1", "n1", "n2"]


def note(*progress: int, where: str = "step 12, forward") -> dict[str, Any]:
    finished = "step 12, data"
    return {"progress": progress, "where": where, "finished": finished, "waits_for": "f (x.py:1)", "seconds": 9.0}


def test_the_rank_that_has_finished_least_is_named():
    notes = {0: note(40, 0), 1: note(40, 0), 2: note(39, 0, where="step 12, data"), 3: note(40, 0)}
    assert diagnose(notes, HOSTS) == (
        "rank 2 on n1 is stuck: step 12, data for 9 s, last finished step 12, data (in f (x.py:1))"
    )


def test_parts_of_a_save_count_where_ranks_wait_for_it():
    notes = {0: note(40, 7), 1: note(40, 6), 2: note(40, 7)}
    assert diagnose(notes, HOSTS).startswith("rank 1 on n0 is stuck")


def test_silence_is_reported_first():
    assert diagnose({0: note(40, 0), 1: note(39, 0), 2: None}, HOSTS) == "rank 2 on n1 does not answer"
    many = diagnose(dict.fromkeys(range(5)), HOSTS)
    assert many == "rank 0 on n0, rank 1 on n0, rank 2 on n1 and 2 more do not answer"


def test_nobody_is_blamed_where_all_are_at_one_place():
    found = diagnose({0: note(40, 0), 1: note(40, 0)}, HOSTS)
    assert found.startswith("all 2 ranks are stuck at the same place, none behind the others: step 12, forward")
    assert "rank 0 in f (x.py:1), rank 1 in f (x.py:1)" in found


def test_a_marker_counts_places_alike_on_all_ranks():
    marker = ProgressMarker()
    marker.at("data", 1)
    marker.at("step", 1)
    marker.in_step("forward", "micro-batch 1 of 2")
    assert (marker.now.passed, marker.now.words()) == (3, "step 1, forward (micro-batch 1 of 2)")
    assert marker.last_finished() == "step 1, step"
    marker.saved_part("step 0, save (staging)")  # in the background: it says nothing of the main thread
    assert marker.progress() == (3, 0)
    marker.passed()
    assert (marker.progress(), marker.now.words()) == ((4, 0), "step 1, forward (micro-batch 1 of 2)")
    marker.finished(1)
    assert (marker.steps, marker.now.phase) == (1, "record")
    marker.at("save", 1)
    assert (marker.progress(), marker.last_finished()) == ((6, 1), "step 1, record")
    marker.saved_part("step 1, save (tensors)")
    assert (marker.progress(), marker.last_finished()) == ((6, 2), "step 1, save (tensors)")


def stops_in_the_middle(rank: int, world_size: int) -> list[str]:
    """Rank 1 is slow in the second part; what each rank has finished when rank 0 has waited for it a while."""
    finished: list[str] = []
    consensus = Consensus(dist.group.WORLD, rank, finished.append)
    consensus.run(lambda: None, "first")
    thread = threading.Thread(target=lambda: consensus.run(lambda: time.sleep(1.5 * rank), "second"))
    thread.start()
    time.sleep(0.5)
    seen = list(finished)
    thread.join()
    return seen


def test_a_rank_that_waits_for_others_has_finished_its_own_part():
    assert run_ranks(stops_in_the_middle, 2) == [["first", "second"], ["first"]]


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
    monkeypatch.setattr(rank_store, "STORE_SECONDS", 0.3)
    store, files = Silent(), FolderStore(tmp_path, 1)
    ranks = [FallbackStore(store, files) for _ in range(2)]
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
    notes = FallbackStore(Broken(), FolderStore(tmp_path, 1))  # type: ignore[arg-type]
    assert not notes.lost
    assert notes.get("alarm") is None
    assert notes.lost
    notes.put("rank/1", {"a": 1})
    assert FolderStore(tmp_path, 1).get("rank/1") == {"a": 1}
    assert notes.claim("told")
    assert not FolderStore(tmp_path, 1).claim("told")
    assert FolderStore(tmp_path, 2).claim("told")


def claims(rank: int, world_size: int, folder: str) -> tuple[list[bool], Any, Any]:
    store = dist.distributed_c10d._get_default_store()
    notes = FallbackStore(ProcessGroupStore(store, 1), FolderStore(Path(folder), 1))
    mine = [notes.claim(f"told {turn}") for turn in range(5)]
    notes.put(f"rank/{rank}", rank)
    dist.barrier()
    return mine, notes.get("rank/0"), FolderStore(Path(folder), 1).claim("told 0")


def test_one_rank_speaks(tmp_path: Path):
    found = run_ranks(claims, 3, str(tmp_path))
    assert [sum(turn) for turn in zip(*(mine for mine, _, _ in found), strict=True)] == [1] * 5
    assert [note for _, note, _ in found] == [0, 0, 0]
    assert not any(claimed for _, _, claimed in found)


class Watched:
    """A detector and the marker that it reads."""

    def __init__(self, notes: RankStore | None = None, stall_seconds: float = 1e9, **observe: Any):
        self.marker, self.notes = ProgressMarker(), notes or LocalStore()
        config = Config(data=DataConfig(retry_budget=5.0), observe=ObserveConfig(**observe))
        self.detector = HangDetector(self.marker, config, self.notes, 0, stall_seconds)

    def checks(self, count: int) -> list[bool]:
        """So many, four seconds apart."""
        return [self.detector.stuck(4.0) for _ in range(count)]


def test_what_counts_as_stuck():
    watched = Watched(hang_seconds=10.0, first_step_seconds=30.0)
    assert watched.checks(8) == [False] * 7 + [True]  # 32 s at "starting"
    watched.marker.at("step", 1)
    watched.marker.steps = 1
    assert watched.checks(4) == [False] * 3 + [True]
    watched.marker.reached("somewhere")
    assert not watched.detector.stuck(100.0)
    watched.detector.extra_seconds["save"] = 5.0
    watched.marker.at("save", 1)
    assert watched.checks(5) == [False] * 4 + [True]
    watched.marker.saved_part("tensors")
    assert not watched.detector.stuck(100.0)


def test_a_rank_that_waits_for_a_store_is_not_stuck():
    watched = Watched(hang_seconds=10.0)
    watched.marker.steps = 1
    watched.marker.at("data", 3)
    assert not any(watched.checks(10))  # a first try that stalls is not known of
    watched = Watched(hang_seconds=10.0, stall_seconds=0.0)
    watched.marker.steps = 1
    watched.marker.at("data", 3)
    with noted(Wait("https://h/a.json.gz", 4, time.time(), "503")):
        assert not any(watched.checks(10))
        watched.marker.at("step", 3)  # only the threads that read ahead wait
        assert watched.checks(5)[-1]
    # A try that never ends is found all the same, once the budget of 5 s is over.
    watched.marker.at("data", 4)
    with noted(Wait("https://h/a.json.gz", 4, time.time() - 5.0 - 1.0, "503")):
        assert watched.checks(4) == [False] * 3 + [True]


def test_nor_are_those_that_wait_for_it():
    reader = Watched(hang_seconds=10.0)
    other = Watched(reader.notes, hang_seconds=10.0)
    for watched, phase in ((reader, "data"), (other, "step")):
        watched.marker.steps = 1
        watched.marker.at(phase, 3)
    with noted(Wait("f", 2, time.time(), "gone")):
        assert not any(watched.detector.stuck(4.0) for _ in range(10) for watched in (reader, other))
    assert other.checks(8).index(True) <= 4


def test_a_heartbeat_tells_where_the_rank_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.05)
    config = Config(run=RunConfig(dir=str(tmp_path)))
    watched = Watchdog(config, Ranks(0, 1, torch.device("cpu"), None, None), ["here"], 1, lambda code, words: None)
    watched.start()
    watched.marker.at("evaluation", 7)
    deadline, told = time.monotonic() + 20, {}
    path = tmp_path / "heartbeat" / "rank-0.json"
    with noted(Wait("https://h/a.json.gz", 4, time.time(), "503")):
        while told.get("phase") != "evaluation" or "store" not in told:
            assert time.monotonic() < deadline
            told = json.loads(path.read_text()) if path.exists() else {}
    watched.stop()
    assert (told["store"]["file"], told["store"]["attempt"], told["store"]["reads"]) == ("https://h/a.json.gz", 4, 1)
    assert (told["rank"], told["host"], told["step"]) == (0, "here", 7)
    assert told["finished"] == "step 0, starting"
    assert told["waits_for"]
    assert told["since"] <= told["written"]
    assert list((tmp_path / "heartbeat").glob("*.json")) == [path]
