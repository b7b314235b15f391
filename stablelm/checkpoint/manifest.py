"""What makes a directory a checkpoint: the manifest of its files and the COMMITTED mark over the manifest.

step-00001200/
    tensors/        safetensors files of the pieces of tensors, and their index.json
    state.json      everything of the run that is not a tensor; knows no rank and no world size
    config.yaml     the configuration as it was asked for; state.json has what its derived keys became
    manifest.json   every file above: size and sha256
    COMMITTED       sha256 of manifest.json, step, attempt and its fencing token, time, and a sha256 over these

In an object store, which renames nothing, the same files lie in `step-00001200/<token>-<random>/`. A prefix without
COMMITTED is unfinished; one whose COMMITTED is empty belongs to an attempt that was cut off and never will be finished.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from pydantic import ConfigDict
from typing_extensions import TypedDict

from stablelm.checkpoint.remote_path import CheckpointPath, RemotePath, StoreError
from stablelm.json_text import Count, parse_into
from stablelm.new_files import write_durably
from stablelm.small_files import read_small

TENSORS = "tensors"
STATE = "state.json"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
COMMITTED_BYTES = 64 << 10
_STEP_NAME = re.compile(r"step-(\d{8,})")
_ATTEMPT = re.compile(r"(?:\.staging-)?(\d{8,})-.+")


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of one file: its size in bytes and the sha256 of its content in hex."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    size: Count
    sha256: str


def record_of(content: bytes) -> FileRecord:
    """The record of a file that holds `content`."""
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def record_of_file(path: CheckpointPath) -> FileRecord:
    """Reads the whole file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb") as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def write_new(path: CheckpointPath, content: bytes) -> FileRecord:
    """Writes a small new file that is there for good once this returns. Raises OSError."""
    if isinstance(path, Path):
        write_durably(path, content)
    else:
        path.create(content)
    return record_of(content)


@dataclass(frozen=True)
class Commit:
    """Content of COMMITTED; `time` is UTC in ISO 8601, `token` the fencing token of the attempt that wrote it."""

    step: Count
    attempt: str
    token: Count
    time: str
    manifest_sha256: str


class Manifest(TypedDict):
    """Content of manifest.json; names are relative to the step directory."""

    files: dict[str, FileRecord]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: CheckpointPath) -> int | None:
    """The step that the name of a checkpoint's directory states; None for any other name."""
    match = _STEP_NAME.fullmatch(path.name)
    if match is None and isinstance(path, RemotePath) and _ATTEMPT.fullmatch(path.name):
        match = _STEP_NAME.fullmatch(path.parent.name)
    return int(match[1]) if match else None


def attempt_of(path: CheckpointPath) -> int:
    """The fencing token in the name of a staging directory or prefix; 0 where there is none."""
    match = _ATTEMPT.fullmatch(path.name)
    return int(match[1]) if match else 0


def manifest_content(records: dict[str, FileRecord]) -> bytes:
    """Canonical bytes of manifest.json for records by path relative to the step directory."""
    return _canonical({"files": {name: asdict(record) for name, record in records.items()}})


def commit_content(commit: Commit) -> bytes:
    """Canonical bytes of COMMITTED, sealed with a hash of its own fields."""
    fields = asdict(commit)
    return _canonical({**fields, "sha256": hashlib.sha256(_canonical(fields)).hexdigest()})


def read_commit(path: CheckpointPath) -> Commit:
    """COMMITTED of a checkpoint. Raises OSError if unreadable, ValueError if it is not as it was written."""
    content = read_small(path / COMMITTED, COMMITTED_BYTES)
    try:
        commit = parse_into(content, Commit)
    except ValueError as error:
        raise ValueError(f"{COMMITTED} is not readable ({error})") from error
    if commit_content(commit) != content:
        raise ValueError(f"{COMMITTED} was changed after it was written")
    return commit


def read_manifest(path: CheckpointPath, commit: Commit) -> dict[str, FileRecord]:
    """manifest.json of a checkpoint. Raises OSError if unreadable, ValueError if it is not the committed one."""
    content = read_small(path / MANIFEST)
    if record_of(content).sha256 != commit.manifest_sha256:
        raise ValueError(f"{MANIFEST} is not the one that was committed")
    try:
        files = parse_into(content, Manifest)["files"]
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is not readable ({error})") from error
    for name in files:
        if not name or PurePosixPath(name).is_absolute() or {"", ".", ".."} & set(name.split("/")) or "\0" in name:
            raise ValueError(f"{MANIFEST} names {name!r:.100}, which is not a file of the checkpoint")
    return files


def verify(path: CheckpointPath, *, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint, one phrase a problem; empty: it is whole.

    With hashes every file is read; without, names and sizes are compared, which misses changed bytes. `share` (r, W):
    reads only the files r, r + W, ... in order of name, so that W ranks together read each once. Raises StoreError if
    an object store does not answer, which says nothing of the checkpoint.
    """
    try:
        commit = read_commit(path)
        records = read_manifest(path, commit)
    except StoreError:
        raise
    except FileNotFoundError as error:
        return [f"{str(error.filename).rsplit('/', 1)[-1]} is missing"]
    except OSError as error:
        return [f"{error.filename} cannot be read ({error.strerror})"]
    except ValueError as error:
        return [str(error)]
    named = step_of(path)
    problems = [] if named in (None, commit.step) else [f"it holds step {commit.step}, not the step of its name"]
    present = files_below(path) - {MANIFEST, COMMITTED}
    problems += [f"{name} is not in the manifest" for name in sorted(present - set(records))]
    mine = sorted(records.items())[share[0] :: share[1]]
    # sha256 lets other threads run while it works, so files are read side by side.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda item: _problem(path / item[0], item[1], hashes), mine)
        problems += [f"{name} {problem}" for (name, _), problem in zip(mine, found, strict=True) if problem]
    return problems


def files_below(path: CheckpointPath) -> set[str]:
    """Names of all that is not a directory below `path`, relative to it, with forward slashes."""
    if isinstance(path, RemotePath):
        return path.files()
    return {(Path(folder) / name).relative_to(path).as_posix() for folder, _, names in os.walk(path) for name in names}


def _problem(path: CheckpointPath, record: FileRecord, hashes: bool) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != record.size:
            return f"has {size} bytes instead of {record.size}"
        if hashes and record_of_file(path) != record:
            return "was changed after it was written (its sha256 differs)"
    except StoreError:
        raise
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _canonical(value: dict) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()
