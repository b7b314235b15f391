"""A folder that files are put into whole, on this machine or in any store that fsspec can write."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from stablelm.data.formats.text_lines import local_path
from stablelm.errors import ConfigError, StorageError

T = TypeVar("T")
READ_ONLY = ("http://", "https://")


@dataclass(frozen=True)
class Output:
    """Folder or URL. What is put appears under its name complete or not at all."""

    where: str

    @property
    def folder(self) -> Path | None:
        path = local_path(self.where)
        return None if path is None else Path(path).expanduser()

    def url(self, name: str) -> str:
        """Path or URL of a file in it."""
        return str(self.folder / name) if self.folder is not None else f"{self.where.rstrip('/')}/{name}"

    def create(self, key: str) -> None:
        """Makes the folder. Raises ConfigError under `key` when that cannot be, or nothing can be written there."""
        if self.where.startswith(READ_ONLY):
            raise ConfigError(
                f"{key}: nothing can be written to {self.where!r}; give a folder, or s3://, gs:// or az://"
            )
        try:
            if self.folder is None:
                self._store()
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
        except OSError as error:
            mend = "give a folder that can be written"
            raise ConfigError(f"{key}: cannot write to {self.where!r} ({error.strerror}); {mend}") from None
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{key}: {self.where!r} cannot be opened ({error}); install what it needs") from None

    def put(self, name: str, write: Callable[[IO[bytes]], T]) -> T:
        """A file of what `write` writes. Raises StorageError when the place is full or fails."""
        try:
            return self._put_local(self.folder, name, write) if self.folder is not None else self._put(name, write)
        except OSError as error:
            words = error.strerror or str(error)
            raise StorageError(
                f"{self.url(name)}: cannot be written ({words}); make room or give another --out, and run again: "
                "finished files are kept"
            ) from error

    def remove(self, name: str) -> None:
        """Deletes a file that may not be there. Raises StorageError."""
        try:
            if self.folder is not None:
                (self.folder / name).unlink(missing_ok=True)
                return
            filesystem, path = self._store()
            if filesystem.exists(f"{path}/{name}"):
                filesystem.rm_file(f"{path}/{name}")
        except Exception as error:  # every store's library has its own errors
            raise StorageError(f"{self.url(name)}: cannot be deleted ({error}); run again") from error

    def sweep(self, names: list[str]) -> None:
        """Deletes what killed runs left half written of these files; no other run may be writing them."""
        if self.folder is None:
            return
        wanted = set(names)
        for path in self.folder.glob(".*.partial-*"):
            if path.name[1:].partition(".partial-")[0] in wanted:
                path.unlink(missing_ok=True)

    def _put_local(self, folder: Path, name: str, write: Callable[[IO[bytes]], T]) -> T:
        staging = None
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.partial-", delete=False) as file:
                staging = Path(file.name)
                result = write(file)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            staging.chmod(0o644)
            os.replace(staging, folder / name)
            return result
        except BaseException:
            if staging is not None:
                staging.unlink(missing_ok=True)
            raise

    def _put(self, name: str, write: Callable[[IO[bytes]], T]) -> T:
        with tempfile.NamedTemporaryFile(prefix=f"{name}-") as file:
            result = write(file)  # type: ignore[arg-type]
            file.flush()
            try:
                filesystem, path = self._store()
                filesystem.put_file(file.name, f"{path}/{name}")
            except OSError:
                raise
            except Exception as error:  # every store's library has its own errors
                raise OSError(f"{type(error).__name__}: {error}") from error
        return result

    def _store(self) -> tuple[Any, str]:
        import fsspec

        filesystem, path = fsspec.url_to_fs(self.where, use_listings_cache=False)
        return filesystem, path.rstrip("/")
