"""`tokenizer.json` files, by the `tokenizers` library: byte-level BPE, unigram, WordPiece and what else it reads."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
import tokenizers

from stablelm.errors import ConfigError, DataError
from stablelm.tokenizers import tokenizer_json
from stablelm.tokenizers.special_tokens import SETTINGS, NamedToken, SpecialTokens, named, policy_hash

FILE = "tokenizer.json"
# Characters for which a thread more is worth its start.
SHARE = 1 << 15
# A model of so many rows would fill the memory before it is trained.
MOST_PIECES = 1 << 22
T = TypeVar("T")


class HuggingFaceTokenizer:
    """A tokenizer.json with a token that ends a document: see `interface.Tokenizer`.

    `settings`: files beside it by name (see `special_tokens.SETTINGS`). Texts are encoded without the file's
    post-processor, truncation and padding, and what looks like a special token in them is text.

    Raises ConfigError under `special.key` when the content is not a tokenizer that the library reads.
    """

    def __init__(self, content: bytes, settings: Mapping[str, bytes], *, path: str, special: SpecialTokens):
        self.path, self._content, self._settings, self._special = path, content, dict(settings), special
        # Threads are ours to start: the library's own would take every core, and complain when the process forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        described = tokenizer_json.read(content, path, special.key)
        self._tokenizer = tokenizer_json.load(content, described, path, special.key)
        self._added = self._tokenizer.get_added_tokens_decoder()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.pieces: int = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.pieces <= MOST_PIECES:
            raise ConfigError(
                f"{special.key}: the largest id of {path!r} is {self.pieces - 1}, which is not one of a vocabulary of "
                f"1 to {MOST_PIECES} pieces; give another tokenizer"
            )
        eos, bos = self._named("eos"), self._named("bos")
        self.eos: int = self._eos(eos)
        self.bos: int | None = None if bos is None else self._id(bos, "bos")
        self.add_bos = special.add_bos
        if self.add_bos and self.bos is None:
            fix = f"leave it out, or name one as bos_token in a {SETTINGS[0]} beside a file named {FILE}"
            raise special.no_bos(path, fix=fix)
        self.unknown: int | None = tokenizer_json.unknown(described, vocabulary)
        self._kept = {name for name in settings if name != SETTINGS[-1]}
        self._kept |= {found.file for found in (eos, bos) if found is not None and found.file is not None}
        self._never = self._not_from_text(vocabulary)
        file_hash = hashlib.sha256(content).hexdigest()
        self.sha256: str = policy_hash(file_hash, self.eos, self.bos, self.add_bos)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._content, self._settings, self.path, self._special)

    def _named(self, role: str) -> NamedToken | None:
        special = {token.content for token in self._added.values() if token.special}
        return named(role, self._settings, special, folder=os.path.dirname(self.path), key=self._special.key)

    def _eos(self, found: NamedToken | None) -> int:
        special = self._special
        if special.eos_token is not None:
            number = self._tokenizer.token_to_id(special.eos_token)
            if number is None:
                raise ConfigError(
                    f"{special.eos_key}={special.eos_token!r} is not a token of {self.path!r}; {self._choice()}"
                )
            return number
        if found is None:
            raise ConfigError(
                f"{special.key}: {self.path!r} does not say which token ends a document; {self._choice()}"
            )
        return self._id(found, "eos")

    def _choice(self) -> str:
        contents = [repr(token.content) for token in self._added.values() if token.special]
        key = self._special.eos_key
        if not contents:
            return f"set {key} to one of its tokens"
        shown = ", ".join(contents[:8]) + (", ..." if len(contents) > 8 else "")
        return f"set {key} to one of its special tokens: {shown}"

    def _id(self, token: NamedToken, role: str) -> int:
        if isinstance(token.value, int):
            found = token.value if self._tokenizer.id_to_token(token.value) is not None else None
        else:
            found = self._tokenizer.token_to_id(token.value)
        if found is None:
            raise ConfigError(
                f"{self._special.key}: {token.file} names {token.value!r} as the {role} token, which {self.path!r} "
                f"does not have; fix that file" + (f", or set {self._special.eos_key}" if role == "eos" else "")
            )
        return found

    def _not_from_text(self, vocabulary: Mapping[str, int]) -> np.ndarray:
        """Ids around a document, int64 (n,). They are made special, so that text does not give them as added tokens."""
        contents = {number: content for content, number in vocabulary.items()}
        own = [number for number in (self.eos, self.bos) if number is not None]
        self._tokenizer.add_special_tokens(
            [tokenizers.AddedToken(contents[number], special=True, normalized=False) for number in own]
        )
        return np.unique(np.array(own, np.int64))

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos, no eos."""
        return self._texts_ids([text])[0]

    def encode_arrays(self, texts: list[str], *, threads: int = 1) -> list[np.ndarray]:
        """Ids of each text, with bos before them if documents begin so, and eos after; int32 (length,)."""
        begin = [self.bos] if self.add_bos else []
        shares = _shares(texts, threads)
        if len(shares) == 1:
            made = [self._texts_ids(texts)]
        else:
            with ThreadPoolExecutor(len(shares)) as pool:
                made = list(pool.map(self._texts_ids, shares))
        return [np.array([*(begin if ids else ()), *ids, self.eos], np.int32) for some in made for ids in some]

    def _texts_ids(self, texts: list[str]) -> list[list[int]]:
        encodings = self._call(lambda: self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        made = [encoding.ids for encoding in encodings]
        for number, ids in enumerate(made):
            if any(each in ids for each in self._never.tolist()):
                made[number] = self._without_control(texts[number], self._never.tolist())
        return made

    def _without_control(self, text: str, never: list[int]) -> list[int]:
        """Ids of a text out of which the model itself reads a control token: that is encoded in two halves."""
        for number in never:
            content = self._tokenizer.id_to_token(number)
            if content and len(content) > 1 and content in text:
                half = len(content) // 2
                before, after = text.split(content, 1)
                left, right = before + content[:half], content[half:] + after
                return [each for part in (left, right) for each in self._texts_ids([part])[0]]
        encoding = self._call(lambda: self._tokenizer.encode(text, add_special_tokens=False))
        return [each for each in encoding.ids if each not in never]

    def _call(self, work: Callable[[], T]) -> T:
        try:
            return tokenizer_json.guarded(work)
        except ValueError as error:
            raise DataError(
                f"the tokenizer {self.path!r} cannot encode a document ({error}); use another tokenizer"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens such as eos give nothing."""
        return self._call(lambda: self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """Piece -> id, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def files(self) -> dict[str, bytes]:
        return {FILE: self._content} | {name: self._settings[name] for name in SETTINGS if name in self._kept}


def _restored(content: bytes, settings: dict[str, bytes], path: str, special: SpecialTokens) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(content, settings, path=path, special=special)


def _shares(texts: list[str], threads: int) -> list[list[str]]:
    """Consecutive texts for each of up to `threads` threads, of about as many characters."""
    ends = list(accumulate(map(len, texts)))
    total = ends[-1] if ends else 0
    count = max(1, min(threads, total // SHARE))
    cuts = [int(np.searchsorted(ends, total * share // count)) for share in range(1, count)]
    edges = [0, *cuts, len(texts)]
    return [texts[low:high] for low, high in pairwise(edges) if low < high] or [texts]
