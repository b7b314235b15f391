"""Readings of documents that write down what they are given: ours, and `datasets`' streaming (for `data_faults.py`)."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS, DATASETS, PLAIN = "stablelm", "datasets", "datasets, plain json"


def mark(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:16]


def read(reader: str, pattern: str, storage: dict[str, Any], budget: float, out: Path) -> None:
    """Writes a line for each document as it comes, and at the end how it ended and how long it took, as JSON."""
    with out.open("w") as lines:
        import datasets  # noqa: F401  takes seconds, and ours asks for it on the hub as well

        waits: list[float] = []
        began = time.perf_counter()
        try:
            texts = ours(pattern, storage, budget, waits) if reader == OURS else theirs(pattern, storage)
            for text in texts:
                lines.write(f"{mark(text)}\n")
            ended = "finished"
        except Exception as error:
            ended = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        told = {"ended": ended, "seconds": time.perf_counter() - began, "waited": sum(waits)}
        lines.write(json.dumps(told) + "\n")


def ours(pattern: str, storage: dict[str, Any], budget: float, waits: list[float]) -> Iterator[str]:
    """Documents as the loader reads them; `waits` gets the seconds that each retried read took."""
    from stablelm.data import corpus
    from stablelm.data.formats.file_rows import documents
    from stablelm.data.storage import retry
    from stablelm.data.storage.options import ReadOptions

    noted = retry.noted

    @contextmanager
    def timed(wait: Any) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with noted(wait):
                yield
        finally:
            waits.append(time.perf_counter() - began)

    retry.noted = timed
    options = ReadOptions(retry_budget=budget, storage=storage)
    files = corpus.resolve(pattern, key="--data", cache="unused", options=options)
    return documents(files, options)


def theirs(pattern: str, storage: dict[str, Any]) -> Iterator[str]:
    """Documents as `datasets` streams them, with the settings it comes with."""
    import datasets

    from stablelm.data.storage.options import braces

    options = {"endpoint_url": storage["s3.endpoint_url"]} if storage else None
    files = braces(pattern) if pattern.startswith("http") else pattern
    rows = datasets.load_dataset("json", data_files=files, split="train", streaming=True, storage_options=options)
    return (row["text"] for row in rows)
