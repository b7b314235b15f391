"""From a lane's documents to windows of tokens.

Documents are encoded, each followed by eos, and joined. A window holds seq_len+1 tokens and begins with
the last token of the one before, so each token is predicted exactly once.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from stablelm.data.lanes import Cursor
from stablelm.data.source import Encoder, document_tokens

__all__ = ["Encoder", "Packer", "document_tokens"]


class Packer:
    """Windows of one lane. `cursor` is the place where the next window begins, and all there is to save.

    `documents` yields (cursor, text) from the document of `start` on; the first start.offset tokens of
    that document have been inputs already.
    """

    def __init__(self, documents: Iterator[tuple[Cursor, str]], tokenizer: Encoder, seq_len: int, start: Cursor):
        self.cursor = start
        self._documents, self._tokenizer, self._seq_len = documents, tokenizer, seq_len
        self._skip = start.offset
        self._waiting: deque[tuple[Cursor, np.ndarray]] = deque()  # cursor with offset, tokens from there on
        self._length = 0

    def next(self) -> np.ndarray:
        """The next window, int32 (seq_len+1,). Raises DataError when a document cannot be read."""
        while self._length <= self._seq_len:
            self._read_document()
        window = np.empty(self._seq_len + 1, np.int32)
        filled = 0
        while filled < self._seq_len:
            cursor, tokens = self._waiting.popleft()
            part = tokens[: self._seq_len - filled]
            window[filled : filled + len(part)] = part
            filled += len(part)
            if len(part) < len(tokens):
                self._waiting.appendleft((replace(cursor, offset=cursor.offset + len(part)), tokens[len(part) :]))
        self._length -= self._seq_len
        self.cursor, tokens = self._waiting[0]
        window[-1] = tokens[0]
        return window

    def _read_document(self) -> None:
        cursor, text = next(self._documents)
        tokens = document_tokens(self._tokenizer, text)
        skip, self._skip = self._skip, 0
        if skip:
            cursor, tokens = replace(cursor, offset=skip), tokens[skip:]
        self._waiting.append((cursor, tokens))
        self._length += len(tokens)
