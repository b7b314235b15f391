"""Rows of a rank made ahead: by threads that each serve some of its lanes, or listen to a process that does.

A worker process is a fresh Python that knows what it is sent and nothing else: a fork would inherit the locks of other
threads, and the program's own module is not imported again. It ends with its parent, however that ends.
"""

import atexit
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from stablelm.data.mixture import RunText
from stablelm.data.order import Cursor
from stablelm.data.packing import BatchRow, LaneRows, RowMaker, SourceCursors
from stablelm.data.storage import stall_monitor
from stablelm.errors import ProcessLostError, UserError

# Open files that the process may need beside those of the lanes.
OTHER_FILES = 256
# The new process needs the module search path before it can unpickle its task.
PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from stablelm.data.workers import serve; serve(int(sys.argv[1]))"
# Seconds between looks at the parent and at the reads that wait.
WATCH = 0.3

_running: "weakref.WeakSet[WorkerProcess]" = weakref.WeakSet()


class RowProducer:
    """Rows of a rank by number.

    Maker i of T serves the rank's lanes ≡ i mod T, and so its rows ≡ i mod T within each turn of the lanes; a thread
    each keeps it at work, from the batch `first` on, at most `ahead` batches beyond the one that was last asked for,
    with `depth` of them asked for at a time. `numbers`: of the rows of a batch.
    """

    def __init__(
        self,
        makers: Sequence[RowMaker],
        lanes: int,
        first: int,
        numbers: Callable[[int], range],
        *,
        ahead: int,
        depth: int,
    ):
        self._makers, self._lanes = makers, lanes
        self._numbers, self._depth = numbers, depth
        self._ready: dict[int, BatchRow | BaseException] = {}
        self._limit = first + ahead
        self._closed = False
        lock = threading.Lock()
        self._room, self._filled = threading.Condition(lock), threading.Condition(lock)
        self._threads = [
            threading.Thread(target=self._work, args=(first, index), name=f"data-{index}", daemon=True)
            for index in range(len(makers))
        ]
        for thread in self._threads:
            thread.start()

    def take(self, numbers: range) -> list[BatchRow]:
        """The rows of the next batch, which have these numbers; raises what their making raised."""
        rows = []
        with self._filled:
            self._limit += 1
            self._room.notify_all()
            for number in numbers:
                while number not in self._ready:
                    if self._closed:
                        raise RuntimeError("the loader was closed while it waited for a batch")
                    self._filled.wait()
                row = self._ready.pop(number)
                if isinstance(row, BaseException):
                    raise row
                rows.append(row)
        return rows

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._room.notify_all()
            self._filled.notify_all()
        for maker in self._makers:
            maker.close()
        for thread in self._threads:
            # One that waits for a store ends by itself later; a daemon does not keep the program alive.
            thread.join(timeout=1.0)

    def _work(self, batch: int, index: int) -> None:
        maker, asked = self._makers[index], deque[list[int]]()
        while True:
            with self._room:
                while not asked and batch >= self._limit and not self._closed:
                    self._room.wait()
                limit = self._limit
            while len(asked) < self._depth and batch < limit:
                asked.append(self._share(self._numbers(batch), index))
                maker.ask(asked[-1])
                batch += 1
            made = self._receive(maker, asked.popleft()) if asked else {}
            with self._filled:
                if self._closed:
                    return
                # The rows of a batch are handed over at once: switching threads costs more than a row of shards.
                self._ready |= made
                self._filled.notify()
            if any(isinstance(row, BaseException) for row in made.values()):
                return

    def _share(self, numbers: range, index: int) -> list[int]:
        return [number for number in numbers if number % self._lanes % len(self._makers) == index]

    def _receive(self, maker: RowMaker, numbers: list[int]) -> dict[int, BatchRow | BaseException]:
        made: dict[int, BatchRow | BaseException] = {}
        rows = maker.receive()
        for number in numbers:
            if self._closed:
                break
            try:
                made[number] = next(rows)
            except BaseException as error:
                made[number] = error
                break
        return made


