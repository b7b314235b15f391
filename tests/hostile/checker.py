"""Runs a program on an input that may do harm, and says in sentences what it did that it must not.

What must hold: it ends in time, with an exit code of the table and no traceback, within bounded memory, and changes
nothing outside the folders that it was told to write to. A program is killed as soon as it breaks a bound.
"""

import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from support.forked import OUTPUTS, server, start_forked
from support.programs import LAUNCH, environment

SECONDS = 10.0
MEMORY = 2 << 30  # bytes, peak of the program and of the processes it starts, each
CODES = frozenset({0, 74, 75, 76, 77, 78, 79, 80})
LOOKS = 0.02  # seconds between two looks at a running program
HASHED = 64 << 20  # bytes up to which a file's content is compared, beside its size and times
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `code` is negative for a signal, None where a bound was broken and it was killed.

    `peak_bytes`: largest resident size of any of its processes. `changed`: paths that must not have changed, each with
    what became of it.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    peak_bytes: int
    changed: tuple[str, ...]

    def faults(self, codes: Collection[int] = CODES) -> list[str]:
        """What it did that it must not, a sentence each; empty: it behaved. `codes`: the exit codes that are right."""
        told = self.out + self.err
        found = [f"changed what is not its own: {change}" for change in self.changed]
        if self.code is None:
            found.append(f"killed after {self.seconds:.1f} s at {self.peak_bytes >> 20} MiB")
        elif self.code not in codes:
            found.append(f"exit code {self.code}, not one of {sorted(codes)}")
        if "Traceback (most recent call last)" in told:
            found.append("a traceback")
        if (hidden := CONTROL.search(told)) is not None:
            found.append(f"control character {hidden.group()!r} in its output")
        if self.code not in (0, None) and not self.err.strip():
            found.append("no word of why it failed")
        return [*found, f"it said: {told[-2000:]!r}"] if found else []


def attempt(
    program: str,
    *arguments: str,
    watched: Path,
    own: Collection[Path] = (),
    cwd: Path | None = None,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    fresh: bool = False,
    **extra: str,
) -> Outcome:
    """Runs `launch/<program>.py` (or a path of a script) with `arguments`; `extra` are environment variables.

    `watched` is the tree that is compared before and after, all but the paths in `own`, which the program may write.
    It runs in a process forked with the imports loaded, or with `fresh` as a program of its own.
    """
    script = program if program.endswith(".py") else str(LAUNCH / f"{program}.py")
    before = tree(watched, own)
    _warm()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        started = time.monotonic()
        process = _start(script, list(arguments), environment(**extra), output, cwd or watched, fresh)
        code, peak = _watch(process, started + seconds, memory)
        took = time.monotonic() - started
        out, err = ((output / name).read_text(errors="replace") for name in OUTPUTS)
    return Outcome(code, out, err, took, peak, tuple(differences(before, tree(watched, own))))


def tree(root: Path, without: Collection[Path] = ()) -> dict[str, tuple[Any, ...]]:
    """What stands below `root` by relative path: kind, permissions, and size, time and content, or where a link leads.

    Nothing is opened but regular files, and no link is followed. Paths in `without` and what is below are left out.
    """
    left_out = {os.path.abspath(path) for path in without}
    return {os.path.relpath(path, root): _entry(path) for path in _walk(str(root), left_out)}


def differences(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> list[str]:
    """Each path that was made, removed or changed, with the word for it."""
    words = [f"{path} was removed" for path in before.keys() - after.keys()]
    words += [f"{path} was made" for path in after.keys() - before.keys()]
    words += [f"{path} was changed" for path in before.keys() & after.keys() if before[path] != after[path]]
    return sorted(words)


def _walk(folder: str, left_out: set[str]) -> Iterator[str]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if os.path.abspath(entry.path) in left_out:
            continue
        yield entry.path
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, left_out)


def _entry(path: str) -> tuple[Any, ...]:
    status = os.lstat(path)
    kind, mode = stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return kind, os.readlink(path)
    if not stat.S_ISREG(status.st_mode):
        return kind, mode  # a folder's times change with what its owner may write in it
    with_content = status.st_size <= HASHED and mode & stat.S_IRUSR
    content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if with_content else ""
    return kind, mode, status.st_size, status.st_mtime_ns, content


@cache
def _warm() -> None:
    """Starts the server of processes, whose imports are not the program's time."""
    first = server().Process(target=os.getpid)
    first.start()
    first.join()


class _Fresh:
    """A started program with the few names of a multiprocessing.Process that `_watch` uses."""

    def __init__(self, line: list[str], environ: dict[str, str], output: Path, cwd: Path):
        files = [(output / name).open("ab") for name in OUTPUTS]
        self._process = subprocess.Popen(
            line, env=environ, cwd=cwd, stdin=subprocess.DEVNULL, stdout=files[0], stderr=files[1],
            start_new_session=True,
        )  # fmt: skip
        for file in files:
            file.close()
        self.pid = self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def join(self) -> None:
        self._process.wait()


def _start(script: str, arguments: list[str], environ: dict[str, str], output: Path, cwd: Path, fresh: bool) -> Any:
    if not fresh:
        return start_forked(script, arguments, environ, output=output, cwd=cwd)
    return _Fresh([sys.executable, script, *arguments], environ, output, cwd)


def _watch(process: Any, deadline: float, memory: int) -> tuple[int | None, int]:
    """Exit code and peak memory; no process of the program is left behind."""
    peak = 0
    while process.exitcode is None:
        family = _family(process.pid)
        peak = max([peak, *(_peak(pid) for pid in family)])
        if time.monotonic() > deadline or peak > memory:
            for pid in family:
                _kill(pid)
            process.join()
            return None, peak
        time.sleep(LOOKS)
    return process.exitcode, peak


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            tasks = os.listdir(f"/proc/{parent}/task")
            children = [Path(f"/proc/{parent}/task/{task}/children").read_text().split() for task in tasks]
        except OSError:
            continue  # it has ended
        found += [int(child) for of_task in children for child in of_task]
    return found


def _peak(pid: int) -> int:
    """Peak resident size in bytes; 0 where the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    held = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(held[1]) << 10 if held else 0


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return
