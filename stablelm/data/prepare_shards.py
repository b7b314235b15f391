"""The work of stablelm prepare: every source file becomes one shard, in as many processes as wanted.

What is written depends on the text, the tokenizer and the filters alone. A shard appears whole or not at
all, masks come when all shards are there, and the manifest comes last: it marks the folder as complete.

The pool is concurrent.futures'. Ending its workers at once is our own: `terminate_workers` came with Python 3.14, and
workers outlive a parent that is killed.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from typing import IO, Any, TypeVar

import numpy as np

from stablelm.data.formats.file_rows import texts
from stablelm.data.formats.tables import stored_at
from stablelm.data.formats.text_lines import BadRow
from stablelm.data.shards import row_filters, shard_format
from stablelm.data.shards.row_filters import RowFeatures, RowFilters
from stablelm.data.shards.shard_files import MANIFEST
from stablelm.data.shards.shard_format import MASK, SUFFIX, OutputFolder, ShardFooter
from stablelm.data.shards.shard_reader import TokenShard
from stablelm.data.storage.options import ReadOptions, base_name, local_path
from stablelm.data.storage.range_file import RangeFile
from stablelm.errors import DataError, ProcessLostError
from stablelm.tokenizers import Tokenizer
from stablelm.tokenizers.interface import document_tokens


@dataclass(frozen=True)
class PrepareRequest:
    """`files`: sources by base name; `part`: (k, n), share k of n."""

    files: list[str]
    tokenizer: Tokenizer
    out: OutputFolder
    filters: RowFilters
    workers: int
    part: tuple[int, int] | None
    verify: bool
    options: ReadOptions


@dataclass(frozen=True)
class PrepareTask:
    url: str
    request: PrepareRequest


@dataclass(frozen=True)
class MadeShard:
    """A shard that is there now; `kept`: it was there before; `skipped`: bad rows that were found when it was made."""

    footer: ShardFooter
    kept: bool
    skipped: int = 0


def prepare(request: PrepareRequest, message: Callable[[str], None]) -> None:
    """Writes all shards, masks and the manifest; of one part only the shards. Reports each finished file by `message`.

    Raises DataError when text cannot be read, StorageError when something cannot be written.
    """
    files, out = request.files, request.out
    if request.part is not None:
        share, shares = request.part
        made = _shards(request, files[share - 1 :: shares], message)
        message(f"part {share} of {shares}: {_sum(made.values())}; run without --part when all parts are there")
        return
    out.remove(MANIFEST)
    out.sweep([base_name(url) + end for url in files for end in (SUFFIX, MASK)])
    made = _shards(request, files, message)
    footers = [made[url].footer for url in files]
    entries = [_entry(footer) for footer in footers]
    for each, mask in zip(entries, _masks(request, footers, message), strict=True):
        each |= {"masked_rows": 0, "mask_sha256": None} if mask is None else mask
    manifest = {
        "version": shard_format.VERSION,
        "tokenizer": footers[0].tokenizer,
        "pieces": footers[0].pieces,
        "eos": footers[0].eos,
        "filters": request.filters.words(),
        **{key: sum(each[key] for each in entries) for key in ("rows", "tokens", "text_bytes", "masked_rows")},
        "files": entries,
    }
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    out.put(MANIFEST, lambda file: file.write(content))
    message(f"{out.where}: {_sum(made.values())}, {manifest['masked_rows']:,} documents excluded")


def _shards(request: PrepareRequest, files: list[str], message: Callable[[str], None]) -> dict[str, MadeShard]:
    """The shard of each file; those that were there and fit are kept."""
    made: dict[str, MadeShard] = {}
    tasks = [PrepareTask(url, request) for url in files]
    try:
        for number, result in run_all(_make, tasks, workers=request.workers):
            made[files[number]] = result
            footer, more = result.footer, ", kept" if result.kept else ""
            more += f", {result.skipped:,} bad rows skipped" if result.skipped else ""
            message(f"[{len(made)}/{len(files)}] {footer.source}: {footer.rows:,} rows, {footer.tokens:,} tokens{more}")
    except BaseException:
        # Workers that were ended could not tidy up.
        request.out.sweep([base_name(url) + SUFFIX for url in files])
        raise
    return made


def _make(task: PrepareTask) -> MadeShard:
    request, name = task.request, base_name(task.url)
    tokenizer = request.tokenizer
    size = _size(task.url, request.options)
    found = _kept(request, name, size, tokenizer.sha256)
    if found is not None:
        return MadeShard(found, kept=True)

    skipped: list[BadRow] = []

    def write(file: IO[bytes]) -> ShardFooter:
        return shard_format.write(
            file,
            ((document_tokens(tokenizer, text), len(text.encode())) for text in _texts(task, skipped.append)),
            source=name,
            source_size=size,
            tokenizer=tokenizer.sha256,
            pieces=tokenizer.pieces,
            eos=tokenizer.eos,
        )

    footer = request.out.put(name + SUFFIX, write)
    return MadeShard(footer, kept=False, skipped=len(skipped))


def _kept(request: PrepareRequest, name: str, size: int, tokenizer: str) -> ShardFooter | None:
    """What an earlier run wrote of this source, if it is complete and made with this tokenizer."""
    url = request.out.url(name + SUFFIX)
    try:
        # What was written is new each time: a change is none of a source's.
        options = replace(request.options, stamps={})
        shard = TokenShard(url, tokenizer=tokenizer, options=options, masked=False)
        footer = shard.footer
        if (footer.source, footer.source_size) != (name, size):
            return None
        # A store's object is put at once; to hash it would be to fetch it.
        if request.verify or local_path(url) is not None:
            shard.check()
        if footer.version == shard_format.UNCHECKED:
            return request.out.put(name + SUFFIX, lambda file: shard_format.add_checksums(file, shard.parts(), footer))
        return footer
    except DataError:
        return None


def _masks(
    request: PrepareRequest, footers: list[ShardFooter], message: Callable[[str], None]
) -> list[dict[str, Any] | None]:
    """Writes the mask of each shard that needs one and deletes the others; returns the manifest's entry of each."""
    out, names = request.out, [footer.source for footer in footers]
    if not request.filters.active:
        for name in names:
            out.remove(name + MASK)
        return [None] * len(names)
    message("looking for documents to exclude")
    found: dict[int, RowFeatures] = dict(
        run_all(_features, [PrepareTask(url, request) for url in request.files], workers=request.workers)
    )
    described: list[dict[str, Any] | None] = []
    decided = row_filters.excluded([found[number] for number in range(len(names))], request.filters)
    for footer, mask in zip(footers, decided, strict=True):
        if len(mask) != footer.rows:
            raise DataError(f"{footer.source}: changed while it was prepared; run again")
        if not mask.any():
            out.remove(footer.source + MASK)
            described.append(None)
            continue
        bits = np.packbits(mask, bitorder="little").tobytes()
        out.put(footer.source + MASK, lambda file, bits=bits: file.write(bits))
        described.append({"masked_rows": int(mask.sum()), "mask_sha256": hashlib.sha256(bits).hexdigest()})
    return described


