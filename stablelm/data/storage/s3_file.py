"""Files of S3, read by ranges that are checked: s3fs takes whatever bytes come for those that were asked for.

Nothing is retried here but what s3fs retries by itself. Imports s3fs's event loop, so only those import it who need it.
"""

import asyncio
from typing import Any

from fsspec.asyn import sync

from stablelm.data.storage import stores
from stablelm.data.storage.options import ReadOptions, Stamp
from stablelm.data.storage.ranges import Range

HEADERS = {"Content-Range": "ContentRange", "Content-Length": "ContentLength", "Content-Encoding": "ContentEncoding"}


def open_s3(url: str, options: ReadOptions) -> tuple["S3File", Stamp]:
    """The file at an s3 URL and its stamp, which is asked for at each opening."""
    store, path = stores.filesystem(url, options)
    file = S3File(store, url, path, options.first_answer)
    return file, file.stamp


class S3File:
    """An open file that can seek, as RangeFile reads it. `seconds` bounds each request, None: only its silence."""

    def __init__(self, store: Any, url: str, path: str, seconds: float | None):
        self._store, self._url, self._seconds = store, url, seconds
        self._bucket, self._key, self._version = store.split_path(path)
        self._offset = 0
        info = self._run(store._info, path)
        if info.get("type") == "directory":
            raise FileNotFoundError(path)
        self.stamp = Stamp(int(info["size"]), stores.tag(info))
        self._condition = {"IfMatch": info["ETag"]} if info.get("ETag") else {}

    def seek(self, offset: int) -> None:
        self._offset = offset

    def read(self, size: int) -> bytes:
        """`size` bytes from the current offset, which must lie in the file."""
        data = self._run(self._range, Range(self._url, self._offset, self._offset + size, self.stamp))
        self._offset += len(data)
        return data

    def close(self) -> None:
        """Connections belong to the process."""

    def _run(self, method: Any, *arguments: Any) -> Any:
        return sync(self._store.loop, self._within, method, *arguments)

    async def _within(self, method: Any, *arguments: Any) -> Any:
        try:
            return await asyncio.wait_for(method(*arguments), self._seconds)
        except TimeoutError:
            raise ConnectionError(f"no answer for {self._seconds or stores.STALL_SECONDS:g} s") from None

    async def _range(self, wanted: Range) -> bytes:
        version = {"VersionId": self._version} if self._version else {}
        answer = await self._store._call_s3(
            "get_object", Bucket=self._bucket, Key=self._key, Range=wanted.header, **self._condition, **version
        )
        body = answer["Body"]
        try:
            told = {name: str(answer[ours]) for name, ours in HEADERS.items() if answer.get(ours) is not None}
            wanted.check(answer["ResponseMetadata"]["HTTPStatusCode"], told)
            wanted.check_tag(stores.tag(answer))
            return await wanted.body(body.read, ends="Content-Length" in told)
        finally:
            body.close()
