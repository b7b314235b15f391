"""From documents to tokens: SentencePiece models, loaded or trained, and the documents of several lanes in one call."""

import hashlib
import io
import random
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from stablelm.data.order import DocumentGroup, TextLane, TokenChunk
from stablelm.errors import ConfigError
from stablelm.small_files import read_small

IGNORED = -100  # as a target: no target
NO_TOKENS = np.empty(0, np.int32)
# A longer line is cut, so that SentencePiece neither skips it nor slows down on it.
LONGEST_LINE = 4096
# Texts from which on one call for all of them costs less than one for each.
FEW = 16
# Documents of one call, if the lanes have as many; those of a lane at its start, and at least afterwards.
DOCUMENTS_OF_A_CALL = 512
DOCUMENTS_AT_START, DOCUMENTS_AFTERWARDS = 4, 8


class Encoder(Protocol):
    """What the data layer needs of a tokenizer; `sha256` names it in prepared shards.

    `unknown`: id of the token for what no piece can write.
    `encode_arrays` gives the tokens of each document and its eos, int32 (length,), by up to `threads` threads.
    """

    @property
    def eos(self) -> int: ...

    @property
    def unknown(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def encode_arrays(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]: ...


def document_tokens(tokenizer: Encoder, text: str | None) -> np.ndarray:
    """Tokens of a document and its eos, int32 (length,); empty where there would be only eos."""
    return with_text(tokenizer.encode_arrays([text])[0]) if text else NO_TOKENS


def with_text(tokens: np.ndarray) -> np.ndarray:
    """The tokens of a row with eos; empty where eos is the only one, since rows without text do not count."""
    return tokens if len(tokens) > 1 else NO_TOKENS


class Tokenizer:
    """A SentencePiece `.model` file with an end-of-document piece.

    `pieces` is the vocabulary, `eos` the id of the end-of-document piece, `unknown` that of what no piece
    can write, `sha256` the hash of the file. Methods may be called from several threads: a loaded processor
    is never changed.

    Raises ConfigError under `key` when the file does not exist, is not a SentencePiece model or has no eos.
    """

    def __init__(self, path: str | Path, *, key: str = "data.tokenizer"):
        self.path = str(path)
        self._content = content = _read(self.path, key)
        self._processor = _processor(content, self.path, key)
        self.pieces: int = self._processor.get_piece_size()
        self.eos: int = self._processor.eos_id()
        self.unknown: int = self._processor.unk_id()
        self.bos: int | None = bos if (bos := self._processor.bos_id()) >= 0 else None
        self.add_bos = False
        self.sha256: str = hashlib.sha256(content).hexdigest()
        if self.eos < 0:
            raise ConfigError(
                f"{key}: {self.path!r} has no end-of-document piece; give a model trained with eos_id set, "
                "such as one made by data/train_tokenizer.py"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos, no eos."""
        return self._processor.encode(text)

    def encode_arrays(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]:
        """Ids of each text and eos after them, int32 (length,), made by so many threads where it is worth it."""
        if len(texts) < FEW:
            return [self._processor.encode_as_numpy(text, add_eos=True) for text in texts]
        return self._processor.encode_as_numpy(texts, add_eos=True, num_threads=threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control pieces such as eos give nothing."""
        return self._processor.decode(list(ids))

    def files(self) -> dict[str, bytes]:
        """Name -> content of the files that make this tokenizer again."""
        return {"tokenizer.model": self._content}


def _read(path: str, key: str) -> bytes:
    try:
        return read_small(Path(path).expanduser())
    except FileNotFoundError:
        fix = "give the path of a SentencePiece .model file, or 'embedded'"
        raise ConfigError(f"{key}: {path!r} does not exist; {fix}") from None
    except OSError as error:
        fix = "give a readable SentencePiece .model file"
        raise ConfigError(f"{key}: cannot read {path!r} ({error.strerror}); {fix}") from None


def _processor(content: bytes, path: str, key: str) -> sentencepiece.SentencePieceProcessor:
    bad = ConfigError(
        f"{key}: {path!r} is not a SentencePiece model; give a .model file, such as one made by data/train_tokenizer.py"
    )
    # An empty file would load without complaint and fail at the first use.
    if not content:
        raise bad
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise bad from None
    if processor.get_piece_size() == 0:
        raise bad
    return processor


def sample_lines(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """At most `count` non-blank lines, drawn uniformly (reservoir sampling); the same ones for the same texts and seed.

    Lines are what SentencePiece trains on: a newline is never part of a piece, byte fallback writes it as one id.
    """
    draw = random.Random(seed)
    kept: list[str] = []
    seen = 0
    for text in texts:
        for line in text.split("\n"):
            if not line.strip():
                continue
            line = line[:LONGEST_LINE]
            if len(kept) < count:
                kept.append(line)
            elif (place := draw.randrange(seen + 1)) < count:
                kept[place] = line
            seen += 1
    return kept


def train(lines: Iterable[str], *, vocab_size: int, model_type: str = "unigram", key: str = "vocab_size") -> bytes:
    """Content of a new `.model` file; equal lines give equal bytes.

    Unknown characters fall back to bytes and nothing is normalised, so that decode(encode(text)) == text.
    Ids: 0 unknown, 1 eos, then 256 bytes, then the learned pieces; there is no bos.

    Raises ConfigError under `key` when this text cannot give `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * LONGEST_LINE + 1,
            # Partial sums are added thread by thread, so another number would give other scores.
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"{key}: {vocab_size} pieces cannot be learned from this text, {_possible(str(error))}"
        ) from None
    return model.getvalue()


def _possible(error: str) -> str:
    """The fix that SentencePiece's message contains, without the options that it names."""
    if most := re.search(r"value <= (\d+)", error):
        return f"it gives at most {most[1]}; give fewer pieces or more text"
    if least := re.search(r"required_chars. \d+ vs (\d+)", error):
        return f"it needs at least {least[1]}; give more pieces"
    reason = " ".join(error.rsplit("] ", 1)[-1].split()).rstrip(".")
    return f"there is too little of it{f' ({reason})' if reason else ''}; give more text"


class BatchedTokenization:
    """The lanes of one thread, whose documents are tokenized in one call. Each has at most one chunk ahead.

    A tokenizer's tables fill the processor's cache; what is done between two calls drives them out, so a few hundred
    documents at once cost a sixth less than some dozen at a time. `turn` is that of all threads of the process: one
    encodes at a time, with `threads` threads, so that the others read meanwhile and the tables are in
    use once.
    """

    def __init__(self, encoder: Encoder, *, threads: int, turn: threading.Lock):
        self._encoder, self._threads, self._turn = encoder, threads, turn
        self._lanes: list[LaneTokens] = []

    def add(self, documents: TextLane) -> "LaneTokens":
        """The tokens of one more lane."""
        self._lanes.append(LaneTokens(documents, self, len(self._lanes)))
        return self._lanes[-1]

    def fill(self, number: int) -> None:
        """Makes chunks for lane `number` and for those after it that have none and need not open their first file."""
        each = max(DOCUMENTS_AFTERWARDS, DOCUMENTS_OF_A_CALL // len(self._lanes))
        taken: list[tuple[LaneTokens, DocumentGroup]] = []
        documents = 0
        for lane in self._lanes[number:] + self._lanes[:number]:
            if lane.ready or not lane.begun:
                continue
            try:
                group = lane.documents.next_group(DOCUMENTS_AT_START if lane.at_start else each)
            except Exception as error:
                lane.ready.append(error)
                continue
            lane.at_start = False
            taken.append((lane, group))
            documents += len(group.texts)
            if documents >= DOCUMENTS_OF_A_CALL:
                break
        texts = [text for _, group in taken for text in group.texts if text]
        with self._turn:
            tokens = iter(self._encoder.encode_arrays(texts, threads=self._threads) if texts else ())
        for lane, group in taken:
            if group.texts:
                lane.ready.append(_chunk(group, tokens))
            if group.wrong is not None:
                lane.ready.append(group.wrong)


class LaneTokens:
    """The tokens of one lane's documents, made with those of other lanes."""

    def __init__(self, documents: TextLane, batch: BatchedTokenization, number: int):
        self.documents, self._batch, self._number = documents, batch, number
        self.ready: deque[TokenChunk | Exception] = deque()
        self.begun, self.at_start = False, True

    def next_chunk(self) -> TokenChunk:
        """The tokens of the lane's next documents; raises what reading them raises."""
        self.begun = True
        if not self.ready:
            self._batch.fill(self._number)
        chunk = self.ready.popleft()
        if isinstance(chunk, Exception):
            raise chunk
        return chunk


class BlockTokens:
    """The tokens of one lane's documents, a whole block in each chunk, as best-fit packing needs them."""

    def __init__(self, documents: TextLane, encoder: Encoder):
        self._documents, self._encoder = documents, encoder

    def next_chunk(self) -> TokenChunk:
        """The tokens of the rest of the block. Raises what is wrong with any of its rows: none is left out."""
        group = self._documents.next_group()
        if group.wrong is not None:
            raise group.wrong
        texts = [text for text in group.texts if text]
        return _chunk(group, iter(self._encoder.encode_arrays(texts) if texts else ()))


def _chunk(group: DocumentGroup, tokens: Iterator[np.ndarray]) -> TokenChunk:
    """The chunk of a group, with the next `tokens` for each of its documents and none for rows without text."""
    parts = [with_text(next(tokens)) if text else NO_TOKENS for text in group.texts]
    ends = np.cumsum([len(part) for part in parts])
    return TokenChunk(group.cursor, np.concatenate(parts), ends, skipped=group.skipped)
