"""Disks that fail and kernels that kill at a point of a save; nothing of the program is replaced for it."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
"""Exit codes of a process that `kill_at` ended."""


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Files of this process that grow beyond `size` bytes meet 'File too large', as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse_files(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Files whose names end with `name` cannot be made."""
    opened = Path.open

    def opening(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if self.name.endswith(name) and "r" not in mode:
            raise OSError(code, os.strerror(code), str(self))
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", opening)


def watch(act: Callable[[str, str, str | None], None]) -> None:
    """Calls `act` with event, path and mode before this process opens, renames or makes something, to its end."""

    def heard(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir") and isinstance(arguments[0], str | os.PathLike):
            act(event, str(arguments[0]), arguments[1] if event == "open" else None)

    sys.addaudithook(heard)


def kill_at(stage: str) -> None:
    """Has this process killed when a save reaches a stage, one of STAGES. Call it on the main thread."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    wanted, name, left = STAGES[stage]
    renamed: list[str] = []

    def act(event: str, path: str, mode: str | None) -> None:
        reading = event == "open" and mode is not None and "r" in mode
        if stage == "after the rename" and renamed:
            die()
        if event != wanted or reading or not path.endswith(name):
            return
        if stage == "after the rename":
            renamed.append(path)
        elif left:
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, left))  # the kernel kills who writes more
        else:
            die()

    watch(act)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


HALVES = {"index.json": 100, "state.json": 20, "manifest.json": 100, "COMMITTED": 20}
STAGES: dict[str, tuple[str, str, int]] = {
    "staging made": ("os.mkdir", "/tensors", 0),
    "tensors half written": ("open", ".safetensors", 1000),
    "tensors written": ("open", "/tensors", 0),
    **{f"half of {name}": ("open", f"/{name}", size) for name, size in HALVES.items()},
    **{f"before {name}": ("open", f"/{name}", 0) for name in (*list(HALVES)[1:], "config.yaml")},
    "before the rename": ("os.rename", "", 0),
    "after the rename": ("os.rename", "", 0),
}
"""What a save is about to do, the end of the path, and how many bytes it still gets to write there."""
