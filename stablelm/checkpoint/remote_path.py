"""Where checkpoints lie: folders of this machine, or of an object store behind fsspec, with the same few operations.

A store is written to under names that nobody else uses, and never over an existing object where that matters:
`RemotePath.create` is one conditional request. Endpoint and credentials come from fsspec's own configuration
(`~/.config/fsspec`, `FSSPEC_S3_ENDPOINT_URL`, ...) and from the store's usual variables and files.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from stablelm.data.storage.stores import missing_package
from stablelm.errors import ConfigError, DataError, StorageError

CONDITIONAL = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
"""Protocols whose fsspec libraries pass `mode="create"` on to the store as a condition, not as a look before."""
BLOCK = 32 << 20
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DENIED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
# How local disks, network file systems and mounts say that they fail; ENOENT: what was written to has been removed.
FAILING = {
    *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EBUSY, errno.EXDEV, errno.ENOENT, errno.ENOLCK),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENOLINK, errno.ESHUTDOWN, errno.ECONNABORTED, errno.ECONNREFUSED),
}
UNWRITABLE = DENIED | FAILING
MAKE_SPACE = (
    "free space there, lower checkpoint.keep or set checkpoint.dir to another disk; committed checkpoints are kept"
)


class StoreError(OSError, DataError):
    """An object store refused or did not answer: says nothing of what it holds."""

    def __str__(self) -> str:
        return f"{self.filename}: the store failed ({self.strerror}); run again once it answers"


class Size(NamedTuple):
    st_size: int


class RemotePath:
    """A name in an object store, used like a pathlib.Path; all but FileNotFoundError and FileExistsError is StoreError.

    Folders exist while something lies below them, and nothing is remembered between calls.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        # Listings are remembered by default, and what other ranks and attempts write would stay unseen.
        self.fs, self.path = fsspec.url_to_fs(self.url, use_listings_cache=False)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: "RemotePath") -> bool:
        return self.url < other.url

    def __reduce__(self) -> tuple:
        return RemotePath, (self.url,)

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.url.rsplit("/", 1)[0])

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def exists(self) -> bool:
        with _asking(self):
            return self.fs.exists(self.path)

    def is_file(self) -> bool:
        with _asking(self):
            return self.fs.isfile(self.path)

    def is_dir(self) -> bool:
        with _asking(self):
            return self.fs.isdir(self.path)

    def stat(self) -> Size:
        with _asking(self):
            return Size(self.fs.info(self.path)["size"])

    def iterdir(self) -> Iterator["RemotePath"]:
        with _asking(self):
            try:
                names = self.fs.ls(self.path, detail=False)
            except FileNotFoundError:
                names = []
        yield from (self / name for full in sorted(names) if (name := full.rstrip("/").rsplit("/", 1)[-1]) != self.name)

    def files(self) -> set[str]:
        """Names of all objects below, relative to this one."""
        with _asking(self):
            start = len(self.path.rstrip("/")) + 1
            return {full[start:] for full in self.fs.find(self.path)}

    def read_bytes(self) -> bytes:
        with _asking(self):
            return self.fs.cat_file(self.path)

    def create(self, content: bytes) -> None:
        """Makes an object that must not exist: one conditional request. Raises FileExistsError if it does."""
        try:
            with _asking(self, made=True):
                self.fs.pipe_file(self.path, content, mode="create")
        except FileExistsError:
            # A request that was repeated after its answer got lost finds its own object.
            if self.read_bytes() != content:
                raise

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[IO[bytes]]:
        """Reads or writes an object in parts. One that fails while it is written is not made."""
        assert mode in ("rb", "wb")
        with _asking(self, made=mode == "wb"):
            file: Any = self.fs.open(self.path, mode, block_size=BLOCK)
        try:
            yield _Reaching(self, file)  # type: ignore[misc]
        except BaseException:
            with suppress(Exception):  # what failed first is raised
                file.discard()
            raise
        with _asking(self):
            file.close()

    def remove(self) -> None:
        """Deletes all below, with this one last; what does not exist is not an error."""
        with _asking(self):
            try:
                self.fs.rm(self.path, recursive=True)
            except FileNotFoundError:
                return


CheckpointPath = Path | RemotePath


def checkpoint_path(name: "str | CheckpointPath") -> CheckpointPath:
    """The place that a path or URL names. Raises ConfigError for stores that cannot hold checkpoints."""
    if not isinstance(name, str):
        return name
    if "://" not in name or name.startswith("file://"):
        return Path(name.removeprefix("file://"))
    protocol = name.split("://", 1)[0]
    if protocol not in CONDITIONAL:
        raise ConfigError(
            f"checkpoints cannot go to {name}: {protocol} is not known to create objects on condition, which keeps two "
            f"attempts apart; use a local path or one of {', '.join(f'{p}://' for p in ('s3', 'gs', 'az'))}"
        )
    if missing := missing_package(name):
        raise ConfigError(f"checkpoints cannot go to {name}: {missing}")
    return RemotePath(name)


@contextmanager
def writing(place: CheckpointPath) -> Iterator[None]:
    """Turns the OSErrors of full, unwritable or failing storage into a StorageError with `place` and the fix."""
    try:
        yield
    except StoreError as error:
        raise StorageError(
            f"cannot write a checkpoint to {place} ({error.strerror}): check its address, credentials and state, "
            "then run again; committed checkpoints are kept"
        ) from error
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(f"no space for a checkpoint in {place} ({error.strerror})", MAKE_SPACE) from error
        if error.errno in UNWRITABLE:
            fix = "make it a writable directory" if error.errno in DENIED else "look at its file system and run again,"
            raise StorageError(
                f"cannot write a checkpoint to {place} ({error.strerror})",
                f"{fix} or set checkpoint.dir to another directory; committed checkpoints are kept",
            ) from error
        raise


class _Reaching:
    """An open remote file whose failures are StoreErrors."""

    def __init__(self, where: RemotePath, file: Any):
        self._where, self._file = where, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        with _asking(self._where):
            return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        with _asking(self._where):
            return self._file.readinto(buffer)

    def write(self, content: Any) -> int:
        with _asking(self._where):
            return self._file.write(content)


@contextmanager
def _asking(where: RemotePath, *, made: bool = False) -> Iterator[None]:
    """`made`: the object is to be made, so that what is not found is the bucket."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # every library and every store has its own errors
        if isinstance(error, FileNotFoundError) and not made:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(where)) from error
        if isinstance(error, FileExistsError) or _is_condition(error):
            raise FileExistsError(errno.EEXIST, "exists", str(where)) from error
        words = (str(error).splitlines() or [""])[0][:200]
        raise StoreError(errno.EIO, f"{type(error).__name__}: {words}", str(where)) from error


def _is_condition(error: BaseException) -> bool:
    """Whether a store says that a condition did not hold; its libraries word that differently."""
    response = getattr(error.__cause__ or error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    status = getattr(error, "code", None) or getattr(error, "status_code", None)
    return str(code) in ("PreconditionFailed", "412") or str(status) == "412"
