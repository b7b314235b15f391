"""Bad days of a store: what our reading delivers, and what `datasets`' own streaming does.

The same faults at the same bytes of the same files for both: connections cut in the middle of a body, 10 s of 503 and
of 429 with Retry-After, an outage, a server that restarts; each kind alone and all together, over a web server, an S3
server and a stand-in for the hub. Documents are C4's, tiled. Each reading runs in a process of its own, which writes
down a hash of every document it is given. `datasets` cannot open a json.gz on S3, so there it also gets plain json.

    python benchmarks/data_faults.py --data DIR_OF_JSON_GZ [--stores http,s3,hub] [--cuts 20] [--outage 30] [--out FILE]
"""

import argparse
import gzip
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_readers import DATASETS, OURS, PLAIN, mark, read

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from out_path import out_path  # noqa: E402

from tests.support.fakehub import COMMIT, FakeHub  # noqa: E402
from tests.support.httpserver import FaultyServer, serve  # noqa: E402
from tests.support.stores import s3_server  # noqa: E402

KINDS = ("none", "cuts", "5xx", "429", "outage", "restart", "all")
# Seconds that a storm lasts, and that its 429s ask to be waited for.
STORM, RETRY_AFTER = 10.0, 2.0


@dataclass(frozen=True)
class Fault:
    """Something that befalls the request that first asks for this part (0 to 1) of the file number `file`."""

    kind: str
    file: int
    at: float


@dataclass(frozen=True)
class Reading:
    """How a reading ended. `exact`: every document once and in order; else so many were `lost` and `repeated`.

    Of the faults `planned` so many `happened` before the end. `seconds` from the first request to the end; `waited`
    of them in retries of ours.
    """

    store: str
    faults: str
    reader: str
    planned: int
    happened: int
    documents: int
    delivered: int
    lost: int
    repeated: int
    exact: bool
    seconds: float
    waited: float
    ended: str


def plan(kind: str, *, files: int, cuts: int, seed: int) -> list[Fault]:
    """The faults of a scenario, in the order of their places."""
    draw = random.Random(f"{seed} {kind}")
    wanted = {"cuts": cuts, "5xx": 1, "429": 1, "outage": 1, "restart": 1}
    kinds = [name for name, times in wanted.items() if kind in (name, "all") for _ in range(times)]
    places = [Fault(name, draw.randrange(files), draw.uniform(0.02, 0.98)) for name in kinds]
    return sorted(places, key=lambda fault: (fault.file, fault.at))


class Scenario:
    """Lets the faults happen on a server: at most one a request, each once. `happened` counts them."""

    def __init__(self, server: FaultyServer, faults: list[Fault], names: list[str], *, outage: float, restart: float):
        self.server, self.names, self.outage, self.restart = server, names, outage, restart
        self.pending, self.happened = list(faults), 0
        self._lock = threading.Lock()
        server.draw, server.cuts, server.failures, server.before = None, 0, 0, self.request

    def request(self, line: str) -> None:
        """Called with each request before it is answered."""
        match = re.fullmatch(r"GET (\S+?)(?:\?\S*)? bytes=(\d+)-(\d*)", line)
        stem = match and match[1].rsplit("/", 1)[-1].removesuffix(".gz")
        if match is None or stem not in self.names or self.server.down or self.server.failures:
            return
        first, size = int(match[2]), self.sizes[match[1].rsplit("/", 1)[-1]]
        last = int(match[3] or size)
        with self._lock:
            for fault in self.pending:
                place = int(fault.at * size)
                if self.names[fault.file] == stem and first < place <= last:
                    self.pending.remove(fault)
                    self.happened += 1
                    self._happen(fault.kind, place - first)
                    return

    sizes: dict[str, int]

    def _happen(self, kind: str, after: int) -> None:
        server = self.server
        if kind == "cuts":
            server.cuts, server.cut_after = 1, after
        elif kind in ("5xx", "429"):
            server.failures, server.status = sys.maxsize, 503 if kind == "5xx" else 429
            threading.Timer(STORM, lambda: setattr(server, "failures", 0)).start()
            server.failure_headers = {"Retry-After": f"{RETRY_AFTER:g}"} if kind == "429" else {}
        else:
            server.down = True
            threading.Thread(target=self._away, args=(kind,), daemon=True).start()

    def _away(self, kind: str) -> None:
        if kind == "restart":
            self.server.stop()
            time.sleep(self.restart)
            self.server.start()
        else:
            time.sleep(self.outage)
            self.server.down = False


