"""How text is read: what a run's configuration tells every reader of files."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stablelm.config.schema import DataConfig
    from stablelm.data.storage.seen_files import SeenFiles

# Compressed bytes of one remote request, and what the lanes of a process may hold of them together.
SMALLEST_BLOCK, LARGEST_BLOCK = 64 << 10, 1 << 20
READ_AHEAD = 48 << 20
LONGEST_DOCUMENT = 64 << 20
# Seconds in which a store must answer before the run has begun with it, and for all that is looked at of one file.
FIRST_ANSWER, LONGEST_LOOK = 7.0, 12.0
# Names under which one store is known.
FAMILIES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "https": "http"}


@dataclass(frozen=True)
class Stamp:
    """What tells one content of a file from another: bytes, and ETag or time of change ('' where there is none)."""

    size: int
    tag: str


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
    seen: "SeenFiles | None" = None
    stamps: dict[str, Stamp] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, data: "DataConfig", lanes: int = 1) -> "ReadOptions":
        """Options of a configuration, for a process that reads so many lanes."""
        return cls(
            retry_budget=data.retry_budget,
            max_document_bytes=data.max_document_bytes,
            text_column=data.text_column,
            storage=data.storage,
            cache=data.cache,
            cache_bytes=data.cache_bytes,
            block=min(max(READ_AHEAD // lanes, SMALLEST_BLOCK), LARGEST_BLOCK),
            filter=data.filter,
            map=data.map,
            bad_rows=data.bad_rows,
            text_unit=data.text_unit,
        )

    def first_look(self) -> "ReadOptions":
        """For files that no attempt of the run has read yet: a mistyped address is no outage to wait for."""
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
