"""SentencePiece models: loading one, and training one that gives every text back."""

import hashlib
import io
import random
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from stablelm.errors import ConfigError
from stablelm.small_files import read_small

# A longer line is cut, so that SentencePiece neither skips it nor slows down on it.
LONGEST_LINE = 4096
# Texts from which on a call for them together costs less than one for each.
FEW = 16


class Tokenizer:
    """A SentencePiece `.model` file with an end-of-document piece.

    `pieces` is the vocabulary, `eos` the id of the end-of-document piece, `unknown` that of what no piece
    can write, `sha256` the hash of the file. Methods may be called from several threads: a loaded processor
    is never changed.

    Raises ConfigError under `key` when the file is missing, is no SentencePiece model or has no eos.
    """

    def __init__(self, path: str | Path, *, key: str = "data.tokenizer"):
        self.path = str(path)
        content = _read(self.path, key)
        self._processor = _processor(content, self.path, key)
        self.pieces: int = self._processor.get_piece_size()
        self.eos: int = self._processor.eos_id()
        self.unknown: int = self._processor.unk_id()
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


def _read(path: str, key: str) -> bytes:
    try:
        return read_small(Path(path).expanduser())
    except FileNotFoundError:
        mend = "give the path of a SentencePiece .model file, or 'embedded'"
        raise ConfigError(f"{key}: there is no file {path!r}; {mend}") from None
    except OSError as error:
        mend = "give a readable SentencePiece .model file"
        raise ConfigError(f"{key}: cannot read {path!r} ({error.strerror}); {mend}") from None


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
    """The mend in SentencePiece's message, without its talk of options that are not ours."""
    if most := re.search(r"value <= (\d+)", error):
        return f"it gives at most {most[1]}; give fewer pieces or more text"
    if least := re.search(r"required_chars. \d+ vs (\d+)", error):
        return f"it takes at least {least[1]}; give more pieces"
    reason = " ".join(error.rsplit("] ", 1)[-1].split()).rstrip(".")
    return f"there is too little of it{f' ({reason})' if reason else ''}; give more text"
