"""Tasks in processes that end with this one, however it ends."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from stablelm.errors import ProcessLostError

T = TypeVar("T")
R = TypeVar("R")


def run_all(work: Callable[[T], R], tasks: Sequence[T], *, workers: int) -> Iterator[tuple[int, R]]:
    """(number, result) of each task as it is done, in up to `workers` processes; with one worker in this process.

    `work` and tasks must be importable and picklable. What a task raises is raised here, and the others are
    ended. Raises ProcessLostError when a process was killed from outside.
    """
    if workers == 1 or len(tasks) < 2:
        yield from ((number, work(task)) for number, task in enumerate(tasks))
        return
    others = set(multiprocessing.active_children())
    # A forked process would inherit threads' locks; a fresh one has no such surprises.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_watch, initargs=(os.getpid(),))
    try:
        numbers = {pool.submit(work, task): number for number, task in enumerate(tasks)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise ProcessLostError(
            "a worker was killed, perhaps because memory ran out; use fewer --workers and run again: "
            "finished files are kept"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        ended = set(multiprocessing.active_children()) - others
        for process in ended:
            process.terminate()
        for process in ended:
            process.join()


def _watch(parent: int) -> None:
    """Ends this process when its parent is gone, even by kill -9; an interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
