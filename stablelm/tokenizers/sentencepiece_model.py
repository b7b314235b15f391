"""SentencePiece `.model` files."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import sentencepiece

from stablelm.errors import ConfigError
from stablelm.tokenizers.special_tokens import SpecialTokens, policy_hash

FILE = "tokenizer.model"
# Texts from which on one call for all of them costs less than one for each.
FEW = 16
MAKE = "stablelm train-tokenizer"


class SentencePieceTokenizer:
    """A SentencePiece model with an end-of-document piece: see `interface.Tokenizer`.

    A loaded processor is never changed, so that threads may share it. `sha256` is that of the file unless `special`
    asks for other tokens than the model's own eos.

    Raises ConfigError under `special.key` when the content is not a SentencePiece model or has no such piece.
    """

    def __init__(self, content: bytes, *, path: str, special: SpecialTokens):
        self.path, self._content, self._special = path, content, special
        self._processor = _processor(content, path, special.key)
        self.pieces: int = self._processor.get_piece_size()
        self.unknown: int | None = _id_or_none(self._processor.unk_id())
        self.bos: int | None = _id_or_none(self._processor.bos_id())
        self.eos: int = self._eos()
        self.add_bos = special.add_bos
        if self.add_bos and self.bos is None:
            raise special.no_bos(path)
        self._own_policy = self.eos == self._processor.eos_id() and not self.add_bos
        file_hash = hashlib.sha256(content).hexdigest()
        self.sha256 = file_hash if self._own_policy else policy_hash(file_hash, self.eos, self.bos, self.add_bos)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._content, self.path, self._special)

    def _eos(self) -> int:
        special, own = self._special, self._processor.eos_id()
        if special.eos_token is not None:
            found = self._processor.piece_to_id(special.eos_token)
            # A piece that text can give would end a document within it.
            if found != own and not self._processor.is_control(found):
                raise ConfigError(
                    f"{special.eos_key}={special.eos_token!r} is not a control piece of {self.path!r}; leave it "
                    "out, or name one, such as '</s>'"
                )
            return found
        if own < 0:
            raise ConfigError(
                f"{special.key}: {self.path!r} has no end-of-document piece; give a model trained with eos_id set, "
                f"such as one made by {MAKE}"
            )
        return own

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos, no eos."""
        return self._processor.encode(text)

    def encode_arrays(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]:
        """Ids of each text and eos after them, int32 (length,), made by so many threads where it is worth it."""
        ids = self._encoded(texts, threads, eos=self._own_policy)
        return ids if self._own_policy else [self._framed(each) for each in ids]

    def _encoded(self, texts: list[str], threads: int, *, eos: bool) -> list[np.ndarray]:
        if len(texts) < FEW:
            return [self._processor.encode_as_numpy(text, add_eos=eos) for text in texts]
        return self._processor.encode_as_numpy(texts, add_eos=eos, num_threads=threads)

    def _framed(self, ids: np.ndarray) -> np.ndarray:
        begin = [self.bos] if self.add_bos and len(ids) else []
        return np.array([*begin, *ids, self.eos], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control pieces such as eos give nothing."""
        return self._processor.decode(list(ids))

    def vocabulary(self) -> dict[str, int]:
        """Piece -> id."""
        return {self._processor.id_to_piece(number): number for number in range(self.pieces)}

    def files(self) -> dict[str, bytes]:
        return {FILE: self._content}


def _restored(content: bytes, path: str, special: SpecialTokens) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(content, path=path, special=special)


def _id_or_none(number: int) -> int | None:
    return number if number >= 0 else None


def _processor(content: bytes, path: str, key: str) -> sentencepiece.SentencePieceProcessor:
    bad = ConfigError(
        f"{key}: {path!r} is not a SentencePiece model; give a .model file, such as one made by {MAKE}, or a "
        "tokenizer.json"
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