# --- the stores ---


@dataclass(frozen=True)
class Store:
    """A store behind a server that misbehaves: a pattern of its files, ENDING open, and what a reader must be told."""

    server: FaultyServer
    pattern: str
    environment: dict[str, str]
    storage: dict[str, Any]


@contextmanager
def stored(name: str, folder: Path) -> Iterator[Store]:
    """The files of a folder in the store `name`."""
    files = {f"en/{path.name}": path for path in folder.iterdir()}
    if name == "http":
        with serve(folder) as origin, serve(upstream=origin.url) as server:
            origin.tags = True
            numbers = f"{{{0:05d}..{len(files) // 2 - 1:05d}}}-of-{len(files) // 2:05d}"
            yield Store(server, f"{server.url}/tiled.{numbers}.ENDING", {}, {})
    elif name == "s3":
        import fsspec

        with s3_server() as variables, serve(upstream=variables["FSSPEC_S3_ENDPOINT_URL"]) as server:
            for key, path in files.items():
                fsspec.filesystem("s3").put_file(str(path), f"s3://bucket/{key}")
            environment = {key: value for key, value in variables.items() if key != "FSSPEC_S3_ENDPOINT_URL"}
            yield Store(server, "s3://bucket/en/tiled.*.ENDING", environment, {"s3.endpoint_url": server.url})
    else:
        contents = {key: path.read_bytes() for key, path in files.items()}
        with FakeHub(contents) as hub, serve(upstream=hub.url) as server:
            environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(folder.parent / "hub")}
            yield Store(server, f"hf://datasets/allenai/c4@{COMMIT}/en/tiled.*.ENDING", environment, {})


def tile(sources: list[Path], folder: Path, *, files: int, megabytes: float) -> None:
    """The documents again and again until their text has this size, each one different, as json.gz and as json."""
    rows = [json.loads(line) for file in sources for line in gzip.decompress(file.read_bytes()).splitlines()]
    copies = max(1, round(megabytes * 1e6 / sum(len(row["text"].encode()) for row in rows)))
    parts: list[list[str]] = [[] for _ in range(files)]
    for copy in range(copies):
        for index, row in enumerate(random.Random(copy).sample(rows, len(rows))):
            parts[index % files].append(json.dumps({**row, "text": f"{row['text']} #{copy}.{index}"}))
    for number, lines in enumerate(parts):
        content = ("\n".join(lines) + "\n").encode()
        name = f"tiled.{number:05d}-of-{files:05d}.json"
        (folder / name).write_bytes(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 6))


# --- what is measured ---


def start(store: Store, reader: str, ending: str, folder: Path, budget: float, limit: float) -> tuple[list[str], dict]:
    """(hashes of the documents, how it ended) of a reading in a process of its own."""
    out = folder / "documents"
    out.unlink(missing_ok=True)
    pattern = store.pattern.replace("ENDING", ending)
    request = {"reader": reader, "pattern": pattern, "storage": store.storage, "budget": budget}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "FSSPEC_"))}
    environment = {**kept, **store.environment, "PYTHONPATH": str(REPOSITORY), "HF_HUB_DISABLE_TELEMETRY": "1"}
    line = [sys.executable, __file__, "--read", json.dumps({**request, "out": str(out)})]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(line, env=environment, cwd=folder, capture_output=True, timeout=limit, check=False)
    lines = out.read_text().splitlines() if out.exists() else []
    if lines and lines[-1].startswith("{"):
        return lines[:-1], json.loads(lines[-1])
    return lines, {"ended": f"did not end within {limit:g} s", "seconds": limit, "waited": 0.0}


