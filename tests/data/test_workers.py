"""Worker processes give the batches that the rank itself would make, and never outlive it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.httpserver import serve
from support.letters import LetterTokenizer, write_corpus, write_rows
from support.prepared import write_shards

from stablelm.config.schema import DataConfig
from stablelm.data import workers as data_workers
from stablelm.data.loader import Loader
from stablelm.data.storage.stall_monitor import waiting
from stablelm.errors import DataError, ProcessLostError

LANES = BATCH = 12
STEPS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"), [40, 0, 33, 46])


def loader(files: Any, workers: int, *, world: int = 1, rank: int = 0, **data) -> Loader:
    settings: Any = {"seq_len": 16, "lanes": LANES, "shuffle_block": 4, "prefetch": 2, "worker_kind": "process"} | data
    config = DataConfig(workers=workers, **settings)
    return Loader(
        files, LetterTokenizer(), config, seed=5, global_batch_size=BATCH, world_size=world, rank=rank, documents=True
    )


def read(each: Loader, steps: int) -> list[tuple]:
    batches = [each.next() for _ in range(steps)]
    assert all(batch.documents is not None for batch in batches)
    return [(b.tokens.tolist(), b.targets.tolist(), b.documents.tolist(), b.data_step) for b in batches]  # pyright: ignore[reportOptionalMemberAccess]


def processes() -> set[int]:
    return {each._process.pid for each in data_workers._running}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: set[int], seconds: float = 5.0) -> bool:
    ends = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < ends:
        time.sleep(0.05)
    return not any(map(running, pids))


def mixed(files: list[str]) -> tuple[dict[str, list[str]], Any]:
    weights: Any = {"a.path": "a", "a.weight.0": 0.8, "a.weight.3": 0.2, "b.path": "b", "b.weight": 0.5}
    return {"a": files[:3], "b": files[3:]}, weights


@pytest.mark.parametrize("kind", ["split", "best_fit", "shards", "mixture"])
def test_same_batches_and_places_as_without_workers(files, tmp_path, kind):
    text: Any = files
    options: Any = {"packing": "best_fit"} if kind == "best_fit" else {}
    if kind == "shards":
        text = write_shards(files, tmp_path / "prepared")
    if kind == "mixture":
        text, options["mixture"] = mixed(files)
    alone = loader(text, 0, **options)
    expected, states = [], []
    for _ in range(STEPS):
        expected += read(alone, 1)
        states.append(alone.state())
    for workers in (1, 3):
        each = loader(text, workers, **options)
        assert read(each, 5) == expected[:5]
        assert each.state() == states[4]
        assert each.epochs() == loader_at(text, states[4], options).epochs()
        each.close()
    resumed = loader(text, 2, **options)
    for _ in range(2):  # twice in a row
        resumed.load(states[4])
        assert read(resumed, STEPS - 5) == expected[5:]
        assert resumed.state() == states[-1]
    resumed.close()
    alone.close()


def loader_at(files: Any, state: dict, options: dict) -> Loader:
    each = loader(files, 0, **options)
    each.load(state)
    return each


def test_two_ranks_with_processes_make_the_rows_of_one(files):
    alone, pair = loader(files, 0), [loader(files, 2, world=2, rank=rank) for rank in range(2)]
    for tokens, _, _, _ in read(alone, 4):
        for rank, each in enumerate(pair):
            assert each.next().tokens.tolist() == tokens[rank::2]
    for each in (alone, *pair):
        each.close()


def test_close_leaves_no_process(files):
    each = loader(files, 3)
    each.next()
    pids = processes()
    assert len(pids) >= 3
    each.close()
    assert gone(pids)


def test_an_error_comes_with_the_batch_it_belongs_to(tmp_path):
    path = Path(write_rows(tmp_path / "a.json", ["x" * 99] * 40))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:20]) + b"not json\n" + b"".join(lines[20:]))
    told = []
    for workers in (0, 2):
        each = loader([str(path)], workers)
        with pytest.raises(DataError, match="line 21: not valid JSON") as failure:
            read(each, 99)
        told.append((str(failure.value), each.state()["data_step"]))
        each.close()
    assert told[0] == told[1]


def test_a_killed_worker_ends_the_run_with_a_sentence(files):
    each = loader(files, 2)
    each.next()
    for pid in processes():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessLostError, match="worker process of the data was killed by signal SIGKILL"):
        read(each, 20)
    each.close()


def test_reads_that_wait_in_a_worker_are_known_in_the_rank(tmp_path, files):
    folder = Path(files[0]).parent
    with serve(folder) as server:
        url = f"{server.url}/part-00000.json"
        each = loader([url], 1, retry_budget=60)
        server.down = True
        asking = threading.Thread(target=each.next)
        asking.start()
        ends = time.monotonic() + 20
        while not told(url) and time.monotonic() < ends:
            time.sleep(0.05)
        known, server.down = told(url), False
        asking.join(30)
        assert known
        assert not asking.is_alive()
        each.close()
        assert not told(url)


def told(url: str) -> bool:
    return any(wait.file == url for wait in waiting())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_signals_to_the_whole_tree_do_not_end_a_worker(files, name):
    each = loader(files, 1)
    each.next()
    for pid in processes():
        os.kill(pid, getattr(signal, name))
    read(each, 20)
    each.close()


PARENT = """
import sys, time
from test_workers import loader, processes
if __name__ == "__main__":
    each = loader(sys.argv[1:], 2)
    each.next()
    print(*processes(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(files, tmp_path, how):
    (tmp_path / "parent.py").write_text(PARENT)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", *files], stdout=subprocess.PIPE, env=environ, text=True
    )
    assert parent.stdout is not None
    pids = set(map(int, parent.stdout.readline().split()))
    assert len(pids) == 2
    assert all(map(running, pids))
    parent.send_signal(how)
    parent.wait()
    assert gone(pids)
