"""A board on which the ranks of an attempt leave each other notes when collectives no longer work."""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from torch._C._distributed_c10d import PrefixStore, Store

STORE_SECONDS = 5.0
"""How long the process group's store may take for one note."""


class Board(Protocol):
    """Notes by name; a name that was claimed once stays claimed."""

    def put(self, name: str, value: Any) -> None: ...
    def get(self, name: str) -> Any:
        """The note, or None where there is none."""
        ...

    def claim(self, name: str) -> bool:
        """True for exactly one caller among all ranks."""
        ...


class StoreBoard:
    """On the process group's store, through a connection of its own: the main thread may be waiting on the other."""

    def __init__(self, store: Store, attempt: int):
        self._store = PrefixStore(f"watch/{attempt}", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=STORE_SECONDS))

    def put(self, name: str, value: Any) -> None:
        self._store.set(name, json.dumps(value))

    def get(self, name: str) -> Any:
        return json.loads(self._store.get(name)) if self._store.check([name]) else None

    def claim(self, name: str) -> bool:
        return self._store.add(f"claim/{name}", 1) == 1


class FileBoard:
    """In a folder that ranks share: for when the store has gone, with the process that kept it."""

    def __init__(self, folder: Path, attempt: int):
        self._folder, self._attempt = folder, attempt

    def put(self, name: str, value: Any) -> None:
        replace(self._path(name), json.dumps(value))

    def get(self, name: str) -> Any:
        try:
            return json.loads(self._path(name).read_text())
        except (OSError, ValueError):
            return None

    def claim(self, name: str) -> bool:
        try:
            os.close(os.open(self._path(f"claim-{name}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:
            return True  # better said twice than not at all
        return True

    def _path(self, name: str) -> Path:
        return self._folder / f".{self._attempt}-{name.replace('/', '-')}"


class Alone:
    """For one process."""

    def __init__(self) -> None:
        self._notes: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        self._notes[name] = value

    def get(self, name: str) -> Any:
        return self._notes.get(name)

    def claim(self, name: str) -> bool:
        return self._notes.setdefault(f"claim/{name}", claimed := object()) is claimed


class SafeBoard:
    """The store's board, and the folder's from when the store fails, which `lost` tells. Raises nothing.

    Claims and notes that are not a rank's own are left on both: who keeps the store may be the first to end.
    """

    def __init__(self, store: Board, folder: Board):
        self._store, self._folder = store, folder
        self.lost = False

    def put(self, name: str, value: Any) -> None:
        self._try(lambda board: board.put(name, value), None)
        if not self.lost and not name.startswith("rank/"):
            self._on_folder(lambda board: board.put(name, value), None)

    def get(self, name: str) -> Any:
        return self._try(lambda board: board.get(name), None)

    def claim(self, name: str) -> bool:
        was_lost = self.lost
        mine = self._try(lambda board: board.claim(name), True)
        if mine and not was_lost and not self.lost:
            self._on_folder(lambda board: board.claim(name), True)
        return mine

    def _try(self, act: Callable[[Board], Any], otherwise: Any) -> Any:
        if not self.lost:
            for _ in range(2):
                try:
                    return act(self._store)
                except Exception:  # whatever the network does, a watchdog goes on
                    time.sleep(0.1)
            self.lost = True
        return self._on_folder(act, otherwise)

    def _on_folder(self, act: Callable[[Board], Any], otherwise: Any) -> Any:
        try:
            return act(self._folder)
        except Exception:  # nor does a disk stop it
            return otherwise


def replace(path: Path, text: str) -> None:
    """Writes a small file in one step. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
