"""Any remote file as fsspec sees it, its bytes read by `RangeFile`: what opens files by URL gets our retries.

`datasets` retries above its decompressor, after what a failed read had inflated is lost; here nothing it sees fails.
Imports fsspec, so only those import this module who need it.
"""

import io
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec import AbstractFileSystem

from stablelm.data.storage.options import ReadOptions
from stablelm.data.storage.range_file import RangeFile

PROTOCOL = "ranges"


def address(url: str) -> str:
    """The URL under which `RangeStore` has the file at `url`."""
    return f"{PROTOCOL}://{quote(url, safe='')}"


class RangeStore(AbstractFileSystem):
    """Reads files by their quoted URLs; `options` is the `ReadOptions` to read them with."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, options: ReadOptions | None = None, **settings: Any):
        super().__init__(**settings)
        self._options = options or ReadOptions()
        # datasets hands those of open() to the store.
        self._text = {name: settings[name] for name in ("encoding", "errors", "newline") if name in settings}

    # fsspec names its optional parameters; datasets and fsspec pass them by name.
    def open(self, path: str, mode: str = "rb", **settings: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        text = self._text if "b" not in mode else {}
        return super().open(path, mode, **{**text, **settings})

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        file = RangeFile(unquote(path), self._options)
        return io.BufferedReader(file, buffer_size=file.block)

    def info(self, path: str, **settings: Any) -> dict[str, Any]:
        """Name, size and type. Raises DataError when the store does not report them."""
        path = str(self._strip_protocol(path))
        with RangeFile(unquote(path), self._options) as file:
            return {"name": path, "size": file.stamp().size, "type": "file"}


fsspec.register_implementation(PROTOCOL, RangeStore, clobber=True)
