"""Heartbeat and watchdog of a rank: it detects that the main thread or another rank is stuck, and ends the process.

All ranks end within 15 seconds of the first one that detects it. The first of them reports the reason.
"""

import faulthandler
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stablelm.config.schema import Config
from stablelm.data.storage.stall_monitor import waiting
from stablelm.engine.ranks import Ranks
from stablelm.errors import EXIT_RANK_LOST
from stablelm.new_files import make_folder, open_new, replace_file
from stablelm.private_names import collectives_of_nccl
from stablelm.supervise.hang_diagnosis import HangDetector, diagnose
from stablelm.supervise.progress_marker import ProgressMarker, waits_in
from stablelm.supervise.rank_store import FallbackStore, FolderStore, LocalStore, ProcessGroupStore

HEARTBEAT_SECONDS = 10.0
CHECK_SECONDS = 3.0
ANSWER_SECONDS = 7.0  # above CHECK_SECONDS + STORE_SECONDS: a rank that is alive has answered by then
REPORT_SECONDS = 5.0


class Watchdog:
    """Threads of one rank from `start` to `stop`; `hosts` by rank; `summarise(code, reason)` writes the summary."""

    def __init__(
        self, config: Config, ranks: Ranks, hosts: list[str], attempt: int, summarise: Callable[[int, str], None]
    ):
        self.marker = ProgressMarker()
        self.hosts = hosts
        self._ranks, self._summarise = ranks, summarise
        self._check_seconds = min(CHECK_SECONDS, config.observe.hang_seconds / 4)
        self._run_dir = Path(config.run.dir)
        files = FolderStore(self._run_dir / "heartbeat", attempt)
        shared = None if ranks.store is None else ProcessGroupStore(ranks.store, attempt)
        self._notes = LocalStore() if shared is None else FallbackStore(shared, files)
        self._main = threading.main_thread().ident or 0
        self._stopped = threading.Event()
        self._detector = HangDetector(self.marker, config, self._notes, ranks.rank)
        self.extra_seconds = self._detector.extra_seconds

    def start(self) -> None:
        _try(lambda: [make_folder(self._run_dir / name) for name in ("heartbeat", "stacks")])
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()

    def stop(self) -> None:
        """Ends both threads; nothing is watched afterwards."""
        self._stopped.set()

    def may_report(self) -> bool:
        """Whether this rank is the one that reports why the run fails; call at most once a rank."""
        return self._notes.claim("report")

    def reported(self) -> None:
        """After the reason was reported: makes every other rank end soon, wherever it waits."""
        self._notes.put("alarm", {"kind": "failure", "rank": self._ranks.rank})
        self._notes.put("reported", True)
        self.stop()

    def lost(self) -> None:
        """For a rank whose collective failed, in its main thread: reports who is silent, unless another rank does."""
        self._notes.put("alarm", {"kind": "lost", "rank": self._ranks.rank})
        self._share_position()
        self._report_hang()

    def note(self) -> dict[str, Any]:
        """The content of this rank's heartbeat file."""
        now, waits = self.marker.now, waiting()
        return {
            "rank": self._ranks.rank,
            "host": self.hosts[self._ranks.rank],
            "pid": os.getpid(),
            "step": now.step,
            "phase": now.phase,
            "place": now.place,
            "since": now.since,
            "finished": self.marker.last_finished(),
            "waits_for": waits_in(self._main),
            **({"store": {**vars(waits[0]), "reads": len(waits)}} if waits else {}),
            "written": time.time(),
        }

    def _beat(self) -> None:
        path = self._run_dir / "heartbeat" / f"rank-{self._ranks.rank}.json"
        while True:
            with suppress(OSError):  # a full disk is reported where it matters
                replace_file(path, json.dumps(self.note()) + "\n")
            if self._stopped.wait(HEARTBEAT_SECONDS):
                return

    def _watch(self) -> None:
        look = self._check_seconds
        last = time.monotonic()
        while not self._stopped.wait(look):
            # Time for which the process was suspended does not count.
            last, passed = time.monotonic(), min(time.monotonic() - last, 2 * look)
            alarm = self._notes.get("alarm")
            if alarm is None and self._detector.stuck(passed):
                alarm = {"kind": "hang", "rank": self._ranks.rank}
                self._notes.put("alarm", alarm)
            if alarm is None and getattr(self._notes, "lost", False):
                alarm = {"kind": "lost", "rank": self._ranks.rank}
            if alarm is not None:
                self._end(alarm["kind"])

    def _end(self, kind: str) -> None:
        self._share_position()
        _within(REPORT_SECONDS, self._write_stacks)
        if kind == "failure":
            # The rank that failed has reported; a main thread that waits for it gets time to notice by itself.
            self._stopped.wait(REPORT_SECONDS)
        else:
            self._report_hang()
        if not self._stopped.is_set():
            os._exit(EXIT_RANK_LOST)

    def _share_position(self) -> None:
        now, note = self.marker.now, self.note()
        where = now.words() + (f", waiting for {note['store']['file']}" if "store" in note else "")
        own = {"progress": self.marker.progress(), "where": where, "seconds": time.time() - now.since}
        self._notes.put(f"rank/{self._ranks.rank}", note | own)

    def _report_hang(self) -> None:
        """One rank gathers the positions and reports; the others wait, since a launcher ends all with the first."""
        if not self._stopped.is_set() and self.may_report():
            words = f"{diagnose(self._positions(), self.hosts)}; stacks of all ranks: {self._run_dir / 'stacks'}"
            _within(REPORT_SECONDS, lambda: self._print(words))
            self._notes.put("reported", True)
        deadline = time.monotonic() + ANSWER_SECONDS + REPORT_SECONDS
        while self._notes.get("reported") is None and time.monotonic() < deadline:
            time.sleep(0.2)

    def _print(self, words: str) -> None:
        sys.stdout.flush()
        os.write(2, f"error: {words}\n".encode())
        self._summarise(EXIT_RANK_LOST, words)

    def _positions(self) -> dict[int, dict[str, Any] | None]:
        """The positions of all ranks, None for those that share none in time."""
        notes: dict[int, dict[str, Any] | None] = dict.fromkeys(range(self._ranks.world_size))
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            for rank in [rank for rank, note in notes.items() if note is None]:
                notes[rank] = self._notes.get(f"rank/{rank}")
            if None not in notes.values() or time.monotonic() > deadline:
                return notes
            time.sleep(0.2)

    def _write_stacks(self) -> None:
        folder = self._run_dir / "stacks"
        with io.TextIOWrapper(open_new(folder / f"rank-{self._ranks.rank}.txt")) as file:
            now = self.marker.now
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.hosts[self._ranks.rank]}: {now.words()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        recorded = collectives_of_nccl() if self._ranks.device.type == "cuda" else b""
        if recorded:
            replace_file(folder / f"nccl-rank-{self._ranks.rank}.pickle", recorded)


def _within(seconds: float, act: Callable[[], Any]) -> None:
    """Runs `act` in its own thread and waits at most `seconds`: a dead file system must not delay the end."""
    thread = threading.Thread(target=lambda: _try(act), daemon=True)
    thread.start()
    thread.join(seconds)


def _try(act: Callable[[], Any]) -> None:
    try:
        act()
    except Exception as error:  # no failure here may end a healthy run
        print(f"warning: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