def judge(wanted: list[str], got: list[str]) -> dict[str, Any]:
    """Counts of documents, which are all different."""
    seen = set(got)
    return {
        "documents": len(wanted),
        "delivered": len(got),
        "lost": len(set(wanted) - seen),
        "repeated": len(got) - len(seen),
        "exact": got == wanted,
    }


def measure(name: str, folder: Path, options: argparse.Namespace) -> Iterator[Reading]:
    """Every reader under every scenario on one store."""
    packed = sorted((folder / "files").glob("*.json.gz"))
    lines = [line for file in packed for line in gzip.decompress(file.read_bytes()).splitlines()]
    wanted = [mark(json.loads(line)["text"]) for line in lines]
    with stored(name, folder / "files") as store:
        for kind in options.kinds:
            readers = [(OURS, "json.gz"), (DATASETS, "json.gz"), *([(PLAIN, "json")] if name == "s3" else [])]
            for reader, ending in readers:
                faults = plan(kind, files=len(packed), cuts=options.cuts, seed=options.seed)
                names = [path.name.removesuffix(".gz") for path in packed]
                scenario = Scenario(store.server, faults, names, outage=options.outage, restart=options.restart)
                scenario.sizes = {path.name: path.stat().st_size for path in (folder / "files").iterdir()}
                got, told = start(store, reader, ending, folder, options.budget, options.limit)
                while store.server.down or store.server.failures:  # of whoever gave up early
                    time.sleep(0.1)
                yield Reading(name, kind, reader, len(faults), scenario.happened, **judge(wanted, got), **told)


def table(readings: list[Reading]) -> str:
    """Markdown: a row for each store and scenario, the readers side by side; on S3 `datasets` reads plain json."""
    rows = ["| store | faults | stablelm | datasets |", "|---|---|---|---|"]
    by_scenario: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        by_scenario.setdefault((reading.store, reading.faults), []).append(reading)
    for (store, faults), (own, *_, other) in by_scenario.items():
        said = outcome(other).partition(":")[0] + (" (plain json)" if other.reader == PLAIN else "")
        rows.append(f"| {store} | {faults} | {outcome(own)}, {own.seconds:.0f} s | {said}, {other.seconds:.0f} s |")
    return "\n".join(rows)


def outcome(reading: Reading) -> str:
    """A reading in a few words."""
    if reading.exact:
        return "exact"
    repeated = f", {reading.repeated} twice" if reading.repeated else ""
    return f"{100 * reading.delivered / reading.documents:.0f} % of the documents{repeated}, then {reading.ended}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with .json.gz files of documents")
    parser.add_argument("--stores", type=lambda text: text.split(","), default=["http", "s3", "hub"])
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--outage", type=float, default=30.0, help="seconds")
    parser.add_argument("--restart", type=float, default=5.0, help="seconds that the server is away")
    parser.add_argument("--budget", type=float, default=600.0, help="our data.retry_budget")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a reading is ended")
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=60.0, help="text after tiling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=out_path, help="write the readings here as JSON")
    parser.add_argument("--read", type=json.loads, help=argparse.SUPPRESS)  # a reader's own process
    options = parser.parse_args()
    if options.read:
        return read(**{**options.read, "out": Path(options.read["out"])})
    if options.data is None:
        parser.error("--data is missing; name a folder with .json.gz files of documents")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's list of requests
    readings = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        sources = sorted(options.data.glob("*train*.json.gz")) or sorted(options.data.glob("*.json.gz"))
        tile(sources, folder / "files", files=options.files, megabytes=options.megabytes)
        for store in options.stores:
            for reading in measure(store, folder, options):
                readings.append(reading)
                print(
                    f"{reading.store:<5} {reading.faults:<8} {reading.reader:<21} {reading.seconds:6.1f} s, "
                    f"waited {reading.waited:5.1f} s: {outcome(reading)}",
                    flush=True,
                )
    print(table(readings))
    if options.out:
        options.out.write_text(json.dumps([asdict(reading) for reading in readings], indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