def allow_open_files(lanes: int) -> None:
    """Raise the soft limit of open files so that every lane can hold one; the hard limit stays."""
    count = lanes + OTHER_FILES
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True)
class WorkerTask:
    """What a worker makes: the rows of the lanes with the indices `mine` in `names`, from `cursors` on."""

    text: RunText
    mine: range
    names: range
    cursors: Mapping[int, Cursor | SourceCursors]
    data_step: int
    borders: bool

    def maker(self, *, threads: int = 1) -> LaneRows:
        lanes = [self.names[index] for index in self.mine]
        windows = self.text.windows(lanes, self.cursors, self.data_step, threads=threads)
        return LaneRows(windows, self.mine, self.names, borders=self.borders)


class WorkerProcess:
    """`RowMaker` in a process of its own. Its rows raise ProcessLostError when the process has ended."""

    def __init__(self, task: WorkerTask):
        ours, theirs = socket.socketpair()
        # Threads of numeric libraries would only be in the way of the rank's own.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
            )
        self._connection = Connection(ours.detach())
        self._first: bytes | None = pickle.dumps(task)
        _running.add(self)

    def ask(self, numbers: Sequence[int]) -> None:
        # `receive` reports a process that has ended.
        with contextlib.suppress(OSError):
            if self._first is not None:
                self._connection.send_bytes(self._first)
                self._first = None
            self._connection.send(numbers)

    def receive(self) -> Iterator[BatchRow]:
        message = self._message()
        while isinstance(message, ReportedWaits):
            stall_monitor.relay(self, message)
            message = self._message()
        stall_monitor.relay(self, ReportedWaits())  # later waits come with the next rows
        rows, error = message
        yield from rows
        if error is not None:
            raise error

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        _running.discard(self)
        stall_monitor.relay(self, ReportedWaits())

    def _message(self):
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise ProcessLostError(
                f"a worker process of the data {_ended(code)}; start again, with a smaller data.workers if it happens "
                "again"
            ) from None


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    return f"was killed by signal {name}" + (", perhaps because memory ran out" if -code == signal.SIGKILL else "")


class ReportedWaits(list[stall_monitor.Wait]):
    """The reads of a worker that wait for a store."""


@atexit.register
def _end_all() -> None:
    for worker in list(_running):
        worker.close()


def serve(descriptor: int) -> None:
    """Answers requests until the parent has ended."""
    # Stops are the rank's to decide: a terminal and some launchers signal every process of the tree.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    connection, lock = Connection(descriptor), threading.Lock()
    threading.Thread(target=_watch, args=(connection, lock, os.getppid()), daemon=True).start()
    try:
        maker = connection.recv().maker()
        while True:
            maker.ask(connection.recv())
            answer = _answer(maker.receive())
            with lock:
                connection.send(answer)
    except (EOFError, OSError):
        os._exit(0)


def _answer(made: Iterator[BatchRow]) -> tuple[list[BatchRow], BaseException | None]:
    """The rows and what ended them, if something did; positions are sent as cursors, which are smaller."""
    rows = []
    try:
        for row in made:
            rows.append(row._replace(position=row.position.cursor()))
    except UserError as error:
        return rows, error
    except Exception as error:
        return rows, RuntimeError(f"in a worker process of the data: {error!r}\n{traceback.format_exc()}")
    return rows, None


def _watch(connection: Connection, lock: threading.Lock, parent: int) -> None:
    """Ends this process with its parent, and reports to it which reads wait."""
    reported: list[stall_monitor.Wait] = []
    while os.getppid() == parent:
        with lock, contextlib.suppress(OSError):
            # Under the lock, so that no wait is reported after the rows that waited.
            waits = stall_monitor.waiting()
            if waits != reported:
                reported = waits
                connection.send(ReportedWaits(waits))
        time.sleep(WATCH)
    os._exit(1)
