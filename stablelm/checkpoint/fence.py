"""Of all attempts of one run only the newest commits: tokens that grow, and the sweep that disarms the older attempts.

An attempt that starts does, in this order,
    n1  create `fence/<token>`, one more than any before, on the condition that it does not exist;
    n2  disarm what attempts with smaller tokens have staged: in a folder, rename each staging directory away; in an
        object store, create an empty COMMITTED in each prefix that has none, on the condition that it does not exist;
    n3  look for the newest checkpoint and resume from it.
and to commit a step it does
    c1  make the staging directory (or the first object under a prefix), which carries its token;
    c2  after everything is written, end with an error if a greater token exists;
    c3  commit by one operation: rename the staging directory to the step's name, which must be free, or create
        COMMITTED in the prefix on the condition that it does not exist.

No older attempt O commits after n3 of a newer attempt N, however long O stalls between c2 and c3. Suppose it did. At c2
O saw no greater token, so c1 < c2 < n1 < n2: what O had staged was there for N's sweep. O's c3 and N's disarming are
both single operations of which the store lets one win: the rename of one directory, or the creation of one object. If
N's won, c3 failed. If O's won, c3 < n2 < n3: it came before N looked, and N went on from it or a later one. Either way
nothing is committed behind N's back. The proof needs a store in which a listing shows what was made before it began:
local disks, cluster file systems and today's object stores do; NFS does with `lookupcache=none` or `noac`.
"""

import errno
import json
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stablelm.checkpoint.manifest import COMMITTED, attempt_of, step_of
from stablelm.checkpoint.remote_path import CheckpointPath, RemotePath, writing
from stablelm.errors import CheckpointError, ConfigError, StorageError
from stablelm.json_text import parse
from stablelm.new_files import make_folder, sync_directory, write_durably
from stablelm.small_files import read_small

FENCE = "fence"
STAGING = ".staging-"
DELETING = ".deleting-"
_TOKEN = re.compile(r"[0-9]{8,18}")


@dataclass(frozen=True)
class Fence:
    """An attempt's right to commit below `root`, until a greater token exists."""

    root: CheckpointPath
    token: int
    attempt: str
    taken: bool = False
    """Whether the token has a file below `root`, as after `take`."""

    def check(self) -> None:
        """Raises CheckpointError if a newer attempt has taken over, StorageError if `root` has been removed."""
        tokens = _tokens(self.root)
        newest = max(tokens, default=self.token)
        if self.taken and self.token not in tokens and newest <= self.token:
            raise StorageError(
                f"{self.root} has been removed while the run was writing to it: this attempt commits nothing more and "
                "ends; restore it to resume, or start a new run"
            )
        if newest > self.token:
            holder = read_token(self.root, newest)
            raise CheckpointError(
                f"attempt {holder.get('attempt', '?')} on {holder.get('host', '?')} has taken over {self.root} since "
                f"{holder.get('time', '?')[:19]} (fencing token {newest}; this attempt holds {self.token}): this one "
                "commits nothing more and ends"
            )


def take(root: CheckpointPath, attempt: str) -> Fence:
    """Takes the next token and disarms older attempts; call it on rank 0, before looking for a checkpoint.

    Raises StorageError if the place cannot be written, ConfigError if the store overwrites what it must not.
    """
    with writing(root):
        fence = Fence(root, _next_token(root, attempt), attempt, taken=True)
        sweep(root, fence.token)
    return fence


def sweep(root: CheckpointPath, token: int) -> list[CheckpointPath]:
    """Disarms and deletes what attempts with smaller tokens staged, and deletions cut short; returns what went."""
    if isinstance(root, RemotePath):
        return [prefix for prefix in _prefixes(root) if attempt_of(prefix) < token and _disarm(prefix)]
    removed: list[CheckpointPath] = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        doomed = path
        if path.name.startswith(STAGING) and attempt_of(path) < token:
            doomed = path.with_name(f"{DELETING}{path.name[1:]}-{uuid.uuid4().hex}")
            try:
                path.rename(doomed)
            except FileNotFoundError:
                continue  # committed, or given up, just now
        elif not path.name.startswith(DELETING):
            continue
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(path)
    return removed


def read_token(root: CheckpointPath, token: int) -> dict[str, str]:
    """Who took a token, and when; empty if that cannot be read."""
    try:
        return dict(parse(read_small(root / FENCE / f"{token:08d}"), dict[str, str]))
    except (OSError, ValueError):
        return {}


def _tokens(root: CheckpointPath) -> list[int]:
    folder = root / FENCE
    try:
        return [int(path.name) for path in folder.iterdir() if _TOKEN.fullmatch(path.name)] if folder.is_dir() else []
    except FileNotFoundError:  # removed just now
        return []


def _next_token(root: CheckpointPath, attempt: str) -> int:
    fields = {"attempt": attempt, "host": socket.gethostname(), "time": datetime.now(UTC).isoformat()}
    content = json.dumps({**fields, "id": uuid.uuid4().hex}).encode()
    folder = root / FENCE
    if isinstance(folder, Path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_folder(folder)
        sync_directory(folder.parent)
    while True:
        token = max(_tokens(root), default=0) + 1
        try:
            _create(folder / f"{token:08d}", content)
        except FileExistsError:
            continue  # another attempt starts at this moment
        return token


def _create(path: CheckpointPath, content: bytes) -> None:
    if isinstance(path, Path):
        write_durably(path, content)
        sync_directory(path.parent)
        return
    path.create(content)
    try:
        path.create(b"")
    except FileExistsError:
        return
    raise ConfigError(
        f"checkpoint.dir={path.parent.parent} is in a store that overwrites objects although asked not to, so that "
        "two attempts could destroy each other's checkpoints; use a store with conditional writes (If-None-Match)"
    )


def _prefixes(root: RemotePath) -> list[RemotePath]:
    return [prefix for step in root.iterdir() if step_of(step) is not None for prefix in step.iterdir()]


def _disarm(prefix: RemotePath) -> bool:
    """Whether the prefix is no checkpoint and can become none; deletes all but the object that says so."""
    try:
        (prefix / COMMITTED).create(b"")
    except FileExistsError:
        return False
    for name in prefix.files() - {COMMITTED}:
        (prefix / name).remove()
    return True


@contextmanager
def writing_behind(fence: Fence) -> Iterator[None]:
    """As `writing`; what fails because a newer attempt swept it away is that attempt's CheckpointError."""
    with writing(fence.root):
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EEXIST):
                fence.check()
            raise
