"""How files are named, distinguished and read: what every reader of files needs to know.

`ReadOptions` holds the settings of a run for reading. `Stamp` distinguishes one content of a file from another, and
`SeenFiles` keeps the stamps of a run's attempts in its directory, so that a file that changed between two is found.
"""

import hashlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablelm.errors import ConfigError, DataError, listed
from stablelm.new_files import make_folder, open_to_append, replace_file
from stablelm.small_files import read_small

if TYPE_CHECKING:
    from stablelm.config.schema import DataConfig

# Compressed bytes of one remote request, and what the lanes of a process may hold of them in total.
SMALLEST_BLOCK, LARGEST_BLOCK = 64 << 10, 1 << 20
READ_AHEAD = 48 << 20
LONGEST_DOCUMENT = 64 << 20
# Seconds in which a store must answer before the run has begun with it, and for all that is looked at of one file.
FIRST_ANSWER, LONGEST_LOOK = 7.0, 12.0
# Names under which one store is known.
FAMILIES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "https": "http"}
HUB = "hf://datasets/"
PINNED_FILE = re.compile(re.escape(HUB) + r"([^@]+)@([0-9a-f]{40})/(.+)")
"""(data set, commit, path) of a file on the hub whose content never changes."""
SEEN_FOLDER = "data_seen"
# Bytes at each end of a local file that are hashed: a time of change does not outlive a copy.
ENDS = 64 << 10


def base_name(url: str) -> str:
    """Last part of a path or URL without its query: what names a file wherever it is stored."""
    path = url.split("?", 1)[0] if "://" in url else url
    return path.rstrip("/").rsplit("/", 1)[-1]