def _features(task: PrepareTask) -> RowFeatures:
    return row_filters.features(_texts(task), task.request.filters)


def _texts(task: PrepareTask, skipped: Callable[[BadRow], None] = lambda row: None) -> Iterator[str]:
    """Of every row, so that rows keep their numbers: '' of one without a document."""
    return (text or "" for text in texts(task.url, task.request.options, skipped))


def _size(url: str, options: ReadOptions) -> int:
    """Bytes of a source file. Raises DataError."""
    url = stored_at(url)
    path = local_path(url)
    if path is None:
        with RangeFile(url, options) as file:
            return file.stamp().size
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put the file back, then run again") from None


def _entry(footer: ShardFooter) -> dict[str, Any]:
    words = asdict(footer)
    return {"name": footer.source} | {
        key: words[key] for key in ("source_size", "rows", "tokens", "text_bytes", "sha256")
    }


def _sum(made: Any) -> str:
    footers = [each.footer for each in made]
    rows, tokens = sum(footer.rows for footer in footers), sum(footer.tokens for footer in footers)
    return f"{len(footers)} shards, {rows:,} rows, {tokens:,} tokens"


T = TypeVar("T")
R = TypeVar("R")


def run_all(work: Callable[[T], R], tasks: Sequence[T], *, workers: int) -> Iterator[tuple[int, R]]:
    """(number, result) of each task as it is done, in up to `workers` processes; with one worker in this process.

    `work` and tasks must be importable and picklable. What a task raises is raised here, and the others are
    ended. Raises ProcessLostError when a process was killed from outside.
    """
    if workers == 1 or len(tasks) < 2:
        yield from ((number, work(task)) for number, task in enumerate(tasks))
        return
    others = set(multiprocessing.active_children())
    # A forked process would inherit threads' locks; a fresh one has no such surprises.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_watch)
    try:
        numbers = {pool.submit(work, task): number for number, task in enumerate(tasks)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise ProcessLostError(
            "a worker was killed, perhaps because memory ran out; use fewer --workers and run again: "
            "finished files are kept"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        ended = set(multiprocessing.active_children()) - others
        for process in ended:
            process.terminate()
        for process in ended:
            process.join()


def _watch() -> None:
    """Ends this process when its parent has ended, even by kill -9; an interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
