"""Which rows of prepared shards are excluded: too short or long ones, and copies of earlier ones.

What a decision needs of a file (`RowFeatures`) is found in parallel; the decision goes through the files in
base-name order and their rows in order, so that the first of several copies stays.

MinHash and its index are datasketch's. Exact copies are found by sorting hashes: the library compares sketches only.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stablelm.errors import ConfigError

WORDS = 5  # a shingle
PERMUTATIONS = 128
SEED, SCHEME = 1, "affine32"


@dataclass(frozen=True)
class RowFilters:
    """Documents to exclude; lengths in characters. `similarity`: Jaccard index of the sets of five words each."""

    min_chars: int | None = None
    max_chars: int | None = None
    duplicates: Literal["exact", "minhash"] | None = None
    similarity: float = 0.8

    @property
    def active(self) -> bool:
        return (self.min_chars, self.max_chars, self.duplicates) != (None, None, None)

    def words(self) -> dict[str, Any]:
        """Their entry in a manifest."""
        described: dict[str, Any] = {
            "min_chars": self.min_chars,
            "max_chars": self.max_chars,
            "duplicates": self.duplicates,
        }
        return described | ({"similarity": self.similarity} if self.duplicates == "minhash" else {})


@dataclass(frozen=True)
class RowFeatures:
    """Of each row: characters int64 (rows,), hash uint64 (rows, 2), MinHash signature uint32 (rows, 128) if needed."""

    chars: np.ndarray
    digests: np.ndarray
    signatures: np.ndarray | None


def check(filters: RowFilters) -> None:
    """Raises ConfigError for filters that contradict themselves or need a package that is not installed."""
    low, high = filters.min_chars, filters.max_chars
    if (low or 0) < 0 or (high is not None and high < max(low or 0, 1)):
        raise ConfigError("--min-chars and --max-chars exclude every document; give 0 <= min <= max")
    if not 0 < filters.similarity <= 1:
        raise ConfigError(f"--similarity: must be above 0 and at most 1, not {filters.similarity}")
    if filters.duplicates == "minhash":
        try:
            import datasketch  # noqa: F401
        except ImportError:
            raise ConfigError("--dedup minhash: the package datasketch is missing; pip install datasketch") from None


def features(texts: Iterable[str], filters: RowFilters) -> RowFeatures:
    """What `filters` need to know of the texts, row by row."""
    chars, digests, signatures = [], [], []
    for text in texts:
        chars.append(len(text))
        digests.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
        if filters.duplicates == "minhash":
            signatures.append(_signature(text))
    return RowFeatures(
        np.array(chars, np.int64),
        np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2),
        np.array(signatures, np.uint32).reshape(-1, PERMUTATIONS) if filters.duplicates == "minhash" else None,
    )


def excluded(files: Sequence[RowFeatures], filters: RowFilters) -> list[np.ndarray]:
    """Of each file, in order: bool (rows,), whether a row is excluded."""
    masks = [np.zeros(len(file.chars), bool) for file in files]
    for mask, file in zip(masks, files, strict=True):
        if filters.min_chars is not None:
            mask |= file.chars < filters.min_chars
        if filters.max_chars is not None:
            mask |= file.chars > filters.max_chars
        mask &= file.chars > 0  # rows without a document are not counted as excluded
    if filters.duplicates == "exact":
        _mask_copies(files, masks)
    elif filters.duplicates == "minhash":
        _mask_similar(files, masks, filters.similarity)
    return masks


def _mask_copies(files: Sequence[RowFeatures], masks: list[np.ndarray]) -> None:
    places = [np.flatnonzero(~mask & (file.chars > 0)) for mask, file in zip(masks, files, strict=True)]
    digests = np.concatenate([file.digests[rows] for file, rows in zip(files, places, strict=True)])
    # A stable sort: of equal hashes the first row comes first.
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    copies = np.zeros(len(order), bool)
    copies[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    parts = np.split(copies, np.cumsum([len(rows) for rows in places])[:-1])
    for mask, rows, part in zip(masks, places, parts, strict=True):
        mask[rows[part]] = True


def _mask_similar(files: Sequence[RowFeatures], masks: list[np.ndarray], similarity: float) -> None:
    from datasketch import LeanMinHash, MinHashLSH

    index = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
    kept: dict[Any, LeanMinHash] = {}
    for number, (file, mask) in enumerate(zip(files, masks, strict=True)):
        assert file.signatures is not None
        for row in np.flatnonzero(~mask & (file.chars > 0)):
            sketch = LeanMinHash(seed=SEED, hashvalues=file.signatures[row], scheme=SCHEME)
            # The index gives candidates; the share of equal hashes estimates how similar they are.
            if any(kept[name].jaccard(sketch) >= similarity for name in index.query(sketch)):
                mask[row] = True
                continue
            name = f"{number}:{row}"
            kept[name] = sketch
            index.insert(name, sketch)


def _signature(text: str) -> np.ndarray:
    words = text.split()
    shingles = {" ".join(words[start : start + WORDS]).encode() for start in range(max(1, len(words) - WORDS + 1))}
    sketch = _empty_sketch().copy()
    sketch.update_batch(list(shingles))
    return sketch.hashvalues


@functools.cache
def _empty_sketch() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=SEED, scheme=SCHEME)
