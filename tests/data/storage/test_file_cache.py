"""Whole files kept on disk: fetched once by many readers, never half, the oldest deleted, nothing lost on trouble."""

import multiprocessing
import os
import random
import threading

import pytest
from support.httpserver import serve

from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.range_file import RangeFile
from stablelm.errors import DataError

SIZE = 200_000
CONTENT = {f"{n}.json": random.Random(n).randbytes(SIZE) for n in range(5)}


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    with serve(folder) as server:
        yield server


def options(tmp_path, files: float, budget: float = 5.0) -> ReadOptions:
    return ReadOptions(
        retry_budget=budget, cache=str(tmp_path / "cache"), cache_bytes=int(files * SIZE), block=64 << 10
    )


def read(url: str, given: ReadOptions) -> bytes:
    with RangeFile(url, given) as file:
        return file.readall()


def names(tmp_path) -> set[str]:
    return {path.name.split("-")[-1] for path in (tmp_path / "cache" / "files").iterdir() if path.suffix == ".json"}


def size(tmp_path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache" / "files").iterdir())


def fetched(server) -> int:
    return sum(request.startswith("GET") for request in server.requests)


def test_a_file_is_fetched_once_and_the_oldest_goes_first(tmp_path, store):
    given = options(tmp_path, 2.5)
    for name in ("0.json", "1.json", "0.json", "2.json", "0.json"):
        assert read(f"{store.url}/{name}", given) == CONTENT[name]
        assert size(tmp_path) <= 2.5 * SIZE
    assert names(tmp_path) == {"0.json", "2.json"}, "1.json was used longest ago"
    store.requests.clear()
    assert read(f"{store.url}/0.json", given) == CONTENT["0.json"]
    assert store.requests == []
    assert read(f"{store.url}/0.json", options(tmp_path, 2.5)) == CONTENT["0.json"]
    assert fetched(store) == 0, "another run asks only whether the file is the same"


def test_a_file_that_is_deleted_while_it_is_read_goes_on(tmp_path, store):
    given = options(tmp_path, 1)
    with RangeFile(f"{store.url}/0.json", given) as file:
        head = file.read(1000)
        assert read(f"{store.url}/1.json", given) == CONTENT["1.json"]
        assert names(tmp_path) == {"1.json"}
        assert head + file.readall() == CONTENT["0.json"]


def test_files_over_the_limit_and_no_limit_are_not_kept(tmp_path, store):
    for files in (0.9, 0):
        assert read(f"{store.url}/0.json", options(tmp_path, files)) == CONTENT["0.json"]
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path, store):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert read(f"{store.url}/0.json", options(tmp_path, 2)) == CONTENT["0.json"]


def test_another_content_is_another_file(tmp_path, store):
    read(f"{store.url}/0.json", options(tmp_path, 5))
    (store.folder / "0.json").write_bytes(CONTENT["1.json"][:-1])
    assert read(f"{store.url}/0.json", options(tmp_path, 5)) == CONTENT["1.json"][:-1]


def test_a_cut_download_leaves_nothing_and_a_dead_ones_part_is_cleared(tmp_path, store, monkeypatch):
    given = options(tmp_path, 1, budget=0.3)
    store.cuts, store.cut_after = 1000, 500
    with pytest.raises(DataError, match=r"0\.json: unreadable"):
        read(f"{store.url}/0.json", given)
    assert names(tmp_path) == set()
    assert size(tmp_path) == 0
    store.cuts = 0
    part = tmp_path / "cache" / "files" / ".0123-9.json.part"
    part.write_bytes(bytes(SIZE))
    assert read(f"{store.url}/0.json", options(tmp_path, 1)) == CONTENT["0.json"]
    assert not part.exists()
    assert names(tmp_path) == {"0.json"}


def test_what_is_being_fetched_is_neither_deleted_nor_read(tmp_path, store):
    given = options(tmp_path, 1.5)
    asked, go = threading.Event(), threading.Event()

    def waits(request: str) -> None:
        if request.startswith("GET /1.json"):
            asked.set()
            go.wait(60)

    store.before = waits
    fetching = threading.Thread(target=read, args=(f"{store.url}/1.json", given))
    fetching.start()
    assert asked.wait(60)
    assert read(f"{store.url}/0.json", given) == CONTENT["0.json"], "no room: read from the store"
    assert names(tmp_path) == set()
    go.set()
    fetching.join()
    assert names(tmp_path) == {"1.json"}


def _read_all(url: str, cache: str, seed: int, results) -> None:
    given = ReadOptions(retry_budget=5, cache=cache, cache_bytes=5 * SIZE)
    order = sorted(CONTENT, key=lambda name: random.Random(f"{seed}{name}").random())
    results.put(all(read(f"{url}/{name}", given) == CONTENT[name] for name in order))


def test_many_processes_and_threads_fetch_each_file_once(tmp_path, store):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_read_all, args=(store.url, str(tmp_path / "cache"), seed, results)) for seed in range(2)
    ]
    for worker in workers:
        worker.start()
    got = []
    threads = [
        threading.Thread(target=lambda name=name: got.append(read(f"{store.url}/{name}", options(tmp_path, 5))))
        for name in CONTENT
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(CONTENT.values())
    assert all(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert fetched(store) == len(CONTENT), "each in one request, since a chunk holds it"
    assert names(tmp_path) == set(CONTENT)


def test_use_does_not_look_like_a_change(tmp_path, store):
    given = options(tmp_path, 5)
    with RangeFile(f"{store.url}/0.json", given) as file:
        head = file.read(10)
        (path,) = (tmp_path / "cache" / "files").glob("*.json")
        before = path.stat().st_atime_ns
        os.utime(path, ns=(before - 10**12, path.stat().st_mtime_ns))
        read(f"{store.url}/0.json", given)
        assert path.stat().st_atime_ns >= before
        assert head + file.readall() == CONTENT["0.json"]
