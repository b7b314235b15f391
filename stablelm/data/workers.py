"""A process that reads and tokenizes some of a rank's lanes and sends their rows, many in a message.

It is a fresh Python that knows what it is sent and nothing else: a fork would inherit the locks of other
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from stablelm.data.mixture import Cursors
from stablelm.data.order import Cursor
from stablelm.data.rows import LocalMaker, Row
from stablelm.data.run_text import RunText
from stablelm.data.storage import stall_monitor
from stablelm.errors import ProcessLostError, UserError

# Where a fresh Python looks for modules is what it must know before it can be told anything else.
PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from stablelm.data.workers import serve; serve(int(sys.argv[1]))"
# Seconds between looks at the parent and at the reads that wait.
WATCH = 0.3

_running: "weakref.WeakSet[WorkerProcess]" = weakref.WeakSet()


@dataclass(frozen=True)
class Task:
    """What a worker makes: the rows of the places `mine` among the lanes `names`, from `cursors` on."""

    text: RunText
    mine: range
    names: range
    cursors: Mapping[int, Cursor | Cursors]
    data_step: int
    borders: bool

    def maker(self, *, threads: int = 1) -> LocalMaker:
        lanes = [self.names[place] for place in self.mine]
        windows = self.text.windows(lanes, self.cursors, self.data_step, threads=threads)
        return LocalMaker(windows, self.mine, self.names, borders=self.borders)


class WorkerProcess:
    """`rows.Maker` in a process of its own. Its rows raise ProcessLostError when the process is gone."""

    def __init__(self, task: Task):
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
        # One that has gone is told by `receive`.
        with contextlib.suppress(OSError):
            if self._first is not None:
                self._connection.send_bytes(self._first)
                self._first = None
            self._connection.send(numbers)

    def receive(self) -> Iterator[Row]:
        message = self._message()
        while isinstance(message, Waits):
            stall_monitor.relay(self, message)
            message = self._message()
        stall_monitor.relay(self, Waits())  # what it says next comes with the next rows
        rows, error = message
        yield from rows
        if error is not None:
            raise error

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        _running.discard(self)
        stall_monitor.relay(self, Waits())

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


class Waits(list[stall_monitor.Wait]):
    """The reads of a worker that wait for a store."""


@atexit.register
def _end_all() -> None:
    for worker in list(_running):
        worker.close()


def serve(descriptor: int) -> None:
    """Answers requests until the parent is gone."""
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


def _answer(made: Iterator[Row]) -> tuple[list[Row], BaseException | None]:
    """The rows and what ended them, if something did; a place travels as the few numbers it stands for."""
    rows = []
    try:
        for row in made:
            rows.append(row._replace(place=row.place.cursor()))
    except UserError as error:
        return rows, error
    except Exception as error:
        return rows, RuntimeError(f"in a worker process of the data: {error!r}\n{traceback.format_exc()}")
    return rows, None


def _watch(connection: Connection, lock: threading.Lock, parent: int) -> None:
    """Ends this process with its parent, and tells that one which reads wait."""
    told: list[stall_monitor.Wait] = []
    while os.getppid() == parent:
        with lock, contextlib.suppress(OSError):
            # Under the lock, so that none is told after the rows for which it waited.
            waits = stall_monitor.waiting()
            if waits != told:
                told = waits
                connection.send(Waits(waits))
        time.sleep(WATCH)
    os._exit(1)