def local_path(url: str) -> str | None:
    """The path of a local file, None for any other store."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url or "::" in url else url


@dataclass(frozen=True)
class Stamp:
    """What distinguishes one content of a file from another: bytes, and ETag or time of change ('' for none)."""

    size: int
    tag: str


def changed(url: str, old: Stamp, new: Stamp) -> DataError:
    """What is raised for a file that is not the one that was opened first."""
    how = f"from {old.size} to {new.size} bytes" if old.size != new.size else f"from {old.tag} to {new.tag}"
    return DataError(f"{url}: changed {how} while it was read; put the old file back, or start a new run")


FORGOTTEN = Stamp(-1, "")


@dataclass(frozen=True)
class SeenFiles:
    """`known`: what earlier attempts saw at each URL. Each process adds what it opens to a file of its own."""

    folder: str
    known: Mapping[str, Stamp] = field(repr=False)

    @classmethod
    def of(cls, run_dir: str | Path) -> "SeenFiles":
        folder = Path(run_dir) / SEEN_FOLDER
        return cls(str(folder), dict(_entries(folder)))

    def confirm(self, url: str, stamp: Stamp) -> None:
        """Notes a file that this process opens for the first time. Raises DataError if it is not what it was."""
        path = local_path(url)
        now = stamp if path is None else Stamp(stamp.size, _hash(path, stamp.size))
        before = self.known.get(url)
        if before is None:
            self._note(url, now)
        elif before != now:
            how = f"from {before.size} to {now.size} bytes" if before.size != now.size else "in its content"
            how = how if path is not None or before.size != now.size else f"from {before.tag} to {now.tag}"
            raise DataError(
                f"{url}: changed {how} since an earlier attempt of this run read it; put the old file back, or start a "
                f"new run (if its text is the same, delete {self.folder} and run again)"
            )

    def forget(self, url: str) -> None:
        """For a file that proved damaged: an intact copy may take its place."""
        self._note(url, FORGOTTEN)

    def _note(self, url: str, stamp: Stamp) -> None:
        own = Path(self.folder) / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        line = json.dumps({"file": url, "size": stamp.size, "tag": stamp.tag}) + "\n"
        with suppress(OSError):  # a directory that cannot be written is reported where it matters
            make_folder(own.parent)
            with open_to_append(own) as file:
                file.write(line.encode())


def gather_seen(run_dir: Path) -> None:
    """Puts what earlier attempts noted into one file. Raises OSError; for one process, before others begin."""
    folder = run_dir / SEEN_FOLDER
    pieces = _pieces(folder)
    if len(pieces) < 2:
        return
    lines = [json.dumps({"file": url, "size": stamp.size, "tag": stamp.tag}) + "\n" for url, stamp in _entries(folder)]
    replace_file(folder / "known.jsonl", "".join(lines).encode())
    for piece in pieces:
        if piece.name != "known.jsonl":
            piece.unlink(missing_ok=True)


def _pieces(folder: Path) -> list[Path]:
    # The one that is the oldest first.
    return sorted(folder.glob("*.jsonl"), key=lambda path: (path.name != "known.jsonl", path.name))


def _entries(folder: Path) -> Iterator[tuple[str, Stamp]]:
    """(URL, stamp) of every file, as it was seen first; lines that were cut off are passed."""
    found: dict[str, Stamp] = {}
    forgotten = set()
    for piece in _pieces(folder):
        with suppress(OSError):
            for line in read_small(piece).decode(errors="replace").splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    url, stamp = str(entry["file"]), Stamp(int(entry["size"]), str(entry["tag"]))
                    found.setdefault(url, stamp)
                    if stamp == FORGOTTEN:
                        forgotten.add(url)
    return ((url, stamp) for url, stamp in found.items() if url not in forgotten)


def _hash(path: str, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(ENDS))
        file.seek(max(size - ENDS, 0))
        digest.update(file.read(ENDS))
    return f"sha256 {digest.hexdigest()}"


@dataclass(frozen=True)
class ReadOptions:
    """`storage`: 'scheme.option' -> value for fsspec. `cache`: folder of indexes and whole files, None for neither.

    `retry_budget`: seconds that one read may be retried. `block`: compressed bytes of one remote request.
    `until`: the time of time.monotonic() at which a look at a file ends, None for readers that go on.
    `first_answer`: seconds for a request, and for retries of one without an answer; None where the store has answered.
    `max_document_bytes`: of a line, of a document and of blank lines in a row.
    `filter`, `map`: import paths of the user's functions over rows. `bad_rows`: 'stop' or 'skip' at a `BadRow`.
    `text_unit`: whether a plain text file is one document ('file'), or each of its lines is ('line').
    `seen`: what earlier attempts of the run read, None outside of a run.
    `stamps` fills with the files seen, so that one that changes in the middle of a run is noticed.
    """

    retry_budget: float = 600.0
    first_answer: float | None = None
    until: float | None = None
    max_document_bytes: int = LONGEST_DOCUMENT
    text_column: str = "text"
    storage: Mapping[str, Any] = field(default_factory=dict)
    cache: str | None = None
    cache_bytes: int = 0
    block: int = LARGEST_BLOCK
    filter: str | None = None
    map: str | None = None
    bad_rows: str = "stop"
    text_unit: str = "file"
    seen: SeenFiles | None = None
    stamps: dict[str, Stamp] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, data: "DataConfig", lanes: int = 1) -> "ReadOptions":
        """Options of a configuration, for a process that reads so many lanes."""
        # Fields and keys of one name mean the same.
        own = {field.name: getattr(data, field.name) for field in fields(cls) if hasattr(data, field.name)}
        return cls(**own, block=min(max(READ_AHEAD // lanes, SMALLEST_BLOCK), LARGEST_BLOCK))

    def first_look(self) -> "ReadOptions":
        """For files that no attempt of the run has read yet: a mistyped address is not an outage to wait for."""
        return replace(self, first_answer=FIRST_ANSWER, block=SMALLEST_BLOCK, cache_bytes=0)

    def for_a_while(self) -> "ReadOptions":
        """For a look at one file, which ends with DataError after LONGEST_LOOK."""
        return replace(self, until=time.monotonic() + LONGEST_LOOK)

    def settings(self, scheme: str) -> dict[str, Any]:
        """fsspec options of a store; 'a.b' below a scheme is b inside a."""
        family, found = FAMILIES.get(scheme, scheme), {}
        for name, value in self.storage.items():
            first, *inner = name.split(".")
            if FAMILIES.get(first, first) != family or not inner:
                continue
            branch = found
            for part in inner[:-1]:
                branch = branch.setdefault(part, {})
            branch[inner[-1]] = value
        return found


def braces(text: str) -> list[str]:
    """Shell brace expansion: {a,b} gives each word, {007..011} each number, padded like the first."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        return [text]
    first, last, words = match.groups()
    if words is not None:
        choices = words.split(",")
    else:
        step = 1 if int(first) <= int(last) else -1
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + step, step)]
    before, after = text[: match.start()], braces(text[match.end() :])
    return [before + choice + rest for choice, rest in itertools.product(choices, after)]


def files_alone(paths: list[str], key: str, where: str) -> list[str]:
    """These paths, sorted. Raises ConfigError naming all that are not files: their text would be missing."""
    wrong = []
    for path in sorted(paths):
        if os.path.islink(path) and not os.path.exists(path):
            wrong.append(f"{path!r} (a link to {os.readlink(path)!r}, which does not exist)")
        elif not os.path.isfile(path):
            wrong.append(f"{path!r} ({'a folder' if os.path.isdir(path) else 'not a regular file'})")
    if wrong:
        raise ConfigError(
            f"{key}: {where} what is not a file: {listed(wrong, show=str)}; restore or remove it, or list "
            "only the files"
        )
    return sorted(paths)
