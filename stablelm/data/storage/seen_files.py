"""What the attempts of a run have read, kept in its directory, so that a file that changed between two is found."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from stablelm.data.storage.options import Stamp
from stablelm.data.storage.stores import local_path
from stablelm.errors import DataError
from stablelm.new_files import make_folder, open_to_append, replace_file
from stablelm.small_files import read_small

FOLDER = "data_seen"
# Bytes at each end of a local file that are hashed: a time of change does not outlive a copy.
ENDS = 64 << 10
FORGOTTEN = Stamp(-1, "")


@dataclass(frozen=True)
class SeenFiles:
    """`known`: what earlier attempts saw at each URL. Each process adds what it opens to a file of its own."""

    folder: str
    known: Mapping[str, Stamp] = field(repr=False)

    @classmethod
    def of(cls, run_dir: str | Path) -> "SeenFiles":
        folder = Path(run_dir) / FOLDER
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
                f"new run (where the text is the same all the same, delete {self.folder} and run again)"
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


def gather(run_dir: Path) -> None:
    """Puts what earlier attempts noted into one file. Raises OSError; for one process, before others begin."""
    folder = run_dir / FOLDER
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
