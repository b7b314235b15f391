"""Notes that the ranks of an attempt leave one another when collectives no longer work."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from stablelm.json_text import load
from stablelm.new_files import replace_file
from stablelm.private_names import PrefixStore, Store
from stablelm.small_files import read_small

STORE_SECONDS = 2.0
"""How long the process group's store, or the folder, may take for one note."""


class RankStore(Protocol):
    """Notes by name; a name that was claimed once stays claimed."""

    def put(self, name: str, value: Any) -> None: ...
    def get(self, name: str) -> Any:
        """The note, or None where there is none."""
        ...

    def claim(self, name: str) -> bool:
        """True for exactly one caller among all ranks."""
        ...


class ProcessGroupStore:
    """On the process group's store, through a connection of its own: the main thread may be waiting on the other.

    A store whose process was suspended, or whose host is silent, lets its caller wait without end, whatever time-out it
    was given.
    """

    def __init__(self, store: Store, attempt: int):
        self._store = PrefixStore(f"watch/{attempt}", store.clone())  # type: ignore[attr-defined]

    def put(self, name: str, value: Any) -> None:
        self._store.set(name, json.dumps(value))

    def get(self, name: str) -> Any:
        return json.loads(self._store.get(name)) if self._store.check([name]) else None

    def claim(self, name: str) -> bool:
        return self._store.add(f"claim/{name}", 1) == 1


class FolderStore:
    """In a folder that all ranks share: for when the process that kept the store has ended."""

    def __init__(self, folder: Path, attempt: int):
        self._folder, self._attempt = folder, attempt

    def put(self, name: str, value: Any) -> None:
        replace_file(self._path(name), json.dumps(value))

    def get(self, name: str) -> Any:
        try:
            return load(read_small(self._path(name)))
        except (OSError, ValueError):
            return None

    def claim(self, name: str) -> bool:
        try:
            os.close(os.open(self._path(f"claim-{name}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW))
        except FileExistsError:
            return False
        except OSError:
            return True  # better reported twice than not at all
        return True

    def _path(self, name: str) -> Path:
        return self._folder / f".{self._attempt}-{name.replace('/', '-')}"


class LocalStore:
    """For one process."""

    def __init__(self) -> None:
        self._notes: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        self._notes[name] = value

    def get(self, name: str) -> Any:
        return self._notes.get(name)

    def claim(self, name: str) -> bool:
        return self._notes.setdefault(f"claim/{name}", claimed := object()) is claimed


class FallbackStore:
    """The process group's store, and the folder where that fails or is silent. Raises nothing and returns in time.

    After its first failure the store counts as `lost`, with the process that kept it. One that is silent may answer
    later. Claims, and notes that are not a rank's own, go to both: the process that keeps the store may end first.
    """

    def __init__(self, store: RankStore, folder: RankStore):
        self._store, self._folder = _Calls(store), _Calls(folder)
        self.lost = False

    def put(self, name: str, value: Any) -> None:
        on_store = self._on_store(lambda notes: notes.put(name, value), late=True)
        if on_store is _NO_ANSWER or not name.startswith("rank/"):
            self._on_folder(lambda notes: notes.put(name, value), None)

    def get(self, name: str) -> Any:
        note = self._on_store(lambda notes: notes.get(name))
        return self._on_folder(lambda notes: notes.get(name), None) if note is _NO_ANSWER else note

    def claim(self, name: str) -> bool:
        # Ranks that the store answers and ranks that it does not must not both have it.
        mine = self._on_store(lambda notes: notes.claim(name))
        return bool(mine) and self._on_folder(lambda notes: notes.claim(name), True)

    def _on_store(self, act: Callable[[RankStore], Any], *, late: bool = False) -> Any:
        """What the store answers, or `_NO_ANSWER`; with `late` the request reaches a silent store once it answers."""
        for _ in range(2):
            if self.lost:
                break
            try:
                return self._store.answer(act, late)
            except TimeoutError:
                return _NO_ANSWER
            except Exception:  # a watchdog survives any failure of the network
                time.sleep(0.1)
        self.lost = True
        return _NO_ANSWER

    def _on_folder(self, act: Callable[[RankStore], Any], otherwise: Any) -> Any:
        try:
            return self._folder.answer(act, late=False)
        except Exception:  # nor does a disk failure stop it
            return otherwise


_NO_ANSWER = object()
"""True, as a claim is that the store does not refuse."""


class _Calls:
    """Calls of a store, one after the other in a thread of their own, which may block for ever: its callers do not."""

    def __init__(self, store: RankStore):
        self._store, self._queue = store, SimpleQueue[tuple[Future[Any], Callable[[RankStore], Any]]]()
        self._began: float | None = None  # the call under way
        Thread(target=self._work, name="rank store", daemon=True).start()

    def answer(self, act: Callable[[RankStore], Any], late: bool) -> Any:
        """Raises TimeoutError `STORE_SECONDS` after the call under way began, this one or one before it."""
        future: Future[Any] = Future()
        began, now = self._began, time.monotonic()
        self._queue.put((future, act))
        try:
            return future.result(max(0.0, STORE_SECONDS - (now - (began or now))))
        except TimeoutError:
            if not late:
                future.cancel()
            raise

    def _work(self) -> None:
        while True:
            future, act = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            self._began = time.monotonic()
            try:
                future.set_result(act(self._store))
            except Exception as error:
                future.set_exception(error)
            self._began = None
