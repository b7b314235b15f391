"""Heartbeat and watchdog of a rank: it notices that the main thread is stuck, or another rank, and ends the process.

All ranks end within a quarter of a minute of the first that notices. One of them, whichever is first, says why.
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
from stablelm.data.storage.stores import STALL_SECONDS
from stablelm.engine.mesh import Ranks
from stablelm.errors import EXIT_RANK_LOST
from stablelm.new_files import make_folder, open_new, replace_file
from stablelm.train.board import Alone, FileBoard, SafeBoard, StoreBoard
from stablelm.train.culprit import culprit
from stablelm.train.pulse import Pulse, in_collective, waits_for

HEARTBEAT_SECONDS = 10.0
LOOK_SECONDS = 3.0
ANSWER_SECONDS = 7.0  # more than LOOK_SECONDS and STORE_SECONDS: a rank that is alive has answered by then
LAST_WORDS_SECONDS = 5.0
READING = ("starting", "data", "record")
"""Phases in which the main thread may wait for text itself; in others it is the threads that read ahead."""


class Watch:
    """Threads of one rank from `start` to `stop`; `hosts` by rank; `tell(code, words)` writes the summary."""

    def __init__(self, config: Config, ranks: Ranks, hosts: list[str], attempt: int, tell: Callable[[int, str], None]):
        self.pulse = Pulse()
        self.extra_seconds: dict[str, float] = {}
        """By phase: what is waited on top of the time-out, since the phase has its own."""
        self._retry_budget = config.data.retry_budget
        self._observe, self._ranks, self.hosts, self._tell = config.observe, ranks, hosts, tell
        self._run_dir = Path(config.run.dir)
        files = FileBoard(self._run_dir / "heartbeat", attempt)
        self._board = Alone() if ranks.store is None else SafeBoard(StoreBoard(ranks.store, attempt), files)
        self._main = threading.main_thread().ident or 0
        self._stopped = threading.Event()
        self._seen, self._unchanged = self.pulse.now, 0.0
        self._last_wait: Any = None

    def start(self) -> None:
        _try(lambda: [make_folder(self._run_dir / name) for name in ("heartbeat", "stacks")])
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()

    def stop(self) -> None:
        """Ends both threads: from here on nobody watches."""
        self._stopped.set()

    def speaks(self) -> bool:
        """Whether this rank is the one that says why the run fails; call once a rank at most."""
        return self._board.claim("told")

    def said(self) -> None:
        """After the reason was told: makes every other rank end soon, wherever it waits."""
        self._board.put("alarm", {"kind": "failure", "rank": self._ranks.rank})
        self._board.put("said", True)
        self.stop()

    def lost(self) -> None:
        """For a rank whose collective broke, in its main thread: names who is silent, unless another rank speaks."""
        self._board.put("alarm", {"kind": "lost", "rank": self._ranks.rank})
        self._leave_note()
        self._name_the_culprit()

    def note(self) -> dict[str, Any]:
        """What this rank says of itself."""
        now, waits = self.pulse.now, waiting()
        return {
            "rank": self._ranks.rank,
            "host": self.hosts[self._ranks.rank],
            "pid": os.getpid(),
            "step": now.step,
            "phase": now.phase,
            "place": now.place,
            "since": now.since,
            "waits_for": waits_for(self._main),
            **({"store": {**vars(waits[0]), "reads": len(waits)}} if waits else {}),
            "written": time.time(),
        }

    def _beat(self) -> None:
        path = self._run_dir / "heartbeat" / f"rank-{self._ranks.rank}.json"
        while True:
            with suppress(OSError):  # a full disk is told where it matters
                replace_file(path, json.dumps(self.note()) + "\n")
            if self._stopped.wait(HEARTBEAT_SECONDS):
                return

    def _watch(self) -> None:
        look = min(LOOK_SECONDS, self._observe.hang_seconds / 4)
        last = time.monotonic()
        while not self._stopped.wait(look):
            # Time in which the process was suspended is none.
            last, passed = time.monotonic(), min(time.monotonic() - last, 2 * look)
            alarm = self._board.get("alarm")
            if alarm is None and self._stuck(passed):
                alarm = {"kind": "hang", "rank": self._ranks.rank}
                self._board.put("alarm", alarm)
            if alarm is None and getattr(self._board, "lost", False):
                alarm = {"kind": "lost", "rank": self._ranks.rank}
            if alarm is not None:
                self._end(alarm["kind"])

    def _stuck(self, passed: float) -> bool:
        """Whether nothing has changed for too long, `passed` more seconds of which nobody waited for a store."""
        if self.pulse.now is not self._seen:
            self._seen, self._unchanged = self.pulse.now, 0.0
            return False
        limit = self._observe.hang_seconds if self.pulse.steps else self._observe.first_step_seconds
        limit += self.extra_seconds.get(self._seen.phase, 0.0)
        if self._waits_for_a_store():
            self._board.put("wait", [self._ranks.rank, time.time()])
            return False
        before, self._unchanged = self._unchanged, self._unchanged + passed
        if before < limit / 2 <= self._unchanged:
            self._last_wait = self._board.get("wait")
        if self._unchanged < limit:
            return False
        last, self._last_wait = self._last_wait, self._board.get("wait")
        if self._last_wait != last:  # another rank waits, and this one for it
            self._unchanged = limit / 2
            return False
        return True

    def _waits_for_a_store(self) -> bool:
        """Whether the main thread waits for text that is tried again, or may be before it has failed."""
        now = time.time()
        if self._seen.phase == "data" and now - self._seen.since < STALL_SECONDS:
            return True
        oldest = now - self._retry_budget - STALL_SECONDS  # the last try may go beyond the budget
        return self._seen.phase in READING and any(wait.since > oldest for wait in waiting())

    def _end(self, kind: str) -> None:
        self._leave_note()
        _within(LAST_WORDS_SECONDS, self._write_stacks)
        if kind == "failure":
            # Who failed has said why; a main thread that waits for it in vain gets time to notice by itself.
            self._stopped.wait(LAST_WORDS_SECONDS)
        else:
            self._name_the_culprit()
        if not self._stopped.is_set():
            os._exit(EXIT_RANK_LOST)

    def _leave_note(self) -> None:
        now, note = self.pulse.now, self.note()
        where = now.words() + (f", waiting for {note['store']['file']}" if "store" in note else "")
        own = {"count": now.count, "where": where, "seconds": time.time() - now.since}
        self._board.put(f"rank/{self._ranks.rank}", note | own | {"collective": in_collective(self._main)})

    def _name_the_culprit(self) -> None:
        """One rank gathers the notes and speaks; the others wait for it, as a launcher ends all with the first."""
        if not self._stopped.is_set() and self.speaks():
            words = f"{culprit(self._notes(), self.hosts)}; stacks of all ranks: {self._run_dir / 'stacks'}"
            _within(LAST_WORDS_SECONDS, lambda: self._say(words))
            self._board.put("said", True)
        deadline = time.monotonic() + ANSWER_SECONDS + LAST_WORDS_SECONDS
        while self._board.get("said") is None and time.monotonic() < deadline:
            time.sleep(0.2)

    def _say(self, words: str) -> None:
        sys.stdout.flush()
        os.write(2, f"error: {words}\n".encode())
        self._tell(EXIT_RANK_LOST, words)

    def _notes(self) -> dict[int, dict[str, Any] | None]:
        """The notes of all ranks, None for those that leave none in time."""
        notes: dict[int, dict[str, Any] | None] = dict.fromkeys(range(self._ranks.world_size))
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            for rank in [rank for rank, note in notes.items() if note is None]:
                notes[rank] = self._board.get(f"rank/{rank}")
            if None not in notes.values() or time.monotonic() > deadline:
                return notes
            time.sleep(0.2)

    def _write_stacks(self) -> None:
        folder = self._run_dir / "stacks"
        with io.TextIOWrapper(open_new(folder / f"rank-{self._ranks.rank}.txt")) as file:
            now = self.pulse.now
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.hosts[self._ranks.rank]}: {now.words()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        recorded = _flight_recorder() if self._ranks.device.type == "cuda" else b""
        if recorded:
            replace_file(folder / f"nccl-rank-{self._ranks.rank}.pickle", recorded)


def _flight_recorder() -> bytes:
    """NCCL's last collectives as torch has recorded them; empty where it does not."""
    import torch._C._distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    return dump() if dump is not None else b""


def _within(seconds: float, act: Callable[[], Any]) -> None:
    """Acts in a thread of its own and waits no longer for it: a dead file system must not hold up the end."""
    thread = threading.Thread(target=lambda: _try(act), daemon=True)
    thread.start()
    thread.join(seconds)


def _try(act: Callable[[], Any]) -> None:
    try:
        act()
    except Exception as error:  # no mishap here may be the end of a sound run
        print(f"warning: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
